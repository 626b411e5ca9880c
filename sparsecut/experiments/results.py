"""Every figure of a study, computed from what its runs left on disk; study_runner.py says what that
is.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

from ..config.yaml_io import read_yaml
from ..data.jsonl import read_json_lines
from ..evaluation.statistics import (
    Answers,
    Contrast,
    Spread,
    estimate_accuracy,
    estimate_contrast,
    estimate_difference,
    pool_seed_spread,
)
from ..plan import Plan
from ..schema import UserError

SIZES = {"here": "the study's own size", "large": "CLIP-L/336 + 7B"}
MOST_PAIRED = 16  # arms of the matrix of all pairs: more cannot be read
ORDER = ("high", "mid", "low")  # of the picture world's levels


def figures(folder: Path) -> dict:
    """Every figure of a study as plain numbers, lists and strings; shares are 0 to 1, times in
    seconds.
    """
    if not (folder / "study.yaml").is_file():
        raise UserError(
            f"{folder} holds no study.yaml; give the output folder of a study, or run one with"
            " `sparsecut study`"
        )
    study = read_yaml(
        (folder / "study.yaml").read_text(encoding="utf-8"), str(folder / "study.yaml")
    )
    budgets = list(study["budgets"])
    main = study.get("main") or budgets[0]
    budgets.sort(key=lambda name: name != main)
    costs = _json(folder / "costs.json") or {}
    answers: dict[str, dict[str, Answers]] = {b: {} for b in budgets}
    arms = {
        name: {"family": (study.get("families") or {}).get(name), "results": {}}
        for name in study["arms"]
    }
    missing, curves = [], {b: {} for b in budgets}
    for budget in budgets:
        for name, arm in arms.items():
            runs, lacking = _runs(folder / "runs" / budget / name, study["seeds"])
            lacking = [seed for seed in lacking if _is_asked(study["budgets"][budget], name, seed)]
            missing += [f"{budget}/{name}/{seed}" for seed in lacking]
            if runs:
                answers[budget][name] = _answers(runs, folder / "runs" / budget / name)
                arm["results"][budget] = _result(runs, answers[budget][name])
                curves[budget][name] = _curve(runs.values())
                arm.setdefault("facts", _json(next(iter(runs.values())) / "facts.json"))
    for name, arm in arms.items():
        arm |= _about(
            arm.pop("facts", None) or {}, costs.get(name) or {}, costs.get(study["baseline"]) or {}
        )
        arm["family"] = arm["family"] or _family(arm["plan"])
    known = next((a for of in answers.values() for a in of.values()), None)
    levels = (
        sorted(known.levels, key=lambda w: (ORDER.index(w) if w in ORDER else 9, w))
        if known
        else []
    )
    found = {
        **{key: study.get(key) for key in ("title", "note", "baseline", "seeds")},
        "main": main,
        "budgets": {b: _changes(study["budgets"][b]) for b in budgets},
        "levels": levels,
        "num_questions": len(known.ids) if known else 0,
        "num_pictures": len(set(known.image)) if known else 0,
        "missing": missing,
        "arms": arms,
        "curves": curves,
    }
    _compare(found, answers)
    found["pairs"] = _pairs(found, answers[main])
    found["frontier"] = {size: _frontier(found, size) for size in SIZES}
    return found


def _changes(budget: list | dict | None) -> list[str]:
    """A budget's overrides, whether or not it names arms and seeds of its own."""
    return list((budget.get("change") if isinstance(budget, dict) else budget) or [])


def _is_asked(budget: list | dict | None, arm: str, seed: int) -> bool:
    part = budget if isinstance(budget, dict) else {}
    return arm in (part.get("arms") or [arm]) and seed in (part.get("seeds") or [seed])


def _runs(folder: Path, seeds: list[int]) -> tuple[dict[int, Path], list[int]]:
    """Folders of finished runs by seed, and the seeds that are missing."""
    needed = ("eval/result.json", "eval/predictions.jsonl", "facts.json")
    done = {
        seed: folder / str(seed)
        for seed in seeds
        if all((folder / str(seed) / n).is_file() for n in needed)
    }
    return done, [seed for seed in seeds if seed not in done]


def _json(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _lines(path: Path) -> list[dict]:
    return read_json_lines(path, skip_partial=True) if path.is_file() else []


def _answers(runs: dict[int, Path], folder: Path) -> Answers:
    try:
        return Answers.from_records(
            {seed: _lines(run / "eval" / "predictions.jsonl") for seed, run in runs.items()}
        )
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None


def _result(runs: dict[int, Path], answers: Answers) -> dict:
    """One arm under one budget: its scores, and what its runs took."""
    own, facts = estimate_accuracy(answers), [_json(run / "facts.json") for run in runs.values()]
    groups: dict[str, list[float]] = {}
    for run in runs.values():
        for name, row in (_json(run / "eval" / "result.json").get("groups") or {}).items():
            groups.setdefault(name, []).append(row["accuracy"])
    by_seed = answers.accuracies.mean(1)
    return {
        "seeds": list(runs),
        "by_seed": dict(zip(map(str, runs), map(float, by_seed), strict=True)),
        "average": asdict(own.average),
        "levels": {name: asdict(e) for name, e in own.levels.items()},
        "groups": {name: sum(shares) / len(shares) for name, shares in sorted(groups.items())},
        **{key: _mean([f.get(key) for f in facts]) for key in ("train_seconds", "eval_seconds")},
    }


def _mean(values: list) -> float | None:
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def _curve(runs) -> list[list[float]]:
    """(step, loss) of the last stage, mean over the runs that logged the step."""
    losses: dict[int, list[float]] = {}
    for run in runs:
        config = (
            read_yaml((run / "config.yaml").read_text(), "config.yaml")
            if (run / "config.yaml").is_file()
            else {}
        )
        stages = [stage["name"] for stage in config.get("stages", [])] or ["tune"]
        for line in _lines(run / stages[-1] / "log.jsonl"):
            if line.get("loss") is not None:
                losses.setdefault(line["step"], []).append(line["loss"])
    most = max(map(len, losses.values()), default=0)
    return [
        [step, sum(values) / len(values)]
        for step, values in sorted(losses.items())
        if len(values) == most
    ]


def _about(facts: dict, cost: dict, baseline: dict) -> dict:
    """What does not depend on the budget: the plan, its sizes and its cost."""
    count = {size: cost.get(size) or {} for size in SIZES}
    relative = {}
    for size in SIZES:
        own, base = (
            count[size].get("prefill_total_flops"),
            (baseline.get(size) or {}).get("prefill_total_flops"),
        )
        relative[size] = own / base if own and base else None
    return {
        "plan": facts.get("plan") or cost.get("plan"),
        "depths": facts.get("depths"),
        "image_tokens": facts.get("image_tokens", count["here"].get("num_image_tokens")),
        "views": facts.get("views"),
        "parameters": facts.get("parameters") or {},
        "cost": count,
        "relative": relative,
    }


def _family(plan: dict | None) -> str:
    """Where a plan adds and what it sees, in words; for studies that name no families."""
    if plan is None:
        return "not run yet"
    plan = Plan.from_dict(plan)
    where = "into layers too" if plan.layers else "input only"
    return f"{where}, {'fine views' if plan.tiles else 'one view'}"


def _compare(found: dict, answers: dict[str, dict[str, Answers]]) -> None:
    """Add differences from the baseline, per budget, and how they change between budgets."""
    baseline, main = found["baseline"], found["main"]
    found["spread"] = {}
    for budget, of in answers.items():
        spread = _spread(of)
        if spread:
            found["spread"][budget] = {
                "average": float(spread.deviations[-1]),
                "num_free": spread.degrees_of_freedom,
            }
        others = [
            name for name in of if name != baseline and _share_seeds(of[name], of.get(baseline))
        ]
        for name in others:
            wide = estimate_difference(
                of[name], of[baseline], comparisons=len(others), spread=spread
            )
            found["arms"][name]["results"][budget]["difference"] = {
                **_plain(estimate_difference(of[name], of[baseline], spread=spread)),
                "corrected": asdict(wide.average),
                "corrected_levels": {level: asdict(e) for level, e in wide.levels.items()},
                "comparisons": len(others),
            }
            if budget != main and _share_seeds(
                *(a.get(n) for a in (of, answers[main]) for n in (name, baseline))
            ):
                pair = sorted((main, budget), key=lambda b: _length(found["curves"][b]))
                terms = [
                    (w * v, answers[b][n])
                    for w, b in ((-1, pair[0]), (1, pair[1]))
                    for v, n in ((1, name), (-1, baseline))
                ]
                change = estimate_contrast(terms, spread=_spread(answers[main], of)).average
                kept = {"from": pair[0], "to": pair[1], **asdict(change)}
                found["arms"][name]["results"][main].setdefault("change", {})[budget] = kept


def _share_seeds(*arms: Answers | None) -> bool:
    """Whether all of them were run, with a seed in common; in an unfinished study they need not
    be.
    """
    return None not in arms and bool(set.intersection(*(set(a.seeds) for a in arms)))


def _spread(*budgets: dict[str, Answers]) -> Spread | None:
    """The seeds' spread, pooled over the arms of each budget that were trained with the same
    seeds.
    """
    groups: dict[tuple, list[Answers]] = {}
    for i, of in enumerate(budgets):
        for answers in of.values():
            groups.setdefault((i, *sorted(answers.seeds)), []).append(answers)
    return pool_seed_spread(*groups.values())


def _length(curves: dict) -> float:
    """Steps of a budget, by what was logged."""
    return max((line[-1][0] for line in curves.values() if line), default=0)


def _plain(whole: Contrast) -> dict:
    plain = whole.to_dict()
    plain.pop("comparisons")
    return plain


def _pairs(found: dict, answers: dict[str, Answers]) -> dict:
    """Differences of all pairs among the arms with the most seeds, the best MOST_PAIRED of them and
    the baseline.
    """
    if len(answers) < 2:
        return {"arms": list(answers), "cells": []}
    value = {
        name: found["arms"][name]["results"][found["main"]]["average"]["value"] for name in answers
    }
    full = max(len(a.seeds) for a in answers.values())
    ranked = sorted((n for n in answers if len(answers[n].seeds) == full), key=lambda n: -value[n])
    chosen = ranked[:MOST_PAIRED]
    if found["baseline"] in ranked and found["baseline"] not in chosen:
        chosen = [*chosen[:-1], found["baseline"]]
    pairs = [(a, b) for a, b in combinations(chosen, 2) if _share_seeds(answers[a], answers[b])]
    spread = _spread(answers)
    cells = []
    for a, b in pairs:
        own = estimate_difference(answers[a], answers[b], spread=spread).average
        cells.append([a, b, {**asdict(own), "corrected_p": min(1.0, own.p * len(pairs))}])
    return {"arms": chosen, "cells": cells}


def _frontier(found: dict, size: str) -> list[str]:
    """Arms that no other beats in average at no more prefill FLOPs, cheapest first."""
    places = {
        name: (arm["relative"][size], -arm["results"][found["main"]]["average"]["value"])
        for name, arm in found["arms"].items()
        if arm["relative"][size] and found["main"] in arm["results"]
    }
    beaten = {
        a
        for a, pa in places.items()
        for pb in places.values()
        if pb != pa and pb[0] <= pa[0] and pb[1] <= pa[1]
    }
    return sorted((name for name in places if name not in beaten), key=lambda name: places[name])
