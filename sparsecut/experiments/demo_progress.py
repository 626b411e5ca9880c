"""How far a demo is, read from the files that it leaves.

Its variants train in processes of their own. What all of them have done stands in the folder, so
one look there serves for any number of processes, and for a demo that goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..data.jsonl import read_json_lines
from ..schema import UserError, read_json_file
from .study import Study
from .study_parts import Run

# Seconds that the parts take on two cores, which decide how far the bar goes with each.
SECONDS = {"images": 10, "features": 40, "training": 45, "answers": 5}
VIEW_BYTES = 16 * 96 * 2  # patches, width and bytes of a number, of the built-in encoder
NUM_VIEWS = 5


@dataclass(frozen=True)
class DemoStep:
    """A part of a demo.

    Attributes:
        name: What it is, for people.
        seconds: How long it takes, roughly.
        fraction: How much of it is done, 0 to 1.
        note: Where it is, or what it gave.
    """

    name: str
    seconds: float
    fraction: float
    note: str = ""


def list_steps(study: Study, titles: Mapping[str, str]) -> list[DemoStep]:
    """Return every part of a demo in order, as far as its folder shows it now.

    Args:
        study: The demo as a study.
        titles: The names of its variants for people.
    """
    steps = [_look_at_images(study), _look_at_features(study)]
    for name, title in titles.items():
        steps.append(_look_at_run(study, Run(study.main, name, study.seeds[0]), title))
    return steps


def measure_done(steps: list[DemoStep]) -> float:
    """Return how much of all steps is done, 0 to 1."""
    return sum(s.seconds * s.fraction for s in steps) / sum(s.seconds for s in steps)


def _look_at_images(study: Study) -> DemoStep:
    data = Path(study.output) / "data"
    total = study.pictures.train + study.pictures.ask
    if (data / "drawn.json").is_file():
        fraction = 1.0
    else:
        number = sum(_count_files(data / split) for split in ("train", study.pictures.split))
        fraction = min(1.0, number / total)
    return DemoStep(f"draw {total:,} images", SECONDS["images"], fraction, f"{fraction:.0%}")


def _count_files(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def _look_at_features(study: Study) -> DemoStep:
    folder = Path(study.output) / "states"
    images = study.pictures.train + study.pictures.ask
    size = max((path.stat().st_size for path in folder.glob("tap-*.f16")), default=0)
    fraction = min(0.99, size / (images * NUM_VIEWS * VIEW_BYTES))
    if (folder / "index.json").is_file():
        fraction = 1.0
    name = "run the encoder, once for all variants"
    return DemoStep(name, SECONDS["features"], fraction, f"{fraction:.0%}")


def _look_at_run(study: Study, run: Run, title: str) -> DemoStep:
    """Training and answers of a variant."""
    folder = run.get_folder(study.output)
    seconds = SECONDS["training"] + SECONDS["answers"]
    if run.is_finished(study.output):
        percent = 100 * read_json_file(folder / "eval" / "result.json")["mean_over_levels"]
        return DemoStep(title, seconds, 1.0, f"{percent:.1f} % right")
    step, num_steps = _count_training_steps(study, folder)
    asked = study.pictures.ask * study.pictures.questions
    answered = _count_lines(folder / "eval" / "predictions.jsonl")
    trained = SECONDS["training"] * step / num_steps
    answers = SECONDS["answers"] * min(1.0, answered / asked)
    note = "waits"
    if answered:
        note = f"{answered:,} of {asked:,} questions answered"
    elif step or (folder / "running").is_file():
        note = f"training, step {step} of {num_steps}"
    return DemoStep(title, seconds, min(0.99, (trained + answers) / seconds), note)


def _count_training_steps(study: Study, folder: Path) -> tuple[int, int]:
    """Steps that a run has trained, and all of them."""
    done = total = 0
    for stage in study.recipe["stages"]:
        number = stage["args"]["max_steps"]
        total += number
        log = folder / stage["name"] / "log.jsonl"
        lines = _read_lines(log)
        done += lines[-1]["step"] if lines else 0
    return done, total


def _read_lines(path: Path) -> list[dict]:
    try:
        return read_json_lines(path, skip_partial=True) if path.is_file() else []
    except (UserError, OSError):  # another process is writing it just now
        return []


def _count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0
