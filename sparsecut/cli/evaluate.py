"""`sparsecut eval`: the questions of a file, or of benchmarks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..schema import UserError
from .app import Device, Dtype, File, Number, Saved, Text, _bar, _load, _opt, _print_scores, app


@app.command("eval")
def evaluate(
    model: Saved,
    data: Annotated[File, _opt("Questions in LLaVA's format (.json, .jsonl, .parquet).")] = None,
    images: Annotated[
        File, _opt("Folder or tar archive of the pictures; by default the data's folder.")
    ] = None,
    out: Annotated[
        File, _opt("Folder for predictions and result; an interrupted run goes on there.")
    ] = None,
    batch_size: Annotated[int, _opt("Questions answered at once.", min=1)] = 16,
    max_new_tokens: Annotated[
        Number, _opt("Longest answer, in tokens: 16, or what a benchmark allows.", min=1)
    ] = None,
    limit: Annotated[
        Number, _opt("At most so many questions, a fixed random choice.", min=1)
    ] = None,
    tasks: Annotated[
        Text, _opt("Benchmarks in place of --data, as pope,textvqa:ocr=off, or all.")
    ] = None,
    root: Annotated[
        File, _opt("Folder with the benchmarks' files, LLaVA's playground/data/eval.")
    ] = None,
    part: Annotated[
        Text, _opt("Of several processes, this is 1/4, ... 4/4; torchrun says it itself.")
    ] = None,
    where: Annotated[
        Text, _opt("Only questions whose id contains this regular expression.")
    ] = None,
    group: Annotated[
        Text, _opt("Regular expression whose parentheses catch the group in the id.")
    ] = None,
    fresh: Annotated[bool, _opt("Start over, even where --out has answers.", "--fresh")] = False,
    workers: Annotated[
        int, _opt("Processes that prepare pictures while a GPU answers.", min=0)
    ] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Ask a model the questions of a file and count the right answers, or those of benchmarks and
    score them as they do.
    """
    if tasks is not None or data is None:
        mine = {"data": data, "images": images, "where": where, "group": group}
        given = {
            "out": out,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "limit": limit,
            "workers": workers,
        }
        return _ask(
            model, tasks, root, part, fresh=fresh, device=device, dtype=dtype, refused=mine, **given
        )
    if root or part:
        raise UserError(
            "--root and --part belong to --tasks; leave them out, or name benchmarks in place of"
            " --data"
        )
    from ..config.recipe import Source
    from ..data.examples import read_source

    examples = read_source(
        Source(str(data), images and str(images), where=where, group=group, keep=limit), []
    )
    from ..evaluation.evaluator import evaluate

    chosen = {
        "out": out,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens or 16,
        "resume": not fresh,
        "workers": workers,
    }
    loaded = _load(model, device, dtype)
    with _bar("asking") as progress:
        result = evaluate(*loaded, examples, **chosen, progress=progress)
    _print_scores(result, out)


def _ask(
    model: str,
    tasks: str | None,
    root: Path | None,
    part: str | None,
    *,
    out: Path | None,
    batch_size: int,
    max_new_tokens: int | None,
    limit: int | None,
    workers: int,
    fresh: bool,
    device: str | None,
    dtype: str,
    refused: dict,
) -> None:
    """Read the benchmarks named, ask a model their questions, print what they say of it.

    refused: options of --data by name, which mean nothing here. Raises ValueError where one is
    given, or too little is.
    """
    if tasks is None:
        raise UserError(
            "it is not said what to ask; give --data, a file of questions, or --tasks, names of"
            " benchmarks"
        )
    if given := [f"--{name}" for name, value in refused.items() if value is not None]:
        raise UserError(
            f"{', '.join(given)} cannot go with --tasks, which reads the benchmarks' own files;"
            " leave it out"
        )
    for name, value, what in (
        ("root", root, "the folder that holds gqa/, pope/, textvqa/ and so on"),
        ("out", out, "a folder for answers and scores, where an interrupted run goes on"),
    ):
        if value is None:
            raise UserError(f"--tasks needs --{name}, {what}")
    from ..evaluation.tasks.run import part_of, read_tasks, run_task, table

    mine, chosen = part_of(part), read_tasks(tasks, root, limit)
    loaded = _load(model, device or _own_device(), dtype)
    settings = {
        "part": mine,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "resume": not fresh,
        "workers": workers,
    }
    results = []
    for one in chosen:
        with _bar(one.label) as progress:
            result = run_task(*loaded, one, out, progress=progress, **settings)
        if result is None:
            typer.echo(
                f"{one.label}: part {mine[0] + 1} of {mine[1]} is answered; the scores come with"
                " the last part"
            )
        else:
            results.append(result)
            typer.echo(f"{one.label} is answered: {out / one.label}/result.json", err=True)
    if results:
        typer.echo(table(results))
        typer.echo(f"wrote result.json and predictions.jsonl of each into folders of {out}")


def _own_device() -> str | None:
    """The accelerator of this process among those that torchrun started on a machine; None where
    there is no choice.
    """
    import torch

    if "LOCAL_RANK" not in os.environ or not torch.accelerator.is_available():
        return None
    return f"{torch.accelerator.current_accelerator().type}:{os.environ['LOCAL_RANK']}"
