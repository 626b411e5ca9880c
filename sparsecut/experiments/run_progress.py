"""How far runs are that other processes train, by the logs that they write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.jsonl import read_json_lines
from ..schema import UserError
from .study import Study
from .study_parts import Run


def describe_progress(study: Study, run: Run) -> str:
    """Describe a run in progress: its stage, step and loss, from the log it writes."""
    folder = run.get_folder(study.output)
    for stage in reversed(study.get_recipe(run).stages):
        path = folder / stage.name / "log.jsonl"
        if not path.is_file():
            continue
        lines = read_json_lines(path, skip_partial=True)
        if lines:
            step = lines[-1]["step"]
            loss = lines[-1]["loss"]
            num_steps = stage.args.get("max_steps", "?")
            return f"{stage.name} {step}/{num_steps} loss {loss:.2f}"

    return "loading"


def count_training_steps(study: Study, runs: Sequence[Run]) -> tuple[int, int | None]:
    """Return the steps that runs have trained, and all of them; None where nobody knows.

    That a run is evaluated counts for nothing, so the last steps seem to take longer.
    """
    done = total = 0
    for run in runs:
        is_finished = run.is_finished(Path(study.output))
        for stage in study.get_recipe(run).stages:
            steps = stage.args.get("max_steps")
            if not isinstance(steps, int):
                return 0, None
            total += steps
            done += steps if is_finished else _read_step(run.get_folder(study.output) / stage.name)
    return done, total


def _read_step(folder: Path) -> int:
    try:
        lines = read_json_lines(folder / "log.jsonl", skip_partial=True)
    except (UserError, OSError):  # not begun, or being written just now
        return 0
    return lines[-1]["step"] if lines else 0
