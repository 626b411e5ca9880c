"""The command `sparsecut`: all commands together, and how errors are shown."""

from __future__ import annotations

import os
import sys

import typer

from ..schema import UserError

# Importing these modules adds their commands to the app.
from . import chat, compare, cost, demo, evaluate, models, serve, shapes, show, study, train  # noqa: F401
from .app import app

USER_ERROR = 2  # exit code of a mistake that the user can mend
ENDED_BY_SIGTERM = 143  # exit code that a shell reports for it


def main() -> None:
    """Run a command.

    A `UserError` is shown as one line, with exit code 2. Any other exception keeps its traceback,
    because it is a fault of ours. `--traceback` shows where a `UserError` arose, too.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    wants_traceback = "--traceback" in sys.argv[1:] or bool(os.environ.get("SPARSECUT_TRACEBACK"))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode still shows the text
    try:
        app(args=arguments, prog_name="sparsecut")
    except (UserError, InterruptedError) as error:
        if wants_traceback:
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(ENDED_BY_SIGTERM if isinstance(error, InterruptedError) else USER_ERROR)
