"""Checkpoints inside a stage's folder: which are complete, intact, and can be continued.

A checkpoint gets the file BEGUN first and the file WHOLE last. One that has neither is not ours to
remove. WHOLE says how large the batches were, and holds a digest of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..schema import UserError, read_json_file

BEGUN = "unfinished"  # the marker of a checkpoint that is being written
WHOLE = "whole.json"  # the marker of a complete one
STATE = "trainer_state.json"
GIB = 2**30
MIB = 2**20
DIGESTED_WHOLE = 64 * MIB  # of larger files, samples are digested
NUM_SAMPLES = 1024
STATE_TYPES = {  # of the Trainer's state, which takes anything and stumbles over it later
    ("global_step", "max_steps"): int,
    ("train_batch_size", "best_global_step"): int | None,
    ("epoch", "best_metric", "logging_steps", "eval_steps", "save_steps"): int | float | None,
    ("best_model_checkpoint",): str | None,
    ("log_history",): list,
    ("stateful_callbacks",): dict,
}
SAMPLE_BYTES = 4096


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """Return step -> folder of a stage's checkpoints, complete or not."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        # Users keep copies under longer names, such as checkpoint-200-good.
        match = re.fullmatch(r"checkpoint-([1-9]\d*)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint of a stage, None where there is none."""
    complete = [path for path in find_checkpoints(folder).values() if (path / WHOLE).is_file()]
    return complete[-1] if complete else None


def check_known(folder: Path) -> None:
    """Raise UserError where a checkpoint of a stage does not say whether it is complete."""
    for path in find_checkpoints(folder).values():
        if (path / WHOLE).is_file() or (path / BEGUN).is_file():
            continue
        # Files written before had no BEGUN; there, the state was written last but for WHOLE.
        if (path / STATE).is_file():
            raise UserError(
                f"the checkpoint {path} has lost its {WHOLE}, so it may be damaged; remove or"
                f" rename that folder, and go on with --resume from {_name_previous(path)}"
            )


def remove_incomplete(folder: Path) -> None:
    """Remove what was being written when a stage ended; `check_known` has seen the folder."""
    for path in find_checkpoints(folder).values():
        if not (path / WHOLE).is_file():
            shutil.rmtree(path)


def remove_old(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints, so that so many are left, the last and the best among them.

    Args:
        folder: The stage's folder.
        limit: How many stay; None or less than 1 keeps all. The last one and the best one stay
            anyway.
        best: The checkpoint with the best model, None where no model is the best.
    """
    if limit is None or limit < 1:
        return
    older = list(find_checkpoints(folder).values())[:-1]
    best_name = None if best is None else Path(best).name
    others = [path for path in older if path.name != best_name]
    num_kept = max(limit - 1 - (len(older) - len(others)), 0)
    for path in others[: len(others) - num_kept]:
        shutil.rmtree(path)


def mark_begun(checkpoint: Path) -> None:
    """Make a checkpoint's folder, and mark it as being written."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / WHOLE).unlink(missing_ok=True)
    (checkpoint / BEGUN).touch()


def mark_complete(checkpoint: Path, batch_facts: dict) -> None:
    """Write a checkpoint's marker, once everything else of it is on disk.

    Args:
        checkpoint: Its folder.
        batch_facts: What a continuation must agree with, see `StageTrainer.batch_facts`.
    """
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != BEGUN:
            _flush_to_disk(path)
            files[path.relative_to(checkpoint).as_posix()] = digest_file(path)
    part = checkpoint / f"{WHOLE}.part"
    part.write_text(json.dumps({**batch_facts, "files": files}) + "\n", encoding="utf-8")
    _flush_to_disk(part)
    part.replace(checkpoint / WHOLE)
    (checkpoint / BEGUN).unlink()


def digest_file(path: Path, num_samples: int = NUM_SAMPLES) -> str:
    """Return a digest of a file: of its size and all bytes or, where they are many, of samples.

    Args:
        path: The file.
        num_samples: Places of a large file that are read, 4 KiB each.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= DIGESTED_WHOLE:
            digest.update(file.read())
            return digest.hexdigest()
        for number in range(num_samples):
            file.seek((size - SAMPLE_BYTES) * number // (num_samples - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def check_intact(checkpoint: Path) -> None:
    """Check that a complete checkpoint can be continued as if nothing had been between.

    Raises:
        UserError: A file of it was lost or damaged, or it was written without its optimizer.
    """
    try:
        facts = read_json_file(checkpoint / WHOLE)
        _check_facts(facts, checkpoint)
        _check_state(checkpoint)
        _check_files(checkpoint, facts)
    except (UserError, OSError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {checkpoint} is damaged: {error}; remove or rename that folder, and go"
            f" on with --resume from {_name_previous(checkpoint)}"
        ) from error


def _name_previous(checkpoint: Path) -> str:
    """What a run continues from without a checkpoint."""
    steps = find_checkpoints(checkpoint.parent)
    for path in reversed(steps.values()):
        if (path / WHOLE).is_file() and _get_step(path) < _get_step(checkpoint):
            return f"{path.name}, the one before it"
    return "the stage's beginning, because there is none before it"


def _get_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _check_facts(facts: dict, checkpoint: Path) -> None:
    for name in ("global_batch", "processes"):
        value = facts.get(name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{checkpoint / WHOLE} has {name}: {value!r}, not a number of records")


def _check_state(checkpoint: Path) -> None:
    """Raise UserError where the Trainer's state is not that of the checkpoint's step."""
    from transformers import TrainerState  # takes seconds, and a run's folder is looked at first

    state = read_json_file(checkpoint / STATE)
    try:
        loaded = TrainerState(**state)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{STATE} holds something else than a state: {error}") from error
    for names, kinds in STATE_TYPES.items():
        for name in names:
            value = getattr(loaded, name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise UserError(f"{STATE} has {name}: {value!r}")
    step = _get_step(checkpoint)
    if loaded.global_step != step:
        raise UserError(f"{STATE} is of step {loaded.global_step}, but the folder of step {step}")


def _check_files(checkpoint: Path, facts: dict) -> None:
    """Raise UserError unless every file is what was written, and none that matters is missing."""
    files = facts.get("files")
    if isinstance(files, dict):
        for name, digest in files.items():
            path = checkpoint / name
            if not path.is_file():
                raise UserError(f"{name} is missing")
            if digest_file(path) != digest:
                raise UserError(f"{name} is not what was written")
    _check_weight_files(checkpoint)
    for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
        if not zipfile.is_zipfile(file):
            raise UserError(f"{file.name} is not what torch has saved")
    _check_optimizer_files(checkpoint)
    _check_random_states(checkpoint, facts["processes"])


def _check_weight_files(checkpoint: Path) -> None:
    """Open every file of weights without reading it; the format knows how long it is."""
    weights = list(checkpoint.rglob("*.safetensors"))
    has_folders = any(path.is_dir() for path in checkpoint.iterdir())
    if not weights and not has_folders:
        raise UserError("it holds no weights")
    for file in weights:
        with safe_open(file, "pt"):
            pass


def _check_optimizer_files(checkpoint: Path) -> None:
    """Raise UserError where the optimizer or the schedule would start anew.

    FSDP calls the optimizer's file optimizer.bin, or has a folder of its pieces. DeepSpeed has one
    folder for the optimizer and, where it is its own, the schedule.
    """
    folders = [path.name for path in checkpoint.iterdir() if path.is_dir()]
    if any(name.startswith("global_step") for name in folders):
        return
    has_pieces = any(name.startswith("optimizer") for name in folders)
    has_file = any((checkpoint / f"optimizer.{ending}").is_file() for ending in ("pt", "bin"))
    has_scheduler = (checkpoint / "scheduler.pt").is_file()
    if has_pieces or has_file:
        if not has_scheduler:
            raise UserError("scheduler.pt is missing, so the schedule would start anew")
    elif has_scheduler:
        raise UserError("optimizer.pt is missing, so the optimizer would start anew")
    else:
        raise UserError(
            "it has neither optimizer.pt nor scheduler.pt, as save_only_model leaves it, so the"
            " optimizer and the schedule would start anew"
        )


def _check_random_states(checkpoint: Path, num_processes: int) -> None:
    """Raise UserError where a random state of a process is missing."""
    names = [f"rng_state_{number}.pth" for number in range(num_processes)]
    if num_processes == 1:
        names = ["rng_state.pth"]
    for name in names:
        if not (checkpoint / name).is_file():
            raise UserError(f"{name} is missing, so random numbers would differ")


def check_same_batches(checkpoint: Path, batch_facts: dict) -> None:
    """Raise UserError where a run would continue a checkpoint with batches of another size."""
    before = read_json_file(checkpoint / WHOLE)
    if before["global_batch"] != batch_facts["global_batch"]:
        raise UserError(
            f"{checkpoint} was written with {before['global_batch']} records a step"
            f" ({before['processes']} processes), but now a step has"
            f" {batch_facts['global_batch']} ({batch_facts['processes']} processes), so records"
            " would be missed or seen twice; keep per_device_train_batch_size x"
            " gradient_accumulation_steps x processes as it was"
        )


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Raise UserError where the disk of a folder lacks room for so many bytes of checkpoints."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise UserError(
            f"a checkpoint takes about {num_bytes / GIB:.2f} GiB, but {place} has"
            f" {free / GIB:.2f} GiB free; free some space, choose another disk (output=...), or"
            " keep fewer checkpoints (args: save_total_limit, save_only_model)"
        )


def discard_checkpoint(checkpoint: Path, error: Exception) -> OSError:
    """Remove a checkpoint that could not be written.

    Args:
        checkpoint: Its folder.
        error: What went wrong.

    Returns:
        An error to raise, which names the last complete checkpoint.
    """
    shutil.rmtree(checkpoint, ignore_errors=True)
    previous = last_checkpoint(checkpoint.parent)
    left = f"the last complete one is {previous}" if previous else "there is none before it"
    free = shutil.disk_usage(checkpoint.parent).free
    return OSError(
        f"stage {checkpoint.parent.name}: {checkpoint.name} could not be written ({error};"
        f" {free / GIB:.2f} GiB are free on that disk); {left}; make room and go on with --resume"
    )
