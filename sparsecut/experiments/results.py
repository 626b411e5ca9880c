"""Every number of a study, computed from what its runs left on disk.

`runner.py` lists the files that a run leaves.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

from ..config.yaml_io import read_yaml_values
from ..data.jsonl import read_json_lines
from ..evaluation.output_dir import read_predictions
from ..evaluation.statistics import (
    Contrast,
    Spread,
    estimate_accuracy,
    estimate_contrast,
    estimate_difference,
    pool_spread,
)
from ..evaluation.variant_answers import Answers
from ..schema import UserError, read_json_file
from .questions import answer_questions
from .rate_choice import RateChoice, read_choice
from .rates import TEXT_ONLY
from .study import Study, load_study
from .study_parts import Question, build_question
from .text_scores import find_answered, get_open_scores, score_texts
from .variant_costs import SIZES, describe_variants, find_frontier, get_average, get_averages

MAX_PAIRED = 16  # variants in the matrix of all pairs: more cannot be read
LEVEL_ORDER = ("high", "mid", "low")  # of the built-in shapes
RUN_FILES = ("eval/result.json", "eval/predictions.jsonl", "facts.json")

AnswersByBudget = dict[str, dict[str, Answers]]  # budget -> variant -> answers


def compute_results(folder: str | Path, questions: dict[str, Question] | None = None) -> dict:
    """Compute every number of a study.

    Args:
        folder: The study's output folder. An unfinished study is computed as far as it goes.
        questions: What is asked of it, in place of the questions that it began with.

    Returns:
        Plain numbers, lists and strings, as report.json holds them. Accuracies are fractions (0 to
        1), times are in seconds.

    Raises:
        UserError: There is no study, or its runs answered different questions.
    """
    folder = Path(folder)
    study = _read_study(folder)
    protocol = _load_protocol(folder, study)
    choices = _read_choices(protocol)
    budgets = _sort_budgets(study)
    main = budgets[0]
    results = {key: study.get(key) for key in ("title", "note", "baseline", "seeds")}
    results["main"] = main
    results["budgets"] = {name: _get_changes(study["budgets"][name]) for name in budgets}
    results["average_over"] = study.get("average_over") or "levels"

    variants = {}
    for name in study["arms"]:
        variants[name] = {"family": (study.get("families") or {}).get(name), "results": {}}

    results |= {"missing": [], "stale": [], "arms": variants, "curves": {}}
    answers: AnswersByBudget = {}
    for budget in budgets:
        answers[budget] = _read_budget(folder, study, budget, results, choices)

    describe_variants(variants, folder, study["baseline"])
    results |= _count_questions(answers)
    _add_differences(results, answers)
    results["pairs"] = _compare_pairs(results, answers[main])
    results["frontier"] = _find_frontiers(results, get_averages(results))
    results["rates"] = {name: choice.describe() for name, choice in choices.items()}
    blind = _read_text_only(folder, study, protocol, results)
    answered = find_answered(folder, answers[main], blind)
    results["text"] = score_texts(folder, answers[main], blind, answered, study["baseline"])
    if results["text"] is not None:
        results["text"]["frontier"] = _find_frontiers(results, get_open_scores(results["text"]))
    asked = questions or _read_questions(study)
    results["questions"] = answer_questions(asked, answers, main, answered)
    return results


def _find_frontiers(results: dict, scores: dict[str, float]) -> dict[str, list[str]]:
    return {size: find_frontier(results, scores, size) for size in SIZES}


def _read_questions(study: dict) -> dict[str, Question]:
    questions = study.get("questions") or {}
    return {name: build_question(name, values) for name, values in questions.items()}


def _load_protocol(folder: Path, study: dict) -> Study | None:
    """The study itself, where rates are chosen or a run has no images."""
    if not (study.get("rates") or study.get("text_only")):
        return None
    return replace(load_study(folder / "study.yaml"), output=str(folder))


def _read_choices(study: Study | None) -> dict[str, RateChoice]:
    """The choice of every variant whose rate is chosen."""
    if study is None:
        return {}
    return {name: read_choice(study, name) for name in study.arms if study.get_grid(name)}


def _read_budget(
    folder: Path, study: dict, budget: str, results: dict, choices: dict[str, RateChoice]
) -> dict[str, Answers]:
    """Read the finished runs of a budget into the results; their answers by variant."""
    answers = {}
    results["curves"][budget] = {}
    for name, variant in results["arms"].items():
        place = folder / "runs" / budget / name
        runs = _find_finished_runs(place, study["seeds"])
        results["missing"] += _name_missing_runs(study, budget, name, runs)
        stale = _find_stale_runs(runs, choices.get(name))
        results["stale"] += [f"{budget}/{name}/{seed}" for seed in stale]
        runs = {seed: run for seed, run in runs.items() if seed not in stale}
        if not runs:
            continue
        answers[name] = _read_answers(runs, place, results["average_over"])
        variant["results"][budget] = _summarize(runs, answers[name])
        results["curves"][budget][name] = _average_losses(runs.values())
        if "facts" not in variant:
            first_run = next(iter(runs.values()))
            variant["facts"] = _read_json(first_run / "facts.json")
    return answers


def _find_stale_runs(runs: dict[int, Path], choice: RateChoice | None) -> list[int]:
    """Seeds that read the test split at a rate which a grown grid no longer chooses."""
    if choice is None or choice.num_missing or choice.best is None:
        return []
    stale = []
    for seed, run in runs.items():
        rate = (_read_json(run / "facts.json") or {}).get("rate")
        if rate is not None and not math.isclose(rate, choice.best):
            stale.append(seed)
    return stale


def _read_text_only(
    folder: Path, study: dict, protocol: Study | None, results: dict
) -> Answers | None:
    """The answers of the runs without images, and what is missing of them."""
    if protocol is None or not protocol.has_text_only:
        return None
    main = results["main"]
    place = folder / "runs" / main / TEXT_ONLY
    runs = _find_finished_runs(place, study["seeds"])
    results["missing"] += [f"{main}/{TEXT_ONLY}/{s}" for s in study["seeds"] if s not in runs]
    return _read_answers(runs, place, results["average_over"]) if runs else None


def _read_study(folder: Path) -> dict:
    path = folder / "study.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no study.yaml; give the output folder of a study, or run one with"
            " `sparsecut study`"
        )
    return read_yaml_values(path)


def _sort_budgets(study: dict) -> list[str]:
    """The budgets' names, the main one first."""
    budgets = list(study["budgets"])
    main = study.get("main") or budgets[0]
    return sorted(budgets, key=lambda name: name != main)


def _get_changes(budget: list | dict | None) -> list[str]:
    """A budget's overrides, whether or not it names variants and seeds of its own."""
    if isinstance(budget, dict):
        return list(budget.get("change") or [])
    return list(budget or [])


def _find_finished_runs(folder: Path, seeds: list[int]) -> dict[int, Path]:
    """Folders of finished runs by seed."""
    runs = {}
    for seed in seeds:
        run = folder / str(seed)
        if all((run / name).is_file() for name in RUN_FILES):
            runs[seed] = run
    return runs


def _name_missing_runs(study: dict, budget: str, name: str, runs: dict[int, Path]) -> list[str]:
    part = study["budgets"][budget]
    part = part if isinstance(part, dict) else {}
    if name not in (part.get("arms") or [name]):
        return []
    wanted = part.get("seeds") or study["seeds"]
    seeds = [seed for seed in study["seeds"] if seed in wanted and seed not in runs]
    return [f"{budget}/{name}/{seed}" for seed in seeds]


def _read_json(path: Path) -> dict | None:
    return read_json_file(path) if path.is_file() else None


def _read_lines(path: Path) -> list[dict]:
    return read_json_lines(path, skip_partial=True) if path.is_file() else []


def _read_answers(runs: dict[int, Path], folder: Path, average_over: str) -> Answers:
    records = {}
    for seed, run in runs.items():
        records[seed] = read_predictions(run / "eval" / "predictions.jsonl", judged=True)
    try:
        return Answers.from_records(records, average_over)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _summarize(runs: dict[int, Path], answers: Answers) -> dict:
    """One variant under one budget: its accuracy, and what its runs took."""
    estimates = estimate_accuracy(answers)
    by_seed = {}
    for seed, accuracy in zip(runs, answers.accuracies.mean(1), strict=True):
        by_seed[str(seed)] = float(accuracy)

    levels = {}
    for name, estimate in estimates.levels.items():
        levels[name] = asdict(estimate)

    facts = [_read_json(run / "facts.json") for run in runs.values()]
    return {
        "seeds": list(runs),
        "by_seed": by_seed,
        "average": asdict(estimates.average),
        "levels": levels,
        "groups": _average_groups(runs.values()),
        "train_seconds": _mean([fact.get("train_seconds") for fact in facts]),
        "eval_seconds": _mean([fact.get("eval_seconds") for fact in facts]),
        "peak_bytes": _mean([fact.get("peak_bytes") for fact in facts]),
        "questions": float(answers.correct.mean()),
        "rate": facts[0].get("rate"),
    }


def _average_groups(runs) -> dict[str, float]:
    """Accuracy by kind of question, mean over runs."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        result = _read_json(run / "eval" / "result.json")
        for name, row in (result.get("groups") or {}).items():
            groups.setdefault(name, []).append(row["accuracy"])
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}


def _mean(values: list) -> float | None:
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def _average_losses(runs) -> list[list[float]]:
    """(step, loss) of the last stage, mean over runs, at the steps that most runs logged."""
    losses: dict[int, list[float]] = {}
    for run in runs:
        stage = _get_last_stage(run)
        for line in _read_lines(run / stage / "log.jsonl"):
            loss = line.get("loss")
            if loss is not None:
                losses.setdefault(line["step"], []).append(loss)

    counts = [len(values) for values in losses.values()]
    most = max(counts, default=0)

    curve = []
    for step, values in sorted(losses.items()):
        if len(values) == most:
            mean = sum(values) / len(values)
            curve.append([step, mean])

    return curve


def _get_last_stage(run: Path) -> str:
    path = run / "config.yaml"
    config = read_yaml_values(path) if path.is_file() else {}
    names = [stage["name"] for stage in config.get("stages", [])]
    return names[-1] if names else "tune"


def _count_questions(answers: AnswersByBudget) -> dict:
    """The levels, and the numbers of questions and of images."""
    for by_variant in answers.values():
        for first in by_variant.values():
            return {
                "levels": sorted(first.levels, key=_get_level_rank),
                "num_questions": len(first.ids),
                "num_pictures": len(set(first.image)),
            }

    return {"levels": [], "num_questions": 0, "num_pictures": 0}


def _get_level_rank(name: str) -> tuple[int, str]:
    rank = LEVEL_ORDER.index(name) if name in LEVEL_ORDER else len(LEVEL_ORDER)
    return rank, name


def _add_differences(results: dict, answers: AnswersByBudget) -> None:
    """Add differences from the baseline for each budget, and their changes between budgets."""
    baseline = results["baseline"]
    results["spread"] = {}
    for budget, by_variant in answers.items():
        spread = pool_spread(by_variant)
        if spread:
            results["spread"][budget] = {
                "average": float(spread.deviations[-1]),
                "num_free": spread.degrees_of_freedom,
            }

        base = by_variant.get(baseline)
        others = []
        for name, variant_answers in by_variant.items():
            if name != baseline and _have_common_seed(variant_answers, base):
                others.append(name)

        for name in others:
            gap = _compute_difference(by_variant[name], base, len(others), spread)
            results["arms"][name]["results"][budget]["difference"] = gap
            if budget != results["main"]:
                _add_change(results, answers, name, budget)


def _compute_difference(
    answers: Answers, base: Answers, comparisons: int, spread: Spread | None
) -> dict:
    """A difference with plain intervals, and with intervals corrected for all comparisons."""
    plain = estimate_difference(answers, base, spread=spread)
    corrected = estimate_difference(answers, base, comparisons=comparisons, spread=spread)
    return {
        **_to_plain(plain),
        "corrected": asdict(corrected.average),
        "corrected_levels": {level: asdict(e) for level, e in corrected.levels.items()},
        "comparisons": comparisons,
    }


def _to_plain(estimates: Contrast) -> dict:
    plain = estimates.to_dict()
    plain.pop("comparisons")
    return plain


def _add_change(results: dict, answers: AnswersByBudget, name: str, budget: str) -> None:
    """Add how the difference from the baseline changes from the shorter budget to the longer."""
    main = results["main"]
    baseline = results["baseline"]

    needed = []
    for compared in (budget, main):
        needed.append(answers[compared].get(name))
        needed.append(answers[compared].get(baseline))

    if not _have_common_seed(*needed):
        return

    curves = results["curves"]
    shorter, longer = sorted((main, budget), key=lambda name: _get_num_steps(curves[name]))
    before = answers[shorter]
    after = answers[longer]
    terms = [
        (-1, before[name]),
        (1, before[baseline]),
        (1, after[name]),
        (-1, after[baseline]),
    ]
    spread = pool_spread(answers[main], answers[budget])
    change = estimate_contrast(terms, spread=spread).average

    result = results["arms"][name]["results"][main]
    changes = result.setdefault("change", {})
    changes[budget] = {"from": shorter, "to": longer, **asdict(change)}


def _have_common_seed(*variants: Answers | None) -> bool:
    """Whether all were run, with a seed in common; not given in an unfinished study."""
    if None in variants:
        return False
    seeds = [set(answers.seeds) for answers in variants]
    return bool(set.intersection(*seeds))


def _get_num_steps(curves: dict) -> float:
    """Steps of a budget, by what was logged."""
    return max((line[-1][0] for line in curves.values() if line), default=0)


def _compare_pairs(results: dict, answers: dict[str, Answers]) -> dict:
    """Differences of all pairs among the best `MAX_PAIRED` variants with the most seeds."""
    if len(answers) < 2:
        return {"arms": list(answers), "cells": []}

    chosen = _choose_paired(results, answers)
    pairs = []
    for a, b in combinations(chosen, 2):
        if _have_common_seed(answers[a], answers[b]):
            pairs.append((a, b))

    spread = pool_spread(answers)
    cells = []
    for a, b in pairs:
        gap = estimate_difference(answers[a], answers[b], spread=spread)
        estimate = asdict(gap.average)
        estimate["corrected_p"] = min(1.0, gap.average.p * len(pairs))
        cells.append([a, b, estimate])

    return {"arms": chosen, "cells": cells}


def _choose_paired(results: dict, answers: dict[str, Answers]) -> list[str]:
    """The best variants among those with the most seeds, the baseline included."""
    most = max(len(by_seed.seeds) for by_seed in answers.values())
    names = []
    for name, by_seed in answers.items():
        if len(by_seed.seeds) == most:
            names.append(name)

    names.sort(key=lambda name: -get_average(results, name))

    baseline = results["baseline"]
    chosen = names[:MAX_PAIRED]
    if baseline in names and baseline not in chosen:
        chosen[-1] = baseline
    return chosen
