"""`sparsecut eval`: evaluate a model on a data file or on benchmark tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from ..config.places import check_model_files, check_source_place
from ..schema import UserError
from ..waits import show_step
from .app import (
    ColumnNames,
    DataKeys,
    Device,
    Dtype,
    File,
    Number,
    SavedModel,
    TemplateArguments,
    Text,
    app,
    echo,
    load_model,
    make_source,
    option,
    output_folder,
    parse_columns,
    print_scores,
    set_template_arguments,
)

DEFAULT_MAX_NEW_TOKENS = 16


@app.command("eval")
def evaluate(
    model: SavedModel,
    data: Annotated[
        File, option("Questions: a file, a folder, or a hub data set (docs/data.md).")
    ] = None,
    images: Annotated[
        File, option("Folder or tar archive of the images. Default: the data's folder.")
    ] = None,
    out: Annotated[
        File,
        output_folder("Folder for predictions and result; an interrupted run continues there."),
    ] = None,
    batch_size: Annotated[int, option("Questions answered at once.", min=1)] = 16,
    max_new_tokens: Annotated[
        Number, option("Longest answer, in tokens. Default: 16, or the benchmark's own.", min=1)
    ] = None,
    limit: Annotated[
        Number, option("Answer at most this many questions, a fixed random choice.", min=1)
    ] = None,
    tasks: Annotated[
        Text, option("Benchmarks in place of --data, such as pope,textvqa:ocr=off, or all.")
    ] = None,
    root: Annotated[
        File, option("Folder with the benchmarks' files, LLaVA's playground/data/eval.")
    ] = None,
    part: Annotated[
        Text, option("This process's part, 1/4 to 4/4 of four; torchrun sets it by itself.")
    ] = None,
    where: Annotated[
        Text, option("Only questions whose id contains this regular expression.")
    ] = None,
    anywhere: Annotated[
        bool, option("Images may lie outside --images; only for data you trust.", "--anywhere")
    ] = False,
    source_keys: DataKeys = None,
    group: Annotated[
        Text, option("Regular expression whose parentheses catch the group in the id.")
    ] = None,
    fresh: Annotated[bool, option("Start over, even where --out has answers.", "--fresh")] = False,
    workers: Annotated[
        int, option("Processes that prepare images while a GPU answers.", min=0)
    ] = 0,
    column: ColumnNames = None,
    template_arg: TemplateArguments = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Evaluate a model on a data file or on benchmark tasks."""
    settings = {"out": out, "batch_size": batch_size, "resume": not fresh, "workers": workers}
    if tasks is not None:
        _refuse_data_options(
            data=data,
            images=images,
            where=where,
            group=group,
            anywhere=anywhere or None,
            column=column,
            source=source_keys,
        )
        _require_task_options(root=root, out=out)
        check_model_files(model)
        settings["max_new_tokens"] = max_new_tokens
        _run_tasks(model, tasks, root, part, limit, device, dtype, template_arg, **settings)
        return
    if data is None:
        raise UserError("nothing to evaluate on; give --data (a file) or --tasks (benchmarks)")
    if root or part:
        raise UserError(
            "--root and --part belong to --tasks; leave them out, or replace --data by --tasks"
        )
    source = make_source(
        data,
        source_keys,
        images=images and str(images),
        where=where,
        group=group,
        keep=limit,
        anywhere=anywhere,
        columns=parse_columns(column),
    )
    check_source_place(source)
    check_model_files(model)
    from ..data.examples import read_source

    examples = read_source(source, [])
    from ..evaluation.evaluator import evaluate

    loaded, processor = load_model(model, device, dtype)
    set_template_arguments(processor, template_arg)
    settings["max_new_tokens"] = max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    result = evaluate(loaded, processor, examples, **settings)
    print_scores(result, out)


def _refuse_data_options(**options) -> None:
    names = [f"--{name}" for name, value in options.items() if value is not None]
    if names:
        raise UserError(
            f"{', '.join(names)} cannot be used with --tasks, which reads the benchmarks' own"
            " files; leave it out"
        )


def _require_task_options(root: Path | None, out: Path | None) -> None:
    if root is None:
        raise UserError("--tasks needs --root, the folder that holds gqa/, pope/ and so on")
    if out is None:
        raise UserError(
            "--tasks needs --out, a folder for answers and scores, where an interrupted run"
            " continues"
        )
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}, which --root names; give the one that holds gqa/, pope/"
            " and so on"
        )


def _run_tasks(
    model: str,
    names: str,
    root: Path,
    part: str | None,
    limit: int | None,
    device: str | None,
    dtype: str,
    template_arguments: list[str] | None,
    *,
    out: Path,
    **settings,
) -> None:
    """Read the benchmarks, ask the model their questions, print the scores."""
    from ..evaluation.tasks.run import format_results, parse_part, read_tasks, run_task

    number, count = parse_part(part)
    tasks = read_tasks(names, root, limit)
    loaded, processor = load_model(model, device or _get_local_device(), dtype)
    set_template_arguments(processor, template_arguments)
    results = []
    for task in tasks:
        with show_step(task.label):
            result = run_task(loaded, processor, task, out, part=(number, count), **settings)
        if result is None:
            echo(
                f"{task.label}: part {number + 1} of {count} is answered; the scores come with the"
                " last part"
            )
        else:
            results.append(result)
            echo(f"{task.label} is answered: {out / task.label}/result.json", err=True)
    if results:
        echo(format_results(results))
        echo(f"wrote result.json and predictions.jsonl of each into folders of {out}")


def _get_local_device() -> str | None:
    """This process's accelerator among those of torchrun; None where there is no choice."""
    import torch

    if "LOCAL_RANK" not in os.environ or not torch.accelerator.is_available():
        return None
    return f"{torch.accelerator.current_accelerator().type}:{os.environ['LOCAL_RANK']}"
