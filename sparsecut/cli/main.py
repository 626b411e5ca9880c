"""The command `sparsecut`: all commands together, and how errors are shown."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings

from ..drawing import escape_controls
from ..schema import UserError

# Importing these modules adds their commands to the app.
from . import (  # noqa: F401
    chat,
    compare,
    cost,
    demo,
    evaluate,
    models,
    recipes,
    serve,
    shapes,
    share,
    show,
    study,
    train,
)
from .app import app, echo
from .stopping import Stopped

USER_ERROR = 2  # exit code of a mistake that the user can mend


def main() -> None:
    """Run a command.

    A `UserError` is shown as one line, with exit code 2. Any other exception keeps its traceback,
    because it is a fault of ours. `--traceback` shows where a `UserError` arose, too.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    wants_traceback = "--traceback" in sys.argv[1:] or bool(os.environ.get("SPARSECUT_TRACEBACK"))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        # Their bars would fill a file with half-drawn lines; ours become lines there.
        if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
            os.environ.setdefault("SPARSECUT_DISABLE_PROGRESS_BARS", "0")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode still shows the text
    make_messages_safe()
    try:
        app(args=arguments, prog_name="sparsecut")
    except UserError as error:
        if wants_traceback:
            sys.excepthook = print_traceback
            raise
        echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(USER_ERROR)
    except Stopped as error:
        echo(str(error), err=True)
        sys.exit(error.exit_code)
    except Exception:
        sys.excepthook = print_traceback  # the app has set another one
        raise


class SafeLogRecord(logging.LogRecord):
    """A message of any library, safe for a terminal."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = escape_controls("".join(traceback.format_exception(*self.exc_info)))

    def getMessage(self) -> str:
        """The message with its arguments."""
        return escape_controls(super().getMessage())


def make_messages_safe() -> None:
    """Make warnings and what is logged safe for a terminal; a command logs nowhere else."""
    logging.setLogRecordFactory(SafeLogRecord)
    format_warning = warnings.formatwarning
    if getattr(format_warning, "is_safe", False):
        return

    def format_safely(*args, **kwargs) -> str:
        return escape_controls(format_warning(*args, **kwargs))

    format_safely.is_safe = True
    warnings.formatwarning = format_safely


def print_traceback(kind, error, frames) -> None:
    """Print the traceback of an exception, safe for a terminal."""
    sys.stderr.write(escape_controls("".join(traceback.format_exception(kind, error, frames))))
