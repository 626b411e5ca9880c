"""A program that runs commands and stops them at a step; each command is a fork.

python tests/helpers/stopped.py

It reads lines of JSON with `words` (the command's), `folder` (where it runs), `event` (the number
of the event at which the signal arrives; 0 for none) and `signal`. An event is the begin of a step,
or an item that is done. The signal goes to the whole process group, as a terminal's Ctrl-C does. It
answers with JSON: `code`, `error` (stderr), `events`, `seconds` (from the signal to the end),
`left` (processes that still run).
"""

import gc
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil

from sparsecut.cli.main import main as run_command
from sparsecut.waits.display import Display
from sparsecut.waits.step import Step

IMPORTED = (  # once, not by every command
    *("building", "conversion.checkpoint", "evaluation.ablation", "evaluation.evaluator"),
    *("reports.ablation", "shapes.questions", "training.stages", "training.preview", "upgrading"),
)


def count_events(folder: Path, event: int, number: int) -> None:
    """Have every event counted, and the signal sent at one of them."""
    state = {"events": 0}

    def note() -> None:
        state["events"] += 1
        (folder / "events").write_text(str(state["events"]))
        if state["events"] == event:
            (folder / "time").write_text(str(time.time()))
            os.killpg(0, number)

    for owner, name in ((Display, "begin"), (Step, "_move")):
        wrap(owner, name, note)


def wrap(owner, name: str, note) -> None:
    """Have `note` called after a method, where a signal does not meet a half-made step."""
    original = getattr(owner, name)

    def changed(*args, **settings):
        result = original(*args, **settings)
        note()
        return result

    setattr(owner, name, changed)


def run(task: dict, folder: Path) -> None:
    """Run a command in this process, which ends with it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(task["folder"])
    count_events(folder, task["event"], getattr(signal, task["signal"]))
    sys.argv = ["sparsecut", *task["words"]]
    code = 0
    try:
        run_command()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def find_left(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = os.getsid(process.pid) == session
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def main() -> None:
    """Do what the lines of the input ask for."""
    for name in IMPORTED:
        importlib.import_module(f"sparsecut.{name}")
    gc.freeze()
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        task = json.loads(line)
        for name in ("events", "time"):
            (folder / name).unlink(missing_ok=True)
        child = os.fork()
        if not child:
            run(task, folder)
        _, status = os.waitpid(child, 0)
        end = time.time()
        time_file = folder / "time"
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            "error": (folder / "stderr").read_text(),
            "events": int((folder / "events").read_text()) if (folder / "events").exists() else 0,
            "seconds": end - float(time_file.read_text()) if time_file.exists() else None,
            "left": find_left(child),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
