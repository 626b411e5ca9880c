"""Runs a study: what runs have in common once, then every run in one of several processes.

A study's output folder holds:

    study.yaml               the study as it ran; running it again goes on where it stopped
    data/                    the images of the built-in shapes, if the study draws them
    states/                  the encoder's features of all images
    costs.json               what each variant costs, at the study's own size and at a large one
    runs/BUDGET/VARIANT/SEED/    one run: what training writes, eval/ with its answers, facts.json
    report.html, .md, .json  the comparison, which `sparsecut.reports` writes

A run that is in progress has a file `running`, one that failed has `failed.txt`. One process at a
time prepares a study. Then any number of processes, also of several machines on one disk, may work
on it: a run belongs to the process that has its folder (`config.folder_lock`). The others wait for
it, and take it over where its process is gone.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..config.folder_lock import LOCK, lock_folder
from ..config.paths import check_replaceable, check_writable_folder
from ..data.jsonl import read_json_lines
from ..schema import UserError, read_json_file, write_text_file
from .preparation import Log, prepare
from .study import Run, Study, dump_study, load_study, narrow_study

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 30  # about runs in progress
SECONDS_BETWEEN_CLAIMS = 2  # of a run that another process has
SECONDS_TO_TRUST = 600  # an old version's file `running` of another host, which it never renews
WRITTEN = (
    *("states", "runs", "costs.json", "inputs.json", "report.*", "worker-*.txt"),
    *("search.json", "plan.yaml"),
)
LINES_SHOWN = 12  # of the log of a process that stopped


class StudyRunError(UserError):
    """Some runs of a study failed; all others are finished."""


def run_study(
    study: Study,
    *,
    workers: int = 2,
    variants: Sequence[str] = (),
    seeds: Sequence[int] = (),
    log: Log = print,
) -> Path:
    """Do what is left of a study.

    Args:
        study: The study; its `output` folder is made, or gone on with.
        workers: Processes on this machine, one thread each; 0 runs everything in this process.
        variants: Only these now; an empty list means all.
        seeds: Only these now; an empty list means all.
        log: Takes lines about the progress.

    Returns:
        The study's folder.

    Raises:
        UserError: The folder holds another study, or a variant cannot be built. Nothing is trained
            then.
        StudyRunError: Some runs failed; it is raised when all others are done.
        ChildProcessError: A process of the study stopped.
    """
    out = Path(study.output)
    part = narrow_study(study, variants, seeds)
    check_writable_folder(out)
    check_folder(study, out)
    with lock_folder(out):
        check_folder(study, out)  # another process may have begun one meanwhile
        dump_study(study, out / "study.yaml")
        prepare(study, log)
    runs = part.list_runs()
    pending = [run for run in runs if not run.is_finished(out)]
    log(
        f"{len(runs)} runs: {len(runs) - len(pending)} finished, {len(pending)} to do in"
        f" {max(workers, 1)} processes"
    )

    for run in pending:
        (run.get_folder(out) / "failed.txt").unlink(missing_ok=True)

    if pending and workers:
        _supervise(part, out, min(workers, len(pending)), log)
    elif pending:
        work(out, variants, seeds, log=log)

    _check_failures(runs, out)
    return out


def _check_failures(runs: Sequence[Run], out: Path) -> None:
    """Raise StudyRunError, with the end of the first error, where runs failed."""
    names = []
    reports = []
    for run in runs:
        report = run.get_folder(out) / "failed.txt"
        if report.is_file():
            names.append(str(run))
            reports.append(report)

    if not reports:
        return

    error = reports[0].read_text(encoding="utf-8").strip()
    reason = error.splitlines()[-1]
    raise StudyRunError(
        f"{len(names)} runs failed ({', '.join(names)}); the first reports: {reason}; see"
        f" {reports[0]}, correct it and run again; finished runs are not repeated"
    )


def check_folder(study: Study, out: Path) -> None:
    """Refuse a folder that holds a study with other data, training or meaning of a variant.

    Raises:
        UserError: The message names the keys that differ, or files of something else that would be
            replaced.
    """
    written = [*WRITTEN, "data"] if study.pictures else WRITTEN
    check_replaceable(out, written, "study.yaml")
    if not (out / "study.yaml").is_file():
        return
    before = load_study(out / "study.yaml")

    changed = []
    for key in ("recipe", "pictures"):
        if getattr(before, key) != getattr(study, key):
            changed.append(key)

    for name, spec in before.arms.items():
        if study.arms.get(name, spec) != spec:
            changed.append(f"arms.{name}")

    for name, budget in before.budgets.items():
        if study.budgets.get(name, budget).change != budget.change:
            changed.append(f"budgets.{name}")

    if changed:
        raise UserError(
            f"{out} holds another study (it differs in {', '.join(changed)}), whose results would"
            " be taken for this one's; choose another folder (output=...) or remove this one"
        )


def _supervise(study: Study, out: Path, workers: int, log: Log) -> None:
    """Start the processes, report what they finish, and wait for them."""
    processes = []
    try:
        for number in range(workers):
            processes.append(_start_process(study, out, number))
        _watch(study, out, processes, log)
    finally:
        for process in processes:
            process.terminate()

    exit_codes = [process.wait() for process in processes]
    if not any(_is_left(run, out) for run in study.list_runs()):
        return  # others have done the runs of a process that was killed
    for number, exit_code in enumerate(exit_codes):
        if exit_code not in (0, -15):
            lines = _get_log_path(out, number).read_text(encoding="utf-8").splitlines()
            end = "\n".join(lines[-LINES_SHOWN:])
            raise ChildProcessError(
                f"a process of the study stopped with exit code {exit_code}; the end of its log:\n"
                f"{end}"
            )


def _start_process(study: Study, out: Path, number: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "sparsecut.experiments.runner", str(out)]
    command += [f"variant={name}" for name in study.arms]
    command += [f"seed={seed}" for seed in study.seeds]
    command += [f"parent={os.getpid()}"]
    with _get_log_path(out, number).open("w", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def _get_log_path(out: Path, number: int) -> Path:
    return out / f"worker-{number}.txt"


def _watch(study: Study, out: Path, processes: list[subprocess.Popen], log: Log) -> None:
    """Log every run that is finished, and now and then what the others are doing."""
    runs = study.list_runs()
    reported = {run for run in runs if run.is_finished(out)}
    last_line = time.monotonic()

    while any(process.poll() is None for process in processes):
        time.sleep(SECONDS_BETWEEN_LOOKS)

        for run in runs:
            if run not in reported and run.is_finished(out):
                reported.add(run)
                log(f"{len(reported)}/{len(runs)}  {_describe_scores(run, out)}")

        if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            _log_progress(study, runs, out, log)


def _log_progress(study: Study, runs: Sequence[Run], out: Path, log: Log) -> None:
    parts = []
    for run in runs:
        is_claimed = (run.get_folder(out) / "running").is_file()
        if is_claimed and not run.is_finished(out):
            progress = describe_progress(study, run)
            parts.append(f"{run.variant} {progress}")

    if parts:
        log("  " + "   ".join(parts))


def _describe_scores(run: Run, out: Path) -> str:
    path = run.get_folder(out) / "eval" / "result.json"
    result = read_json_file(path)
    name = f"{run.budget} {run.variant} seed {run.seed}"
    if not result["levels"]:
        percent = 100 * result["accuracy"]
        return f"{name}: {percent:.1f} %"

    levels = []
    for level, row in result["levels"].items():
        percent = 100 * row["accuracy"]
        levels.append(f"{level} {percent:.1f}")

    percent = 100 * result["mean_over_levels"]
    return f"{name}: {percent:.1f} % ({', '.join(levels)})"


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


def work(
    out: Path, variants: Sequence[str] = (), seeds: Sequence[int] = (), log: Log = print
) -> None:
    """Take one run after the other until none is left; what each process of a study does."""
    import torch

    torch.set_num_threads(1)
    study = load_study(out / "study.yaml")
    runs = narrow_study(study, variants, seeds).list_runs()

    said = False
    while True:
        for run in runs:
            if _is_left(run, out):
                _do_run(study, run, runs, log)
        left = [run for run in runs if _is_left(run, out)]
        if not left:
            return
        if not said:
            log(f"waiting for {len(left)} runs that other processes have, such as {left[0]}")
            said = True
        time.sleep(SECONDS_BETWEEN_CLAIMS)


def _is_left(run: Run, out: Path) -> bool:
    return not run.is_finished(out) and not (run.get_folder(out) / "failed.txt").is_file()


def _do_run(study: Study, run: Run, runs: Sequence[Run], log: Log) -> None:
    """Train and evaluate a run, unless a living process has it."""
    out = Path(study.output)
    folder = run.get_folder(out)
    with claim(folder) as is_ours:
        if not is_ours or not _is_left(run, out):  # another process may have done it just now
            return
        try:
            train_and_evaluate(study, run)
            num_finished = sum(other.is_finished(out) for other in runs)
            log(f"{num_finished}/{len(runs)}  {_describe_scores(run, out)}")
        except Exception:
            write_text_file(folder / "failed.txt", traceback.format_exc())


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Make a run this process's own inside the block; yields False where a living process has it."""
    with ExitStack() as stack:
        is_new = not (folder / LOCK).exists()
        try:
            stack.enter_context(lock_folder(folder))
        except UserError:
            yield False
            return
        mark = folder / "running"
        if is_new and _is_owner_alive(mark):
            yield False
            return
        mark.write_text(f"{socket.gethostname()} {os.getpid()}", encoding="utf-8")
        try:
            yield True
        finally:
            mark.unlink(missing_ok=True)


def _is_owner_alive(mark: Path) -> bool:
    """Whether a process of an old version, which locks no folder, may still have a run.

    Such a process never renews its file `running`. So one of another host counts as alive for a
    while only.
    """
    import psutil

    try:
        age = time.time() - mark.stat().st_mtime
        host, pid = mark.read_text(encoding="utf-8").split()
        if host == socket.gethostname():
            return psutil.Process(int(pid)).create_time() < mark.stat().st_mtime
    except (OSError, ValueError, OverflowError, psutil.Error):  # gone, or not written whole
        return False
    return age < SECONDS_TO_TRUST


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended, even if that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_and_evaluate(study: Study, run: Run) -> None:
    """Train and evaluate one run, from the start or from its last whole stage."""
    from ..evaluation.evaluator import evaluate_recipe, evaluation_examples
    from ..training.stages import open_feature_cache, train

    recipe = study.get_recipe(run)
    folder = run.get_folder(study.output)
    model, processor = train(recipe, resume=True)
    features = open_feature_cache(recipe, model, processor, evaluation_examples(recipe))
    result = evaluate_recipe(recipe, model, processor, resume=True, feature_cache=features)

    train_seconds = 0.0
    for stage in recipe.stages:
        train_seconds += read_json_lines(folder / stage.name / "log.jsonl")[-1]["seconds"]

    facts = {
        "arm": run.variant,
        "budget": run.budget,
        "seed": run.seed,
        "plan": model.plan.to_dict(),
        "depths": [model.config.vision_depth, model.config.language_depth],
        "parameters": model.count_parameters(),
        "image_tokens": processor.num_image_tokens,
        "views": processor.num_views,
        "train_seconds": train_seconds,
        "eval_seconds": result["seconds"],
    }
    _remove_stage_models(recipe, folder)
    write_text_file(folder / "facts.json", json.dumps(facts, indent=1))  # last: the run is finished


def _remove_stage_models(recipe, folder: Path) -> None:
    """Remove the weights of all stages but the last, which would be most of a study's size."""
    for stage in recipe.stages[:-1]:
        for weights in (folder / stage.name).glob("*.safetensors"):
            weights.unlink()


def _parse_arguments(arguments: Sequence[str]) -> tuple[Path, list[str], list[int], int | None]:
    """The folder, variants, seeds and parent from `FOLDER variant=NAME ... seed=NUMBER ...`."""
    folder, *pairs = arguments

    variants = []
    seeds = []
    parent = None
    for pair in pairs:
        name, value = pair.split("=", 1)
        if name == "variant":
            variants.append(value)
        elif name == "seed":
            seeds.append(int(value))
        else:
            parent = int(value)

    return Path(folder), variants, seeds, parent


def main(arguments: Sequence[str]) -> None:
    """Work on a study, as `run_study` starts it."""
    out, variants, seeds, parent = _parse_arguments(arguments)
    if parent is not None and os.name == "posix":
        _end_with(parent)
    work(out, variants, seeds)


if __name__ == "__main__":
    main(sys.argv[1:])
