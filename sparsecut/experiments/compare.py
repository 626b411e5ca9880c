"""Finished evaluations side by side: one table, paired differences over the same items, and the
items on which they differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config.yaml_io import expand_path, read_yaml
from ..data.images import Pictures
from ..data.jsonl import read_json_lines
from ..evaluation.statistics import (
    Answers,
    Contrast,
    estimate_accuracy,
    estimate_difference,
    pool_seed_spread,
)
from ..plan import Plan
from ..schema import UserError

RESULT, PREDICTIONS = "result.json", "predictions.jsonl"


@dataclass
class Compared:
    """One name in a comparison: its evaluations by seed, and what is known of its model.

    folders: seed -> folder with result.json and predictions.jsonl. records: seed -> lines of the
    latter. plan, depths and cost are None where no saved model lies beside the evaluation.
    """

    name: str
    folders: dict[int, Path] = field(default_factory=dict)
    records: dict[int, list[dict]] = field(default_factory=dict)
    results: dict[int, dict] = field(default_factory=dict)
    plan: Plan | None = None
    depths: tuple[int, int] | None = None
    cost: dict | None = None

    @property
    def answers(self) -> Answers:
        """Its answers as the statistics take them."""
        return Answers.from_records(self.records)


def read_runs(named: Sequence[str]) -> list[Compared]:
    """Runs as typed: a folder, or NAME=FOLDER; folders of one name are seeds of one arm. The first
    is the baseline.

    A folder is an evaluation's (`--out` of eval), or a training run's, which holds `eval`. Raises
    ValueError for folders without a finished evaluation, for fewer than two names, and where
    different questions were asked.
    """
    found: dict[str, Compared] = {}
    for name, path in _names(named):
        run, folder = found.setdefault(name, Compared(name)), _evaluation(Path(path))
        config = _config(folder)
        seed = config.get("seed", len(run.folders)) if config else len(run.folders)
        seed = seed if seed not in run.folders else max(run.folders) + 1
        run.folders[seed] = folder
        run.results[seed] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        run.records[seed] = read_json_lines(folder / PREDICTIONS)
        if run.plan is None:
            run.plan, run.depths, run.cost = _model_facts(folder, run.results[seed].get("model"))
    runs = list(found.values())
    if len(runs) < 2:
        raise UserError(
            f"a comparison needs two runs or more, but {len(runs)} was named; name another, as"
            " a=runs/a b=runs/b"
        )
    _check_same(runs)
    return runs


def figures(runs: Sequence[Compared], *, num_items: int = 24) -> dict:
    """All figures of a comparison as plain values: shares with intervals, differences from the
    first run, kinds, cost, items.

    Intervals of differences are corrected for the number of them. items: at most num_items on which
    the runs differ, those where the baseline alone is wrong and those where it alone is right in
    turn.
    """
    answers = {run.name: run.answers for run in runs}
    base, *others = runs
    spread = pool_seed_spread(list(answers.values()))
    common = set.intersection(*(set(run.records) for run in runs))
    paired = answers if common else {name: _unseeded(a) for name, a in answers.items()}
    rows = {}
    for run in runs:
        row = {
            "seeds": sorted(run.folders),
            "share": estimate_accuracy(answers[run.name]).to_dict(),
        }
        if run is not base:
            more = {"comparisons": len(others), "spread": spread if common else None}
            row["difference"] = _plain(
                estimate_difference(paired[run.name], paired[base.name], **more)
            )
        row |= {
            "kinds": _kinds(run),
            "plan": run.plan and run.plan.to_dict(),
            "depths": run.depths,
            "cost": run.cost,
        }
        row["folders"] = {str(seed): str(folder) for seed, folder in run.folders.items()}
        rows[run.name] = row
    return {
        "baseline": base.name,
        "num_questions": len(next(iter(base.records.values()))),
        "runs": rows,
        "items": _items(runs, num_items),
        "num_differing": sum(
            len({_rights(run, i) for run in runs}) > 1 for i in range(len(answers[base.name].ids))
        ),
    }


def table(found: dict) -> list[list[str]]:
    """The comparison as rows of text; the first row is the head."""
    levels = list(next(iter(found["runs"].values()))["share"]["levels"])
    levels = [] if levels == ["all"] else levels
    head = [
        "run",
        "seeds",
        "average (95 %)",
        *levels,
        f"above {found['baseline']} (corrected)",
        "image tokens",
        "prompt FLOPs",
    ]
    first = next((row["cost"] for row in found["runs"].values() if row["cost"]), None)
    rows = [head]
    for name, row in found["runs"].items():
        share, cost = row["share"], row["cost"]
        by_level = [f"{100 * share['levels'][level]['value']:.1f}" for level in levels]
        gap = row.get("difference")
        rows.append(
            [
                name,
                str(len(row["seeds"])),
                f"{100 * share['average']['value']:.1f} ({_span(share['average'])})",
                *by_level,
                f"{100 * gap['average']['value']:+.1f} ({_span(gap['average'])})" if gap else "-",
                f"{cost['num_image_tokens']:,}" if cost else "-",
                f"{cost['prefill_total_flops'] / first['prefill_total_flops']:.3f}"
                if cost
                else "-",
            ]
        )
    return rows


def notes(found: dict) -> list[str]:
    """What a reader must know of the figures, in sentences."""
    lines = [
        (
            f"{found['num_questions']:,} questions, the same for all; {found['num_differing']:,} of"
            " them are not answered alike."
        ),
        (
            "Intervals: bootstrap over pictures and seeds; differences are paired by question (and"
            " seed), and corrected for their number."
        ),
    ]
    if any(len(row["seeds"]) == 1 for row in found["runs"].values()):
        lines.append(
            "One seed is one seed: such an interval speaks of the pictures only, another training"
            " may differ by more."
        )
    if any(row["cost"] for row in found["runs"].values()):
        lines.append(
            "Prompt FLOPs: of a prompt with one picture and 64 text tokens, relative to the first"
            " run with a saved model."
        )
    return lines


def _names(named: Sequence[str]) -> list[tuple[str, str]]:
    """(name, folder) of each; a folder without a name is called by what sets its path apart from
    the others'.
    """
    paths = [Path(text).parts for text in named if "=" not in text]
    shared = min(map(len, paths), default=0) - 1 if len(set(paths)) > 1 else 0
    start = next((i for i in range(shared) if len({path[i] for path in paths}) > 1), max(shared, 0))
    end = next(
        (i for i in range(shared - start) if len({path[-1 - i] for path in paths}) > 1),
        max(shared - start, 0),
    )
    pairs = []
    for text in named:
        name, equals, path = text.partition("=")
        parts = Path(text).parts
        pairs.append((name, path) if equals else ("/".join(parts[start : len(parts) - end]), text))
    return pairs


def _span(estimate: dict) -> str:
    return f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"


def _plain(gap: Contrast) -> dict:
    return gap.to_dict()


def _evaluation(folder: Path) -> Path:
    for place in (folder, folder / "eval"):
        if (place / RESULT).is_file() and (place / PREDICTIONS).is_file():
            return place
    unfinished = any((place / PREDICTIONS).is_file() for place in (folder, folder / "eval"))
    raise UserError(
        f"{folder} holds no finished evaluation ({RESULT} and {PREDICTIONS})"
        + (", only a begun one: run the same command again, it goes on" if unfinished else "")
        + "; give the folder of `sparsecut eval --out` or of a recipe with `evaluate`"
    )


def _config(folder: Path) -> dict | None:
    path = folder.parent / "config.yaml"
    return read_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None


def _model_facts(
    folder: Path, asked: str | None
) -> tuple[Plan | None, tuple[int, int] | None, dict | None]:
    """Plan, depths and counted cost of the model beside an evaluation, or of the one it says it
    asked, where it is one of ours.
    """
    place = folder.parent / "final"
    if asked and not (place / "config.json").is_file():
        place = Path(asked)
    if not (place / "config.json").is_file():
        return None, None, None
    from transformers import AutoConfig

    from ..configuration import SparseCutConfig
    from ..profiling.counting import count

    config = AutoConfig.from_pretrained(place)
    plan = config.get_plan()
    depths = config.vision_depth, config.language_depth
    if not isinstance(config, SparseCutConfig):  # an upgraded model, whose base may be anything
        return plan, depths, None
    return plan, depths, count(config.vision_config, config.text_config, plan).to_dict()


def _check_same(runs: Sequence[Compared]) -> None:
    """Refuse runs that answered other questions, whatever their order of answers."""
    first = next(iter(runs[0].records.values()))
    for run in runs:
        for records in run.records.values():
            ours, theirs = [r["id"] for r in first], [r["id"] for r in records]
            if ours != theirs:
                only = sorted(set(ours) ^ set(theirs))[:2]
                raise UserError(
                    f"{runs[0].name} and {run.name} were asked different questions ({len(ours)} and"
                    f" {len(theirs)}"
                    + (
                        f", for example {' and '.join(map(str, only))} by one of them alone"
                        if only
                        else ", in another order"
                    )
                    + "); evaluate both on the same file"
                )
            if [r["reference"] for r in first] != [r["reference"] for r in records]:
                raise UserError(
                    f"{runs[0].name} and {run.name} have other references for the same questions;"
                    " evaluate both again"
                )


def _unseeded(answers: Answers) -> Answers:
    """Runs of different seeds are paired by question alone: each as one row, the mean of its
    seeds.
    """
    right = answers.correct.mean(0, keepdims=True)
    return Answers(right, answers.image, answers.level, answers.ids, [0])


def _kinds(run: Compared) -> dict[str, float]:
    """Share right by kind of question, mean over seeds."""
    rights: dict[str, list[bool]] = {}
    for records in run.records.values():
        for record in records:
            if record["group"] is not None:
                rights.setdefault(record["group"], []).append(bool(record["correct"]))
    return {kind: sum(right) / len(right) for kind, right in sorted(rights.items())}


def _rights(run: Compared, i: int) -> tuple[bool, ...]:
    """Whether item i was answered right, most seeds deciding."""
    votes = [bool(records[i]["correct"]) for records in run.records.values()]
    return (2 * sum(votes) > len(votes),)


def _items(runs: Sequence[Compared], number: int) -> list[dict]:
    base, *others = runs
    first = next(iter(base.records.values()))
    gained, lost = [], []
    for i in range(len(first)):
        own, theirs = _rights(base, i)[0], [_rights(run, i)[0] for run in others]
        if not own and any(theirs):
            gained.append((-sum(theirs), i))
        elif own and not all(theirs):
            lost.append((sum(theirs), i))
    ordered = [[i for _, i in sorted(side)] for side in (gained, lost)]
    chosen = [i for k in range(number) for side in ordered for i in side[k : k + 1]][:number]
    return [
        {
            **{
                key: first[i][key]
                for key in ("id", "prompt", "images", "reference", "group", "level")
            },
            "answers": {
                run.name: {
                    str(seed): [r[i]["prediction"], bool(r[i]["correct"])]
                    for seed, r in run.records.items()
                }
                for run in runs
            },
        }
        for i in chosen
    ]


def stores(runs: Sequence[Compared], images: str | Path | None = None) -> list[Pictures]:
    """Where the items' pictures lie: the folder or archive given, or those that the runs' own
    recipes, or their benchmarks, name.
    """
    if images is not None:
        return [Pictures(images)]
    places: dict[str, None] = {}
    for run in runs:
        config = _config(next(iter(run.folders.values()))) or {}
        sources = (config.get("evaluate") or {}).get("data") or []
        named = [
            expand_path(source.get("images") or str(Path(source["path"]).parent))
            for source in ([sources] if isinstance(sources, dict) else sources)
        ]
        named += [result["pictures"] for result in run.results.values() if result.get("pictures")]
        places |= {str(place): None for place in named if Path(place).exists()}
    return [Pictures(place) for place in places]
