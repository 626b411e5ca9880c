"""Commands that weigh plans against one another, registered on the command line's app when `cli` is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli import Device, File, Method, _arg, _device, _opt, app

Plans = Annotated[list[str], _arg("Methods' names or files with plans; ratios are to the first.", "PLAN...")]


@app.command()
def cost(
    plans: Plans,
    vision: Annotated[str, _opt("Encoder: a known size's name, folder, hub name, or world.")] = "clip-l-336",
    language: Annotated[str, _opt("Language model: a known size's name, folder, hub name, or world.")] = "llama-7b",
    text_tokens: Annotated[int, _opt("Text tokens of the prompt, beside its one picture.", min=1)] = 64,
    option: Method = None,
    measure: Annotated[bool, _opt("Also time each on this machine, with random weights.", "--measure")] = False,
    device: Device = None,
    json: Annotated[File, _opt("File for all figures, also those of a training step.", "--json")] = None,
) -> None:
    """Count what plans cost at a size: parameters, operations, memory. Loads no weights."""
    from .sketch import read_plan

    specs = {plan: read_plan(plan, option or []) for plan in plans}
    from .cost import backbone_config, count, table

    configs = backbone_config(vision, "vision"), backbone_config(language, "language")
    counts = {name: count(*configs, spec, num_text_tokens=text_tokens) for name, spec in specs.items()}
    typer.echo(table(counts))
    figures = {name: {"count": counted.to_dict()} for name, counted in counts.items()}
    if measure:
        from . import timing

        models = timing.random_models(*configs, specs, device=_device(device))
        measured = timing.measure_all(models, num_text_tokens=text_tokens)
        typer.echo(f"\n{timing.table(measured)}")
        for name, one in measured.items():
            figures[name]["measured"] = one.to_dict()
    if json is not None:
        _write(json, figures)
        typer.echo(f"wrote {json}")


def _write(path: Path, plain: dict) -> None:
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain, indent=2) + "\n")
