"""The command `sparsecut`: all commands together, and how mistakes are shown."""

from __future__ import annotations

import os
import sys

import typer

# Importing these modules adds their commands to the app.
from . import evaluate, models, serve, study  # noqa: F401
from .app import app


def main() -> None:
    """Run a command; what a user can mend is told in one line and exit code 2."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    told = len(arguments) == len(sys.argv[1:]) and not os.environ.get("SPARSECUT_TRACEBACK")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode still shows the words
    try:
        app(args=arguments, prog_name="sparsecut")
    except (ValueError, OSError) as error:
        if not told:
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(
            143 if isinstance(error, InterruptedError) else 2
        )  # 143: ended by SIGTERM, as a shell reports it
