"""The command line's app, and the options and loading of several commands.

Nothing heavy is imported before a command runs, so that help is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from .. import __version__
from ..config.mistaken_files import check_no_file
from ..config.paths import check_writable_folder
from ..drawing import escape_controls
from ..schema import UserError
from ..shipped_model import SHIPPED_MODEL, find_shipped_model
from ..waits import pause_display, show_step
from .early_checks import check_device, check_dtype
from .stopping import stop_with_reason

if TYPE_CHECKING:
    from ..config.source import Source


def argument(
    help: str,
    metavar: str | None = None,
    complete: Callable[[str], list[str]] | None = None,
    **settings: Any,
) -> Any:
    """A positional argument of a command; `complete` gives a shell what may stand there."""
    return typer.Argument(help=help, metavar=metavar, autocompletion=complete, **settings)


def option(help: str, *names: str, **settings: Any) -> Any:
    """A named option of a command."""
    return typer.Option(*names, help=help, **settings)


def output_folder(help: str) -> Any:
    """The option --out: a folder that is checked before the command runs."""
    return typer.Option(help=help, callback=check_output_folder)


def check_output_folder(folder: Path | None) -> Path | None:
    """Check a folder that an option names for results."""
    if folder is not None:
        check_writable_folder(folder)
    return folder


def echo(text: str = "", *, nl: bool = True, err: bool = False) -> None:
    """Print text, safe for a terminal; every command prints with this.

    Args:
        text: What to print.
        nl: End the line.
        err: Print to stderr.
    """
    with pause_display():
        typer.echo(escape_controls(text), nl=nl, err=err)


def print_marked(pieces: Sequence[tuple[str, bool]]) -> None:
    """Print text of which some pieces are marked: green on a terminal, [[so]] elsewhere.

    Args:
        pieces: Text, and whether it is marked.
    """
    from rich.console import Console
    from rich.text import Text as RichText

    console = Console()
    has_colour = console.is_terminal and not console.no_color
    shown = RichText()
    for text, is_marked in pieces:
        text = escape_controls(text)
        if is_marked and not has_colour:
            text = f"[[{text}]]"
        shown.append(text, style="bold green" if is_marked else None)
    if has_colour:
        with pause_display():
            console.print(shown)
    else:
        echo(shown.plain)  # whole lines: a file has no width


Text = str | None
Number = int | None
File = Path | None


def find_model(name: str, command: str) -> str:
    """Return the place of a model that is named.

    Args:
        name: A folder, a hub name, or the shipped model's name.
        command: The command that takes it, for the line that an error shows.

    Raises:
        UserError: The name is that of a file, most often because the model was left out.
    """
    check_no_file(name, command)
    return str(find_shipped_model(name))


def _find_typed_model(context: typer.Context, name: str | None) -> str | None:
    return None if name is None else find_model(name, context.command_path.partition(" ")[2])


WHAT_A_MODEL_IS = f"A saved model's folder, its hub name, or {SHIPPED_MODEL}"
SavedModel = Annotated[
    str,
    argument(f"{WHAT_A_MODEL_IS}, which ships.", "MODEL", callback=_find_typed_model),
]
OptionalModel = Annotated[
    Text,
    argument(f"{WHAT_A_MODEL_IS}, which ships (default).", "[MODEL]", callback=_find_typed_model),
]
MethodOptions = Annotated[
    list[str] | None,
    option("An option of the method, key=value; may be repeated.", "--option", "-o"),
]
Device = Annotated[
    Text,
    option(
        "Where to compute, such as cpu or cuda:0. Default: the accelerator, if any.",
        callback=check_device,
    ),
]
Dtype = Annotated[
    str,
    option(
        "Dtype of the weights: auto (as saved), bfloat16, float16 or float32.", callback=check_dtype
    ),
]


def _check_template_arguments(pairs: list[str] | None) -> list[str] | None:
    read_template_arguments(pairs)
    return pairs


TemplateArguments = Annotated[
    list[str] | None,
    option(
        "An argument of the chat template, such as enable_thinking=false; may be repeated.",
        "--template-arg",
        callback=_check_template_arguments,
    ),
]

ColumnNames = Annotated[
    list[str] | None,
    option("Another name of a record's key, such as question=frage; may be repeated.", "--column"),
]

DataKeys = Annotated[
    list[str] | None,
    option(
        "A further key of the data, as recipes have it, such as split=test or name=vqav2; may be"
        " repeated.",
        "--source",
    ),
]

COMMANDS = (
    "show recipes build upgrade convert train eval chat serve card push explain compare cost study"
    " search demo"
)


TALKING = {"chat", "serve", "demo"}  # commands with a screen of their own; loading is shown


class OrderedCommands(typer.core.TyperGroup):
    """Lists commands in the order of use: build, train, evaluate, use, compare."""

    def list_commands(self, ctx) -> list[str]:
        order = {name: place for place, name in enumerate(COMMANDS.split())}
        return sorted(super().list_commands(ctx), key=lambda name: order.get(name, len(order)))


class ShownCommand(typer.core.TyperCommand):
    """Shows that it runs, from its first import to its end, while no step of its own is shown."""

    def invoke(self, ctx):
        """Run the command; `Stopped` is raised where Ctrl-C or SIGTERM stops it."""
        is_shown = self.name not in TALKING
        shown = show_step(f"sparsecut {self.name}", is_background=True)
        with stop_with_reason(self.name, ctx.params), shown if is_shown else nullcontext():
            return super().invoke(ctx)


SETTINGS = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class App(typer.Typer):
    """Makes commands that show that they run."""

    def command(self, name=None, **settings):
        """A decorator for the function of a command."""
        return super().command(name, **{"cls": ShownCommand, **settings})


app = App(
    help=(
        "Sparse shortcuts from any vision encoder into any language model:"
        " build, train, compare, use."
    ),
    cls=OrderedCommands,
    **{**SETTINGS, "add_completion": True},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"sparsecut {__version__}")
        raise typer.Exit


@app.callback()
def show_about(
    version: Annotated[
        bool, option("Print the version.", "--version", callback=_print_version, is_eager=True)
    ] = False,
    traceback: Annotated[
        bool,
        option("Show where an error arose (or set SPARSECUT_TRACEBACK=1).", "--traceback"),
    ] = False,
) -> None:
    """Options of every command; `main` reads --traceback wherever it stands."""


def load_model(name: str, device: str | None, dtype: str = "auto"):
    """Load a saved model onto a device.

    Args:
        name: A folder or hub name.
        device: The device; None takes the accelerator, if there is one.
        dtype: One of `early_checks.DTYPES`.

    Returns:
        The model and its processor.

    Raises:
        UserError: The dtype is unknown, the device cannot be used, or nothing can be loaded.
    """
    check_dtype(dtype)
    with show_step("importing torch and transformers"):
        device = find_device(device)
        from ..building import load

    model, processor = load(name, dtype=dtype)
    return model.to(device), processor


def parse_columns(pairs: list[str] | None) -> dict[str, str]:
    """Return the names of records' keys that the command line gives.

    Args:
        pairs: Texts such as "question=frage".

    Raises:
        UserError: One is malformed, or names a key twice.
    """
    columns: dict[str, str] = {}
    for pair in pairs or ():
        key, separator, name = pair.partition("=")
        if not separator or not key or not name or key in columns:
            raise UserError(
                f"--column is {pair!r}, but is written once for each key, as in --column"
                " question=frage"
            )
        columns[key] = name
    return columns


def make_source(data: Path, keys: list[str] | None, **settings: Any) -> Source:
    """Return the source of records that a command's options describe.

    Args:
        data: A file, a folder, or a data set of the hub.
        keys: Texts such as "split=test"; a value is read as YAML.
        **settings: Keys that the command has options of their own for.

    Raises:
        UserError: A key is malformed, unknown, given twice, or has no effect here.
    """
    from ..config.source import Source
    from ..config.yaml_io import read_yaml
    from ..schema import build_dataclass

    values = {"path": str(data), **settings}
    for pair in keys or []:
        key, equals, value = pair.partition("=")
        if not equals or key in values or key in ("streaming", "weight", "max_broken", "on_error"):
            raise UserError(
                f"--source is {pair!r}, but must be key=value of a key without an option of its"
                " own, such as split=test, name=vqav2, revision=main or question='What is it?'"
            )
        values[key] = read_yaml(value, f"--source {pair!r}")
    return build_dataclass(Source, values, "--source")


def set_template_arguments(processor, pairs: list[str] | None) -> None:
    """Make arguments of the command line the defaults of a processor's chat template.

    Args:
        processor: The processor, which is changed.
        pairs: Texts such as "enable_thinking=false"; a value is read as YAML.

    Raises:
        UserError: One is malformed, or the template does not read it.
    """
    from ..chat_templates.arguments import set_arguments

    set_arguments(processor, read_template_arguments(pairs))


def read_template_arguments(pairs: list[str] | None) -> dict[str, Any]:
    """Read arguments of the chat template from the command line.

    Args:
        pairs: As `set_template_arguments` takes them.

    Raises:
        UserError: One is malformed.
    """
    from ..config.yaml_io import read_yaml

    arguments = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(
                f"--template-arg is {pair!r}, but must be name=value, as enable_thinking=false"
            )
        arguments[name] = read_yaml(value, f"--template-arg {pair!r}")
    return arguments


def find_device(device: str | None) -> str:
    """Return the device named, or the accelerator if there is one.

    Raises:
        UserError: The device cannot be used on this machine.
    """
    import torch

    if device is None:
        has_accelerator = torch.accelerator.is_available()
        device = str(torch.accelerator.current_accelerator()) if has_accelerator else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {device} cannot be used here: {reason}; leave it out, or give cpu"
        ) from error
    return device


def print_scores(result: dict, out: Path | None) -> None:
    """Print an evaluation's scores, and where they were written."""
    from ..evaluation.exact_match import format_scores

    echo(format_scores(result))
    if out is not None:
        echo(f"wrote {out}/result.json and {out}/predictions.jsonl")
