"""How far runs are that other processes train, by the logs that they write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.jsonl import read_json_lines
from ..schema import UserError
from .study import Study
from .study_parts import Run


class RunProgress:
    """How far the runs of a study are.

    The recipes of all runs are read once: a study is looked at every few seconds, for hours.
    """

    def __init__(self, study: Study, runs: Sequence[Run]):
        self.output = Path(study.output)
        self._steps = {run: _list_steps(study, run) for run in runs}

    def describe(self, run: Run) -> str:
        """Describe a run in progress: its stage, step and loss, from the log it writes."""
        folder = run.get_folder(self.output)
        for stage, num_steps in reversed(self._steps[run].items()):
            line = _read_last_line(folder / stage)
            if line:
                steps = "?" if num_steps is None else num_steps
                return f"{stage} {line['step']}/{steps} loss {line['loss']:.2f}"
        return "loading"

    def count_steps(self) -> tuple[int, int | None]:
        """Return the steps that the runs have trained, and all of them; None where nobody knows.

        That a run is evaluated counts for nothing, so the last steps seem to take longer.
        """
        done = total = 0
        for run, stages in self._steps.items():
            is_finished = run.is_finished(self.output)
            for stage, num_steps in stages.items():
                if num_steps is None:
                    return 0, None
                total += num_steps
                if is_finished:
                    done += num_steps
                else:
                    line = _read_last_line(run.get_folder(self.output) / stage)
                    done += line["step"] if line else 0
        return done, total


def _list_steps(study: Study, run: Run) -> dict[str, int | None]:
    """The stages of a run, and how many steps each has; None where epochs are given."""
    steps = {}
    for stage in study.get_recipe(run).stages:
        number = stage.args.get("max_steps")
        steps[stage.name] = number if isinstance(number, int) else None
    return steps


def _read_last_line(folder: Path) -> dict | None:
    """The last line of a stage's log; None where it has not begun, or is being written."""
    try:
        lines = read_json_lines(folder / "log.jsonl", skip_partial=True)
    except (UserError, OSError):
        return None
    return lines[-1] if lines else None
