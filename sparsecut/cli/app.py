"""The command line: each command a few lines around the function of the same name.

Nothing heavy is imported before a command runs, so that help is quick.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..schema import UserError


def _arg(help: str, metavar: str | None = None):
    return typer.Argument(help=help, metavar=metavar)


def _opt(help: str, *names: str, **more):
    return typer.Option(*names, help=help, **more)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparsecut {__version__}")
        raise typer.Exit


HELP = {"help_option_names": ["-h", "--help"]}
COMMON = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "context_settings": HELP,
}
app = typer.Typer(
    help=(
        "Sparse shortcuts from any vision encoder into any language model: build, train, compare,"
        " use."
    ),
    **COMMON,
)
world_app = typer.Typer(
    help="The built-in picture world: its pictures and its two small backbones.", **COMMON
)
app.add_typer(world_app, name="world")

QUIET_SECONDS = 30  # between two lines of progress where the screen is a file
Text, Number, File = str | None, int | None, Path | None
Saved = Annotated[str, _arg("A saved model's folder, or its hub name.", "MODEL")]
Method = Annotated[
    list[str] | None, _opt("An option of the method, key=value; may be repeated.", "--option", "-o")
]
Device = Annotated[
    Text, _opt("Where to compute, as cpu or cuda:0; by default the accelerator, if there is one.")
]
DTYPES = ("auto", "bfloat16", "float16", "float32")
Dtype = Annotated[
    str, _opt("Numbers of the weights: auto (as they were saved), bfloat16, float16 or float32.")
]


@app.callback()
def about(
    version: Annotated[
        bool, _opt("Print the version.", "--version", callback=_version, is_eager=True)
    ] = False,
    traceback: Annotated[
        bool, _opt("Show where an error arose (or set SPARSECUT_TRACEBACK=1).", "--traceback")
    ] = False,
) -> None:
    """Options that every command has; `main` reads --traceback wherever it stands."""


@app.command()
def show(
    what: Annotated[
        str, _arg("A method's name, a recipe or plan file (YAML, JSON), or a saved model's folder.")
    ],
    vision_depth: Annotated[
        Number, _opt("Number of encoder blocks; 24 where nothing else says it.")
    ] = None,
    language_depth: Annotated[
        Number, _opt("Number of decoder layers; 32 where nothing else says it.")
    ] = None,
    option: Method = None,
    json: Annotated[
        bool, _opt("Print the plan as JSON, which `build --plan` takes.", "--json")
    ] = False,
) -> None:
    """Draw a plan: what is read, how it is mixed, where it is added. Loads no weights."""
    from .plan_argument import as_json, sketch

    plan, drawing = sketch(what, vision_depth, language_depth, option or [])
    typer.echo(as_json(plan) if json else drawing)


@app.command()
def train(
    recipe: Annotated[Path, _arg("A recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None, _arg("Changes, as stages.0.args.max_steps=10 output=runs/b")
    ] = None,
    check: Annotated[
        bool, _opt("Read all records and pictures, and stop there.", "--check")
    ] = False,
    resume: Annotated[
        bool, _opt("Go on after the last finished stage or checkpoint.", "--resume")
    ] = False,
    dry_run: Annotated[
        bool, _opt("Print sizes, memory, steps and hours, and stop there; no weights.", "--dry-run")
    ] = False,
    devices: Annotated[int, _opt("Devices that the dry run counts with.", min=1)] = 1,
    tflops: Annotated[float, _opt("TFLOP/s of a device, for the dry run's hours.")] = 989.0,
    mfu: Annotated[float, _opt("Share of them that training reaches.")] = 0.4,
    json: Annotated[bool, _opt("Print the dry run as JSON.", "--json")] = False,
) -> None:
    """Train by a recipe, stage after stage, then ask what its `evaluate` names."""
    from ..config.recipe import load_recipe

    chosen = load_recipe(recipe, overrides or [])
    if dry_run:
        from ..profiling import dry_run as paper

        of = {"devices": devices, "tflops": tflops, "mfu": mfu}
        plans = paper.dry_run(chosen, **of)
        return typer.echo(paper.as_json(plans) if json else "\n".join(paper.lines(plans, **of)))
    if json:
        raise UserError("--json prints a dry run; give --dry-run too")
    from ..training.stages import train

    model, processor = train(chosen, check=check, resume=resume)
    if check:
        typer.echo(f"{recipe} can be trained")
    elif chosen.evaluate and os.environ.get("RANK", "0") == "0":
        from ..evaluation.evaluator import evaluate_recipe

        with _bar("asking") as progress:
            result = evaluate_recipe(chosen, model, processor, resume=resume, progress=progress)
        _print_scores(result, Path(chosen.output) / "eval")


@app.command()
def chat(
    model: Saved,
    pictures: Annotated[
        list[Path] | None, _arg("Pictures that go with the first question.")
    ] = None,
    ask: Annotated[Text, _opt("Ask this one question, print the answer, and leave.")] = None,
    temperature: Annotated[
        float, _opt("0 takes the likeliest words, more draws at random.", min=0)
    ] = 0.0,
    max_new_tokens: Annotated[int, _opt("Longest answer, in tokens.", min=1)] = 256,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model about pictures; /help in the conversation tells the commands."""
    from ..chat import Chat, converse, open_picture

    shown = [open_picture(picture) for picture in pictures or []]
    conversation = Chat(
        *_load(model, device, dtype), temperature=temperature, max_new_tokens=max_new_tokens
    )
    if ask is not None:
        for piece in conversation.stream(ask, *shown):
            typer.echo(piece, nl=False)
        return typer.echo()
    typed = sys.stdin.isatty()
    if typed:
        typer.echo("/image PATH shows a picture, /help tells more, /quit leaves")
    converse(
        conversation,
        shown,
        lambda: input("> " if typed else ""),
        lambda text: typer.echo(text, nl=False),
    )
    if typed:
        typer.echo()


@app.command()
def demo(
    out: Annotated[Path, _opt("Folder for pictures, models and the report.")] = Path("runs/demo"),
    seed: Annotated[int, _opt("Draws pictures, starts the fusion, orders batches.")] = 0,
    quick: Annotated[
        bool, _opt("A small part of everything, to see that it runs.", "--quick")
    ] = False,
) -> None:
    """Train and compare ways of fusion on the picture world, and write a report; some minutes."""
    from .demo import run

    run(out, seed=seed, quick=quick)


@world_app.command("draw")
def world_draw(
    folder: Annotated[Path, _arg("Folder for pictures and questions.")],
    train: Annotated[int, _opt("Pictures to train on.", min=0)] = 1000,
    dev: Annotated[int, _opt("Pictures to choose by.", min=0)] = 100,
    test: Annotated[int, _opt("Pictures to report on.", min=0)] = 100,
    questions: Annotated[int, _opt("Questions about each.", min=1)] = 12,
    seed: Annotated[int, _opt("Equal seeds give equal files.")] = 0,
    size: Annotated[
        str, _opt("small (96 x 96 pixels) or large (192 x 192, more things).")
    ] = "small",
) -> None:
    """Draw pictures with questions in LLaVA's format, split by split."""
    from ..shapes import write_split

    for split, number in {"train": train, "dev": dev, "test": test}.items():
        if number:
            write_split(folder, split, number, questions, seed=seed, size=size)
            typer.echo(f"{split}: {number} pictures, {folder}/{split}.json")


@world_app.command("pretrain")
def world_pretrain(
    out: Annotated[Path, _opt("Folder for the two backbones.")] = Path("runs/world"),
    seed: Annotated[int, _opt("Where all chance comes from.")] = 0,
    noise: Annotated[
        float, _opt("Noise before the encoder's last blocks; see world/vision.py.")
    ] = 3.0,
    quick: Annotated[bool, _opt("A few steps, to see that it runs.", "--quick")] = False,
    size: Annotated[str, _opt("small (the shipped ones) or large (for a GPU).")] = "small",
    device: Annotated[str, _opt("Where to compute, as cpu or cuda.")] = "cpu",
) -> None:
    """Make the picture world's encoder and language model from scratch."""
    from ..shapes import pretrain

    pretrain(
        out, seed=seed, noise=noise, quick=quick, size=size, device=_device(device), log=typer.echo
    )


def _load(model: str, device: str | None, dtype: str = "auto"):
    """A saved model on the device and with the numbers asked for, and its processor."""
    from ..plan import nearest

    if dtype not in DTYPES:
        raise UserError(
            f"--dtype is {dtype!r}{nearest(dtype, DTYPES)}; allowed are {', '.join(DTYPES)}"
        )
    device = _device(device)
    from ..building import load

    loaded, processor = load(model, dtype=dtype)
    return loaded.to(device), processor


def _device(device: str | None) -> str:
    """The device asked for, or the accelerator if there is one; refused where it cannot be used."""
    import torch

    if device is None:
        device = str(
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {device} cannot be used here: {reason}; leave it out, or give cpu"
        ) from error
    return device


@contextmanager
def _bar(words: str):
    """A progress line on screen, moved by calling what it gives with (done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn(words), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    shown, began = [time.monotonic()], []

    def line(done: int, total: int) -> None:
        """Where no bar can move, a line now and then."""
        now = time.monotonic()
        began.extend([] if began else [done, now])
        first, since = began
        if now - shown[0] > QUIET_SECONDS and done > first:
            left = (now - since) / (done - first) * (total - done) / 60
            console.print(
                f"{words}: {done:,} of {total:,}, about {left:.0f} minutes left", highlight=False
            )
            shown[0] = now

    if not console.is_terminal:
        yield line
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(words, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _print_scores(result: dict, out: Path | None) -> None:
    from ..evaluation.scoring import table

    typer.echo(table(result))
    if out is not None:
        typer.echo(f"wrote {out}/result.json and {out}/predictions.jsonl")
