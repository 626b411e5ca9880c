"""Runs a study: what runs have in common once, then every run in one of several processes.

A study's output folder holds:

    study.yaml               the study as it ran; running it again goes on where it stopped
    data/                    the images of the built-in shapes, if the study draws them
    states/                  the encoder's features of all images
    costs.json               what each variant costs, at the study's own size and at a large one
    text_baseline.json       the commonest answers to the texts of the test questions
    rates/VARIANT/RATE/SEED/     a run on the dev part, by which a variant's fusion rate is chosen
    runs/BUDGET/VARIANT/SEED/    one run: what training writes, eval/ with its answers, facts.json
    report.html, .md, .json  the comparison, which `sparsecut.reports` writes

A run that is in progress has a file `running`, one that failed has `failed.txt`. One process at a
time prepares a study. Then any number of processes, also of several machines on one disk, may work
on it: a run belongs to the process that has its folder (`config.folder_lock`). The others wait for
it, and take it over where its process is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from ..config.folder_lock import lock_folder
from ..config.paths import check_replaceable, check_writable_folder
from ..data.kept_records import keep_records
from ..schema import UserError, read_json_file, write_text_file
from ..waits import show_step
from .claims import claim
from .preparation import Log, prepare
from .run_progress import RunProgress
from .single_run import run_to_end
from .study import Study, dump_study, load_study, narrow_study
from .study_parts import DIVERGED, Run

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_NOTES = 3  # about runs in progress
SECONDS_TO_END = 4  # for a process that is asked to; then it is killed
SECONDS_BETWEEN_CLAIMS = 2  # of a run that another process has
WRITTEN = (
    *("states", "runs", "rates", "text_baseline.json", "costs.json", "inputs.json"),
    *("report.*", "worker-*.txt", "search.json", "plan.yaml"),
)
STARTED = ("runs", "rates", "worker-*.txt")  # what there is once runs have been started
FAILED = "failed.txt"
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
        if not _has_started(out):
            for name in ("costs.json", "text_baseline.json"):  # perhaps of other models or data
                (out / name).unlink(missing_ok=True)
        dump_study(study, out / "study.yaml")
        prepare(study, log)
    runs = part.list_runs()
    pending = [run for run in runs if not run.is_finished(out)]
    log(
        f"{len(runs)} runs: {len(runs) - len(pending)} finished, {len(pending)} to do in"
        f" {max(workers, 1)} processes"
    )

    for run in pending:
        (run.get_folder(out) / FAILED).unlink(missing_ok=True)

    if pending and workers:
        parts = [f"variant={name}" for name in variants] + [f"seed={seed}" for seed in seeds]
        _supervise(part, out, min(workers, len(pending)), parts, log)
    elif pending:
        work(out, variants, seeds, log=log)

    _check_failures(runs, out)
    return out


def _check_failures(runs: Sequence[Run], out: Path) -> None:
    """Raise StudyRunError, with the end of the first error, where runs failed."""
    names = []
    reports = []
    for run in runs:
        report = run.get_folder(out) / FAILED
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

    A study of which no run was started does not count: nothing depends on it.

    Raises:
        UserError: The message names the keys that differ, or files of something else that would be
            replaced.
    """
    written = [*WRITTEN, "data"] if study.pictures else WRITTEN
    check_replaceable(out, written, "study.yaml")
    if not (out / "study.yaml").is_file() or not _has_started(out):
        return
    before = load_study(out / "study.yaml")

    changed = []
    for key in ("recipe", "pictures"):
        if getattr(before, key) != getattr(study, key):
            changed.append(key)

    for name, spec in before.arms.items():
        if study.arms.get(name, spec) != spec:
            changed.append(f"arms.{name}")

    changed += _name_changed_rates(before, study)
    for name, budget in before.budgets.items():
        if study.budgets.get(name, budget).change != budget.change:
            changed.append(f"budgets.{name}")

    if changed:
        raise UserError(
            f"{out} holds another study (it differs in {', '.join(changed)}), whose results would"
            " be taken for this one's; choose another folder (output=...) or remove this one"
        )


def _has_started(out: Path) -> bool:
    """Whether runs of the folder's study were ever started."""
    return any(next(out.glob(pattern), None) for pattern in STARTED)


def _name_changed_rates(before: Study, study: Study) -> list[str]:
    """Keys of `rates` that finished dev runs depend on; the grid and the seeds may grow."""
    if before.rates is None or study.rates is None:
        return []
    spent = sorted(set(before.rates.seeds) & set(study.seeds))
    if spent:
        raise UserError(
            f"seeds {spent} have chosen rates in {study.output} before, so that they cannot read"
            " the test split; use other seeds"
        )
    keys = ("dev", "change")
    return [
        f"rates.{key}" for key in keys if getattr(before.rates, key) != getattr(study.rates, key)
    ]


def _supervise(study: Study, out: Path, workers: int, parts: list[str], log: Log) -> None:
    """Start the processes, report what they finish, and wait for them.

    Args:
        study: The study, or the part of it that is run.
        out: Its folder.
        workers: The number of processes.
        parts: The part's variants and seeds, as the processes take them.
        log: Takes lines about the progress.
    """
    processes = []
    try:
        for number in range(workers):
            processes.append(_start_process(out, number, parts))
        _watch(study, out, processes, log)
    finally:
        _end_processes(processes)

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


def _end_processes(processes: Sequence[subprocess.Popen]) -> None:
    """End processes that still run: a run that is trained writes a checkpoint first, if it can."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + SECONDS_TO_END
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start_process(out: Path, number: int, parts: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "sparsecut.experiments.runner", str(out), *parts]
    command += [f"parent={os.getpid()}"]
    with _get_log_path(out, number).open("w", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def _get_log_path(out: Path, number: int) -> Path:
    return out / f"worker-{number}.txt"


def _watch(study: Study, out: Path, processes: list[subprocess.Popen], log: Log) -> None:
    """Log every run that is finished, and show what the others are doing."""
    runs = study.list_runs()
    reported = {run for run in runs if run.is_finished(out)}
    progress = RunProgress(study, runs)
    last_look = -SECONDS_BETWEEN_NOTES
    with show_step(f"training and evaluating {len(runs)} runs") as step:
        while any(process.poll() is None for process in processes):
            time.sleep(SECONDS_BETWEEN_LOOKS)

            for run in runs:
                if run not in reported and run.is_finished(out):
                    reported.add(run)
                    log(f"{len(reported)}/{len(runs)}  {_describe_scores(run, out)}")

            if time.monotonic() - last_look > SECONDS_BETWEEN_NOTES:
                last_look = time.monotonic()
                step(*progress.count_steps())
                step.set_done(step.done, _describe_begun(progress, runs, out))


def _describe_begun(progress: RunProgress, runs: Sequence[Run], out: Path) -> str:
    """What is done with every run that is under way."""
    parts = []
    for run in runs:
        is_claimed = (run.get_folder(out) / "running").is_file()
        if is_claimed and not run.is_finished(out):
            parts.append(f"{run.variant} {progress.describe(run)}")
    return ", ".join(parts)


def _describe_scores(run: Run, out: Path) -> str:
    name = f"{run.budget} {run.variant} seed {run.seed}"
    if run.rate is not None:
        name = f"dev {run.variant} rate {run.rate:g} seed {run.seed}"
        if (run.get_folder(out) / DIVERGED).is_file():
            return f"{name}: the loss is not finite"
    result = read_json_file(run.get_folder(out) / "eval" / "result.json")
    if not result["levels"]:
        percent = 100 * result["accuracy"]
        return f"{name}: {percent:.1f} %"

    levels = []
    for level, row in result["levels"].items():
        percent = 100 * row["accuracy"]
        levels.append(f"{level} {percent:.1f}")

    percent = 100 * result["mean_over_levels"]
    return f"{name}: {percent:.1f} % ({', '.join(levels)})"


def work(
    out: Path, variants: Sequence[str] = (), seeds: Sequence[int] = (), log: Log = print
) -> None:
    """Take one run after the other until none is left; what each process of a study does."""
    import torch

    torch.set_num_threads(1)
    study = load_study(out / "study.yaml")
    runs = narrow_study(study, variants, seeds).list_runs()

    with keep_records():
        _work_on(study, runs, out, log)


def _work_on(study: Study, runs: Sequence[Run], out: Path, log: Log) -> None:
    said = False
    while True:
        for run in runs:
            if _is_left(run, out) and not _list_needed(study, run, out):
                _do_run(study, run, runs, log)
        left = [run for run in runs if _is_left(run, out) and not _is_blocked(study, run, out)]
        if not left:
            return
        if not said:
            log(f"waiting for {len(left)} runs that other processes have, such as {left[0]}")
            said = True
        time.sleep(SECONDS_BETWEEN_CLAIMS)


def _is_left(run: Run, out: Path) -> bool:
    return not run.is_finished(out) and not _has_failed(run, out)


def _list_needed(study: Study, run: Run, out: Path) -> list[Run]:
    """The dev runs that a run waits for, because they choose its rate."""
    if run.rate is not None:
        return []
    dev_runs = [other for other in study.list_dev_runs() if other.variant == run.variant]
    return [other for other in dev_runs if not other.is_finished(out)]


def _is_blocked(study: Study, run: Run, out: Path) -> bool:
    """Whether a run can never start, because its rate was not asked for or could not be found."""
    return any(_has_failed(other, out) for other in _list_needed(study, run, out))


def _has_failed(run: Run, out: Path) -> bool:
    return (run.get_folder(out) / FAILED).is_file()


def _do_run(study: Study, run: Run, runs: Sequence[Run], log: Log) -> None:
    """Train and evaluate a run, unless a living process has it."""
    out = Path(study.output)
    folder = run.get_folder(out)
    with claim(folder) as is_ours:
        if not is_ours or not _is_left(run, out):  # another process may have done it just now
            return
        try:
            run_to_end(study, run)
            num_finished = sum(other.is_finished(out) for other in runs)
            log(f"{num_finished}/{len(runs)}  {_describe_scores(run, out)}")
        except InterruptedError:  # a signal is no failure
            raise
        except Exception:
            write_text_file(folder / FAILED, traceback.format_exc())


def _end_with(parent: int) -> None:
    """End this process when the one that started it has ended, even if that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
    try:
        work(out, variants, seeds)
    except InterruptedError as error:
        sys.exit(f"stopped: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C")


if __name__ == "__main__":
    main(sys.argv[1:])
