"""What a command says when Ctrl-C, SIGTERM or a full disk stops it: what is saved, what to do."""

from __future__ import annotations

import errno
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..schema import UserError
from ..waits import Terminated, describe_place, interrupt_at_sigterm

ENDED_BY_CTRL_C = 130  # exit codes that a shell reports
ENDED_BY_SIGTERM = 143
NOTHING = "Nothing was written; the same command starts over."
GOES_ON = "Finished runs are saved in {output}; the same command does the rest."
RESTS = {  # by command: what is saved and how to go on, where it is the same for all options
    "chat": "Nothing is kept of the conversation.",
    "serve": "No request is under way.",
    "demo": GOES_ON.format(output="the folder"),
    "study": GOES_ON.format(output="the study's folder"),
    "search": GOES_ON.format(output="the study's folder"),
    "draw": "Images drawn so far are in the folder, but their records are not; the same command"
    " draws all of them.",
    "pretrain": "No backbone is whole; the same command starts over.",
    "push": "Nothing was committed to the repository unless all files had arrived; the same command"
    " pushes again.",
    "cost": "No file was written; the same command starts over.",
}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
FULL_DISK_TEXTS = ("No space left on device", "Disk quota exceeded")  # of errors without a number


class Stopped(BaseException):
    """Ctrl-C or SIGTERM has stopped a command; the message says where and how to go on.

    Attributes:
        exit_code: What the process ends with.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def stop_with_reason(command: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Raise `Stopped` where Ctrl-C or SIGTERM stops the block, and UserError where a disk is full.

    Args:
        command: The command's name.
        options: The values of its options.
    """
    with interrupt_at_sigterm():
        try:
            yield
        except (KeyboardInterrupt, InterruptedError) as error:  # the latter ends training
            raise _describe(command, options, error) from error
        except Stopped as error:  # of a command that this one has run
            cause = error.__cause__
            if cause is None:
                raise
            raise _describe(command, options, cause) from cause
        except UserError:
            raise
        except Exception as error:
            full = find_full_disk(error)
            if full is None:
                raise
            rest = describe_rest(command, options)
            raise UserError(f"{full}; free some space, or choose another disk. {rest}") from error


def _describe(command: str, options: Mapping[str, Any], error: BaseException) -> Stopped:
    is_terminated = isinstance(error, Terminated | InterruptedError)
    place = describe_place(error)
    begin = f"stopped by {'SIGTERM' if is_terminated else 'Ctrl-C'}"
    where = f" while {place}" if place else ""
    rest = describe_rest(command, options)
    exit_code = ENDED_BY_SIGTERM if is_terminated else ENDED_BY_CTRL_C
    return Stopped(f"{begin}{where}. {rest}", exit_code)


def find_full_disk(error: BaseException | None) -> str | None:
    """Say what could not be written where a full disk is behind an error; None where none is."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL_DISK or any(text in str(error) for text in FULL_DISK_TEXTS):
            file = getattr(error, "filename", None)
            return f"the disk of {file} is full" if file else f"a disk is full ({error})"
        error = error.__cause__ or error.__context__
    return None


def describe_rest(command: str, options: Mapping[str, Any]) -> str:
    """Return what a stopped command has saved, and how to go on.

    Args:
        command: The command's name.
        options: The values of its options.
    """
    if command == "train" and not (options.get("check") or options.get("dry_run")):
        return _describe_training(options)
    if command == "eval":
        return _describe_evaluation(options)
    if command == "study" and (options.get("dry_run") or options.get("report")):
        return NOTHING
    return RESTS.get(command, NOTHING)


def _describe_training(options: Mapping[str, Any]) -> str:
    """What of a run is on disk: its stages that are whole, and the last checkpoint."""
    if "sparsecut.training.stages" not in sys.modules:  # it was being imported, which takes long
        return NOTHING
    from ..config.recipe import load_recipe
    from ..config.yaml_io import expand_path
    from ..training.checkpoints import last_checkpoint
    from ..training.run_dir import count_finished_stages

    recipe = load_recipe(options["recipe"], options["overrides"] or [])
    output = Path(expand_path(recipe.output))
    num_finished = count_finished_stages(recipe, output)
    saved = [f"stage {stage.name}" for stage in recipe.stages[:num_finished]]
    if num_finished < len(recipe.stages):
        checkpoint = last_checkpoint(output / recipe.stages[num_finished].name)
        saved += [f"{checkpoint.name} of stage {checkpoint.parent.name}"] if checkpoint else []
    if not saved:
        return f"No stage or checkpoint is saved yet. Start over: {repeat_command('--overwrite')}"
    return f"Saved in {output}: {', '.join(saved)}. Go on with: {repeat_command('--resume')}"


def _describe_evaluation(options: Mapping[str, Any]) -> str:
    if options["out"] is None:
        return "Nothing is saved; with --out FOLDER a stopped evaluation goes on where it was."
    command = repeat_command(without="--fresh")
    return f"Answers so far are saved in {options['out']}. Go on with: {command}"


def repeat_command(more: str = "", without: str = "") -> str:
    """Return the command that was typed, with another option, or without one."""
    left_out = {"--resume", "--overwrite"} if more else {without}
    words = [word for word in sys.argv[1:] if word not in left_out]
    return shlex.join(["sparsecut", *words, *([more] if more else [])])
