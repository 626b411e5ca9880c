"""Compares evaluations: paired differences over the same items, and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config.yaml_io import expand_path, read_yaml_values
from ..data.access import Access
from ..data.images import ImageStore
from ..evaluation.judging import get_answer
from ..evaluation.output_dir import read_predictions
from ..evaluation.statistics import (
    Spread,
    estimate_accuracy,
    estimate_difference,
    pool_seed_spread,
)
from ..evaluation.tasks.task import TASK_ACCESS
from ..evaluation.variant_answers import Answers
from ..plan import Plan
from ..schema import UserError, read_json_file

RESULT, PREDICTIONS = "result.json", "predictions.jsonl"
ITEM_KEYS = ("id", "prompt", "images", "reference", "group", "level")


@dataclass
class ComparedRun:
    """One name in a comparison: its evaluations, and what is known of its model.

    Attributes:
        name: The name that tables show.
        folders: Seed to the folder with result.json and predictions.jsonl.
        records: Seed to the lines of predictions.jsonl.
        results: Seed to result.json.
        plan: The model's plan; None where no saved model lies beside the evaluation.
        depths: Blocks of the encoder and layers of the language model, or None.
        cost: The counted cost of a prompt, or None.
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

    @property
    def first_records(self) -> list[dict]:
        """The lines of its first seed."""
        return next(iter(self.records.values()))

    def is_right(self, item: int) -> bool:
        """Whether most seeds answered an item right."""
        votes = [bool(records[item]["correct"]) for records in self.records.values()]
        return 2 * sum(votes) > len(votes)


def read_runs(arguments: Sequence[str]) -> list[ComparedRun]:
    """Read evaluations from folders.

    Args:
        arguments: Each a folder, or NAME=FOLDER. Folders of one name are seeds of one variant. A
            folder is an evaluation's, or a training run's, which holds `eval`.

    Returns:
        One run for each name; the first is the baseline.

    Raises:
        UserError: A folder holds no finished evaluation, there are fewer than two names, or
            they answered different questions.
    """
    runs: dict[str, ComparedRun] = {}
    for name, path in _name_folders(arguments):
        run = runs.setdefault(name, ComparedRun(name))
        _add_evaluation(run, _find_evaluation(Path(path)))

    if len(runs) < 2:
        raise UserError(
            f"a comparison needs two runs or more, but {len(runs)} was named; name another, as"
            " a=runs/a b=runs/b"
        )

    _check_same_questions(list(runs.values()))
    return list(runs.values())


def _add_evaluation(run: ComparedRun, folder: Path) -> None:
    config = _read_config(folder) or {}
    seed = config.get("seed", len(run.folders))
    if seed in run.folders:
        seed = max(run.folders) + 1

    result = read_json_file(folder / RESULT)
    run.folders[seed] = folder
    run.results[seed] = result
    run.records[seed] = read_predictions(folder / PREDICTIONS, judged=True)
    if run.plan is None:
        _add_model_facts(run, folder, result.get("model"))


def _name_folders(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """(name, folder) of each; a folder without a name gets the part of its path that differs."""
    unnamed = [argument for argument in arguments if "=" not in argument]
    paths = [Path(argument).parts for argument in unnamed]
    start, end = _find_differing_parts(paths)

    pairs = []
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals:
            folder = argument
            parts = Path(folder).parts
            name = "/".join(parts[start : len(parts) - end])
        pairs.append((name, folder))

    return pairs


def _find_differing_parts(paths: list[tuple[str, ...]]) -> tuple[int, int]:
    """How many parts at the start and at the end all paths share; at least one part stays."""
    if len(set(paths)) < 2:
        return 0, 0

    lengths = [len(path) for path in paths]
    most = min(lengths) - 1
    start = _count_shared_parts(paths, most)
    reversed_paths = [path[::-1] for path in paths]
    end = _count_shared_parts(reversed_paths, most - start)
    return start, end


def _count_shared_parts(paths: list[tuple[str, ...]], most: int) -> int:
    """How many of the first `most` parts are the same in all paths."""
    for i in range(most):
        parts = {path[i] for path in paths}
        if len(parts) > 1:
            return i
    return max(most, 0)


def _find_evaluation(folder: Path) -> Path:
    places = (folder, folder / "eval")
    for place in places:
        if (place / RESULT).is_file() and (place / PREDICTIONS).is_file():
            return place

    hint = ""
    if any((place / PREDICTIONS).is_file() for place in places):
        hint = ", only a begun one: run the same command again, it goes on"
    raise UserError(
        f"{folder} holds no finished evaluation ({RESULT} and {PREDICTIONS}){hint}; give the folder"
        " of `sparsecut eval --out` or of a recipe with `evaluate`"
    )


def _read_config(folder: Path) -> dict | None:
    """The recipe of the run that an evaluation belongs to."""
    path = folder.parent / "config.yaml"
    return read_yaml_values(path) if path.is_file() else None


def _add_model_facts(run: ComparedRun, folder: Path, model: str | None) -> None:
    """Add plan, depths and counted cost of the saved model beside an evaluation, or of its own."""
    place = folder.parent / "final"
    if model and not (place / "config.json").is_file():
        place = Path(model)
    if not (place / "config.json").is_file():
        return
    from transformers import AutoConfig

    from ..configuration import SparseCutConfig
    from ..loading import load_pretrained
    from ..profiling.counting import count_plan

    complaint = f"{place}/config.json cannot be read; save the model again"
    config = load_pretrained(AutoConfig, place, complaint)
    if not hasattr(config, "get_plan"):  # a model of another package
        return
    run.plan = config.get_plan()
    run.depths = config.vision_depth, config.language_depth
    if isinstance(config, SparseCutConfig):  # the base of an upgraded model may be anything
        parts = config.vision_config, config.text_config
        run.cost = count_plan(*parts, run.plan, view_size=config.view_size).to_dict()


def _check_same_questions(runs: Sequence[ComparedRun]) -> None:
    """Refuse runs that answered other questions, or in another order."""
    first = runs[0].first_records
    ids = [record["id"] for record in first]
    references = [record["reference"] for record in first]

    for run in runs:
        names = f"{runs[0].name} and {run.name}"
        for records in run.records.values():
            other_ids = [record["id"] for record in records]
            if other_ids != ids:
                raise UserError(
                    f"{names} answered different questions ({len(ids)} and"
                    f" {len(other_ids)}{_name_differing(ids, other_ids)}); evaluate both on the"
                    " same file"
                )
            if [record["reference"] for record in records] != references:
                raise UserError(
                    f"{names} have other references for the same questions; evaluate both again"
                )


def _name_differing(ids: list, other_ids: list) -> str:
    examples = sorted(set(ids) ^ set(other_ids))[:2]
    if not examples:
        return ", in another order"
    return f", for example {' and '.join(map(str, examples))} by one of them alone"


def compare_runs(runs: Sequence[ComparedRun], *, num_items: int = 24) -> dict:
    """Compute every number of a comparison.

    Args:
        runs: What `read_runs` returns.
        num_items: At most so many items on which runs differ. Those that the baseline alone gets
            wrong and those that it alone gets right come in turn.

    Returns:
        Plain values, as compare.json holds them: accuracies as fractions with intervals,
        differences from the first run, kinds of questions, cost, and items. The intervals of
        differences are corrected for the number of differences.
    """
    baseline, *others = runs
    answers = {run.name: run.answers for run in runs}
    seeds = [set(run.records) for run in runs]
    if set.intersection(*seeds):
        paired = answers
        spread = pool_seed_spread(list(answers.values()))
    else:
        paired = {name: _average_seeds(by_seed) for name, by_seed in answers.items()}
        spread = None

    rows = {}
    for run in runs:
        row = _summarize_run(run, answers[run.name])
        if run is not baseline:
            pair = paired[run.name], paired[baseline.name]
            row["difference"] = _compute_difference(*pair, len(others), spread)
        rows[run.name] = row

    num_questions = len(baseline.first_records)
    return {
        "baseline": baseline.name,
        "num_questions": num_questions,
        "runs": rows,
        "items": [_describe_item(runs, i) for i in _choose_items(runs, num_items)],
        "num_differing": sum(_is_disputed(runs, i) for i in range(num_questions)),
    }


def _summarize_run(run: ComparedRun, answers: Answers) -> dict:
    return {
        "seeds": sorted(run.folders),
        "share": estimate_accuracy(answers).to_dict(),
        "kinds": _compute_kinds(run),
        "plan": run.plan and run.plan.to_dict(),
        "depths": run.depths,
        "cost": run.cost,
        "folders": {str(seed): str(folder) for seed, folder in run.folders.items()},
    }


def _compute_difference(
    answers: Answers, base: Answers, comparisons: int, spread: Spread | None
) -> dict:
    return estimate_difference(answers, base, comparisons=comparisons, spread=spread).to_dict()


def _average_seeds(answers: Answers) -> Answers:
    """One row, the mean over seeds: runs of different seeds are paired by question alone."""
    right = answers.correct.mean(0, keepdims=True)
    return Answers(right, answers.image, answers.level, answers.ids, [0])


def _compute_kinds(run: ComparedRun) -> dict[str, float]:
    """Fraction right by kind of question, mean over seeds."""
    right: dict[str, list[bool]] = {}
    for records in run.records.values():
        for record in records:
            if record["group"] is not None:
                right.setdefault(record["group"], []).append(bool(record["correct"]))
    return {kind: sum(votes) / len(votes) for kind, votes in sorted(right.items())}


def _is_disputed(runs: Sequence[ComparedRun], item: int) -> bool:
    return len({run.is_right(item) for run in runs}) > 1


def _choose_items(runs: Sequence[ComparedRun], number: int) -> list[int]:
    """Items that most others gain over the baseline, and items that most others lose, in turn."""
    baseline, *others = runs

    gained = []
    lost = []
    for i in range(len(baseline.first_records)):
        num_right = sum(run.is_right(i) for run in others)
        if baseline.is_right(i):
            if num_right < len(others):
                lost.append((num_right, i))
        elif num_right:
            gained.append((-num_right, i))

    gained.sort()
    lost.sort()
    chosen = []
    for k in range(number):
        for side in (gained, lost):
            chosen += [i for _, i in side[k : k + 1]]

    return chosen[:number]


def _describe_item(runs: Sequence[ComparedRun], i: int) -> dict:
    question = runs[0].first_records[i]
    answers = {}
    for run in runs:
        by_seed = {}
        for seed, records in run.records.items():
            record = records[i]
            by_seed[str(seed)] = [get_answer(record), bool(record["correct"])]
        answers[run.name] = by_seed

    item = {key: question[key] for key in ITEM_KEYS}
    item["answers"] = answers
    return item


def find_images(runs: Sequence[ComparedRun], images: str | Path | None = None) -> list[ImageStore]:
    """Find where the items' images lie.

    Args:
        runs: What `read_runs` returns.
        images: A folder or archive. By default those that the runs' recipes or benchmarks name.
    """
    if images is not None:
        return [ImageStore(images)]
    stores: dict[str, ImageStore] = {}
    for run in runs:
        for place, access in _name_image_places(run):
            if Path(place).exists():
                stores[str(place)] = ImageStore(place, access)

    return list(stores.values())


def _name_image_places(run: ComparedRun) -> list[tuple[str, Access]]:
    """Folders and archives of images, and what names in the predictions may reach from there."""
    first_folder = next(iter(run.folders.values()))
    config = _read_config(first_folder) or {}
    evaluation = config.get("evaluate") or {}
    sources = evaluation.get("data") or []
    if isinstance(sources, dict):
        sources = [sources]

    places = []
    for source in sources:
        beside_the_data = str(Path(source["path"]).parent)
        images = source.get("images") or beside_the_data
        places.append((expand_path(images), Access(anywhere=source.get("anywhere") is True)))

    for result in run.results.values():
        if result.get("pictures"):
            places.append((result["pictures"], TASK_ACCESS))

    return places
