"""Every number of a study, computed from what its runs left on disk.

`runner.py` lists the files that a run leaves.
"""

from __future__ import annotations

from dataclasses import asdict
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
    pool_seed_spread,
)
from ..evaluation.variant_answers import Answers
from ..plan import Plan
from ..schema import UserError, read_json_file

SIZES = {"here": "the study's own size", "large": "CLIP-L/336 + 7B"}
MAX_PAIRED = 16  # variants in the matrix of all pairs: more cannot be read
LEVEL_ORDER = ("high", "mid", "low")  # of the built-in shapes
RUN_FILES = ("eval/result.json", "eval/predictions.jsonl", "facts.json")

AnswersByBudget = dict[str, dict[str, Answers]]  # budget -> variant -> answers


def compute_results(folder: str | Path) -> dict:
    """Compute every number of a study.

    Args:
        folder: The study's output folder. An unfinished study is computed as far as it goes.

    Returns:
        Plain numbers, lists and strings, as report.json holds them. Accuracies are fractions (0 to
        1), times are in seconds.

    Raises:
        UserError: There is no study, or its runs answered different questions.
    """
    folder = Path(folder)
    study = _read_study(folder)
    budgets = _sort_budgets(study)
    main = budgets[0]
    results = {key: study.get(key) for key in ("title", "note", "baseline", "seeds")}
    results["main"] = main
    results["budgets"] = {name: _get_changes(study["budgets"][name]) for name in budgets}

    variants = {}
    for name in study["arms"]:
        variants[name] = {"family": (study.get("families") or {}).get(name), "results": {}}

    missing: list[str] = []
    curves: dict[str, dict] = {}
    answers: AnswersByBudget = {}
    for budget in budgets:
        answers[budget] = {}
        curves[budget] = {}
        for name, variant in variants.items():
            place = folder / "runs" / budget / name
            runs = _find_finished_runs(place, study["seeds"])
            missing += _name_missing_runs(study, budget, name, runs)
            if not runs:
                continue
            answers[budget][name] = _read_answers(runs, place)
            variant["results"][budget] = _summarize(runs, answers[budget][name])
            curves[budget][name] = _average_losses(runs.values())
            if "facts" not in variant:
                first_run = next(iter(runs.values()))
                variant["facts"] = _read_json(first_run / "facts.json")

    _describe_variants(variants, folder, study["baseline"])
    results |= _count_questions(answers)
    results |= {"missing": missing, "arms": variants, "curves": curves}
    _add_differences(results, answers)
    results["pairs"] = _compare_pairs(results, answers[main])
    results["frontier"] = {size: _find_frontier(results, size) for size in SIZES}
    return results


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


def _read_answers(runs: dict[int, Path], folder: Path) -> Answers:
    records = {}
    for seed, run in runs.items():
        records[seed] = read_predictions(run / "eval" / "predictions.jsonl", judged=True)
    try:
        return Answers.from_records(records)
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


def _describe_variants(variants: dict[str, dict], folder: Path, baseline: str) -> None:
    """Add what does not depend on the budget: the plan, its sizes and its cost."""
    costs = _read_json(folder / "costs.json") or {}
    for name, variant in variants.items():
        facts = variant.pop("facts", None) or {}
        variant |= _describe_variant(facts, costs.get(name) or {}, costs.get(baseline) or {})
        if not variant["family"]:
            variant["family"] = _describe_family(variant["plan"])


def _describe_variant(facts: dict, cost: dict, baseline_cost: dict) -> dict:
    counts = {size: cost.get(size) or {} for size in SIZES}
    relative = {}
    for size in SIZES:
        flops = counts[size].get("prefill_total_flops")
        baseline_flops = (baseline_cost.get(size) or {}).get("prefill_total_flops")
        relative[size] = flops / baseline_flops if flops and baseline_flops else None

    return {
        "plan": facts.get("plan") or cost.get("plan"),
        "depths": facts.get("depths"),
        "image_tokens": facts.get("image_tokens", counts["here"].get("num_image_tokens")),
        "views": facts.get("views"),
        "parameters": facts.get("parameters") or {},
        "cost": counts,
        "relative": relative,
    }


def _describe_family(plan: dict | None) -> str:
    """Where a plan adds and what it sees; for studies that name no families."""
    if plan is None:
        return "not run yet"
    plan = Plan.from_dict(plan)
    place = "into layers too" if plan.layers else "input only"
    views = "fine views" if plan.tiles else "one view"
    return f"{place}, {views}"


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
        spread = _pool_spread(by_variant)
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
    spread = _pool_spread(answers[main], answers[budget])
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


def _pool_spread(*budgets: dict[str, Answers]) -> Spread | None:
    """The seeds' spread, pooled over variants that a budget trained with the same seeds."""
    groups: dict[tuple, list[Answers]] = {}
    for i, by_variant in enumerate(budgets):
        for answers in by_variant.values():
            groups.setdefault((i, *sorted(answers.seeds)), []).append(answers)
    return pool_seed_spread(*groups.values())


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

    spread = _pool_spread(answers)
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

    names.sort(key=lambda name: -_get_average(results, name))

    baseline = results["baseline"]
    chosen = names[:MAX_PAIRED]
    if baseline in names and baseline not in chosen:
        chosen[-1] = baseline
    return chosen


def _get_average(results: dict, name: str) -> float:
    """A variant's accuracy under the main budget."""
    return results["arms"][name]["results"][results["main"]]["average"]["value"]


def _find_frontier(results: dict, size: str) -> list[str]:
    """Variants that no other beats in average at no more prefill FLOPs, cheapest first."""
    places = {}
    for name, variant in results["arms"].items():
        cost = variant["relative"][size]
        if cost and results["main"] in variant["results"]:
            places[name] = (cost, -_get_average(results, name))

    frontier = []
    for name, place in places.items():
        is_beaten = any(_beats(other, place) for other in places.values())
        if not is_beaten:
            frontier.append(name)

    return sorted(frontier, key=lambda name: places[name])


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether (cost, -accuracy) is no worse in both and better in one."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]
