"""Commands that weigh plans against one another, registered on the command line's app when `cli` is
imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..schema import UserError
from .app import (
    Device,
    Dtype,
    File,
    MethodOptions,
    SavedModel,
    Text,
    app,
    argument,
    find_device,
    load_model,
    option,
    show_progress,
)

Plans = Annotated[
    list[str], argument("Methods' names or files with plans; ratios are to the first.", "PLAN...")
]


@app.command()
def cost(
    plans: Plans,
    vision: Annotated[
        str, option("Encoder: a known size's name, folder, hub name, or world.")
    ] = "clip-l-336",
    language: Annotated[
        str, option("Language model: a known size's name, folder, hub name, or world.")
    ] = "llama-7b",
    text_tokens: Annotated[
        int, option("Text tokens of the prompt, beside its one picture.", min=1)
    ] = 64,
    base: Annotated[
        Text, option("A finished vision-language model instead: what upgrading it costs. Loads it.")
    ] = None,
    method_options: MethodOptions = None,
    measure: Annotated[
        bool, option("Also time each on this machine, with random weights.", "--measure")
    ] = False,
    device: Device = None,
    json: Annotated[
        File, option("File for all figures, also those of a training step.", "--json")
    ] = None,
) -> None:
    """Count what plans cost at a size: parameters, operations, memory. Loads no weights, unless
    --base names a model.
    """
    from .plan_argument import read_plan

    specs = {plan: read_plan(plan, method_options or []) for plan in plans}
    if base is not None:
        return _cost_of_upgrades(base, specs, measure, json)
    from ..profiling.counting import backbone_config, count, table

    configs = backbone_config(vision, "vision"), backbone_config(language, "language")
    counts = {
        name: count(*configs, spec, num_text_tokens=text_tokens) for name, spec in specs.items()
    }
    typer.echo(table(counts))
    figures = {name: {"count": counted.to_dict()} for name, counted in counts.items()}
    if measure:
        from ..profiling import timing

        models = timing.random_models(*configs, specs, device=find_device(device))
        measured = timing.measure_all(models, num_text_tokens=text_tokens)
        typer.echo(f"\n{timing.table(measured)}")
        for name, one in measured.items():
            figures[name]["measured"] = one.to_dict()
    if json is not None:
        _write(json, figures)
        typer.echo(f"wrote {json}")


def _cost_of_upgrades(base: str, specs: dict, measure: bool, json: Path | None) -> None:
    if measure:
        raise UserError(
            "--measure times models of random weights, not a finished one; leave out --measure or"
            " --base"
        )
    from ..profiling.upgraded import count_upgrades, describe_cost

    counts = count_upgrades(base, specs)
    for name, counted in counts.items():
        typer.echo(f"{name}\n{describe_cost(counted)}")
    if json is not None:
        _write(json, {name: {"count": counted.to_dict()} for name, counted in counts.items()})
        typer.echo(f"wrote {json}")


@app.command()
def study(
    file: Annotated[Path, argument("A study file (YAML).")],
    overrides: Annotated[
        list[str] | None, argument("Changes, as seeds=[0,1] output=runs/study/b")
    ] = None,
    workers: Annotated[int, option("Processes on this machine, one thread each.", min=1)] = 2,
    arm: Annotated[list[str] | None, option("Only this arm; may be repeated.")] = None,
    seed: Annotated[list[int] | None, option("Only this seed; may be repeated.")] = None,
    report: Annotated[
        bool, option("Train nothing, report on what is finished.", "--report")
    ] = False,
) -> None:
    """Train and compare ways of fusion over seeds on equal data, and write one report; goes on
    where it stopped.
    """
    from ..experiments.study import load_study
    from ..reports.study import write_study_report

    chosen = load_study(file, overrides or [])
    if not report:
        from ..experiments.runner import run_study

        run_study(chosen, workers=workers, arms=arm or (), seeds=seed or (), log=typer.echo)
    page = write_study_report(Path(chosen.output))
    typer.echo(
        f"\nThe report: {page}, with tables in {page.with_suffix('.md')} and figures in"
        f" {page.with_suffix('.json')}"
    )


@app.command()
def search(
    file: Annotated[
        Path, argument("A study file; its recipe, pictures and main budget are used, not its arms.")
    ],
    overrides: Annotated[
        list[str] | None, argument("Changes, as seeds=[0,1] output=runs/study/b")
    ] = None,
    count: Annotated[int | None, option("At most so many shortcuts.")] = None,
    ratio: Annotated[
        float | None, option("At most so many times the baseline arm's prefill operations, as 1.1.")
    ] = None,
    seed: Annotated[
        list[int] | None, option("A seed of the supernet; may be repeated. Default: 0.")
    ] = None,
    rank: Annotated[int, option("Inner width of each pair's projector.", min=1)] = 8,
    penalty: Annotated[float, option("Weight of the gates' sizes in the loss.", min=0)] = 0.01,
    workers: Annotated[int, option("Processes on this machine, one thread each.", min=1)] = 2,
) -> None:
    """Find a plan by training all pairs of tap and layer at once and keeping the best few under a
    budget.
    """
    from ..experiments.study import load_study

    chosen = load_study(file, overrides or [])
    from ..drawing import draw
    from ..experiments.search import search

    settings = {
        "count": count,
        "ratio": ratio,
        "seeds": tuple(seed or (0,)),
        "rank": rank,
        "penalty": penalty,
    }
    plan, pairs = search(chosen, **settings, workers=workers, log=typer.echo)
    depths = max(p["tap"] for p in pairs), max(p["layer"] for p in pairs) + 1
    best = "\n".join(
        f"  tap {p['tap']:2} -> layer {p['layer']:2}   worth {p['worth']:.4f}   gate"
        f" {p['gate']:.2f}"
        for p in pairs[:12]
    )
    folder = Path(chosen.output) / "search"
    typer.echo(f"\n{draw(plan, *depths, title='the plan found')}\n\nthe best pairs:\n{best}")
    typer.echo(
        f"\nwrote {folder}/plan.yaml; use it as an arm of a study, as a recipe's fusion, or with"
        " build --plan"
    )


@app.command()
def explain(
    model: SavedModel,
    data: Annotated[Path, option("Questions in LLaVA's format (.json, .jsonl, .parquet).")],
    images: Annotated[
        File, option("Folder or tar archive of the pictures; by default the data's folder.")
    ] = None,
    out: Annotated[File, option("Folder for explain.html, .md and .json.")] = None,
    limit: Annotated[
        int | None, option("At most so many questions, a fixed random choice.", min=1)
    ] = None,
    batch_size: Annotated[int, option("Questions answered at once.", min=1)] = 64,
    max_new_tokens: Annotated[int, option("Longest answer, in tokens.", min=1)] = 16,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Tell what each shortcut of a trained model is good for: answers without it, and how much it
    adds.
    """
    from ..config.recipe import Source
    from ..data.examples import read_source

    examples = read_source(Source(str(data), images and str(images), keep=limit), [])
    from ..evaluation.ablation import explain
    from ..reports.ablation import lines, write_explanation

    loaded, settings = (
        load_model(model, device, dtype),
        {
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
        },
    )
    with show_progress("asking") as progress:
        found = explain(*loaded, examples, **settings, progress=progress)
    if out is not None:
        write_explanation(found, out)
    typer.echo(lines(found))
    if out is not None:
        typer.echo(
            f"\nThe page: {out}/explain.html, with tables in explain.md and figures in explain.json"
        )


def _write(path: Path, plain: dict) -> None:
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain, indent=2) + "\n")


@app.command()
def compare(
    runs: Annotated[
        list[str],
        argument(
            "Folders of evaluations or training runs, or NAME=FOLDER; one name is one arm.",
            "RUN...",
        ),
    ],
    out: Annotated[Path, option("Folder for the page, the table and the figures.")] = Path(
        "runs/compare"
    ),
    images: Annotated[
        Text, option("Folder or tar archive of the pictures, where the runs' recipes do not say.")
    ] = None,
    items: Annotated[int, option("At most so many items on which they differ.", min=0)] = 24,
) -> None:
    """Put finished evaluations side by side: paired differences over the same items, cost, and
    where they differ.
    """
    from ..experiments.compare import figures, notes, read_runs, table

    chosen = read_runs(runs)
    found = figures(chosen, num_items=items)
    from rich.console import Console
    from rich.table import Table

    head, *rows = table(found)
    shown = Table(*head, box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    # As wide as it is: a narrow terminal wraps its lines, but loses nothing of them.
    Console(width=Console(width=1000).measure(shown).maximum).print(shown, crop=False)
    typer.echo("\n".join(notes(found)))
    from ..reports.compare import write_comparison

    typer.echo(f"wrote {write_comparison(out, chosen, found, images)}")
