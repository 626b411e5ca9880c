"""Commands that make models: joined from parts, upgraded, converted; registered on the command
line's app when `cli` is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Method, Number, Text, _arg, _opt, app


@app.command()
def build(
    vision: Annotated[str, _opt("Vision encoder: hub name, folder, or world.")],
    language: Annotated[str, _opt("Causal language model: hub name, folder, or world.")],
    out: Annotated[Path, _opt("Folder to write the model to.")],
    plan: Annotated[str, _opt("A method's name, or a file with a plan.")] = "sparsecut",
    view_size: Annotated[
        Number, _opt("Pixels of a view, for encoders of pictures of any size.")
    ] = None,
    option: Method = None,
) -> None:
    """Join a vision encoder and a language model, the fusion untrained."""
    from .plan_argument import describe, read_plan, refuse_model_in

    spec = read_plan(plan, option or [])
    refuse_model_in(out)
    from ..building import build, save

    model, processor = build(vision, language, spec, view_size=view_size)
    save(model, processor, out)
    typer.echo(f"{describe(model)}\n\nwrote {out}; its fusion is untrained")


@app.command()
def upgrade(
    base: Annotated[str, _arg("A finished vision-language model: folder or hub name.", "BASE")],
    out: Annotated[Path, _opt("Folder to write the shortcuts to.")],
    plan: Annotated[
        Text,
        _opt(
            "A method's name, or a file with a plan; by default sparsecut, its projectors narrow."
        ),
    ] = None,
    option: Method = None,
    whole: Annotated[
        bool, _opt("Write the base too, so that the folder needs nothing else.", "--whole")
    ] = False,
) -> None:
    """Give a finished vision-language model shortcuts, untrained: it answers exactly as before
    until they are trained.
    """
    from .plan_argument import read_plan, refuse_model_in

    spec = read_plan(plan or "sparsecut", option or []) if plan or option else None
    refuse_model_in(out)
    from ..building import save
    from ..profiling.upgraded import count_upgrade, describe_cost
    from ..upgrading import upgrade
    from .plan_argument import describe

    model, processor = upgrade(base, spec)
    if whole:
        save(model, processor, out)
    else:
        model.save_fusion(out)
    typer.echo(
        f"{describe(model)}\n\n{describe_cost(count_upgrade(model, processor))}\n\nwrote {out}; its"
        " shortcuts are untrained"
    )


@app.command()
def convert(
    checkpoint: Annotated[Path, _arg("Folder that the released code saved.")],
    out: Annotated[Path, _arg("Folder to write our model to.")],
    vision: Annotated[str, _opt("The vision tower it was trained with: hub name or folder.")],
    fusion: Annotated[
        Text, _opt("cross_mlp, cross_attention or mlp2x_gelu; default: what config.json says.")
    ] = None,
    taps: Annotated[
        Text, _opt("Encoder blocks, 0 = after the first, as 0,3,6; or none. Default: as released.")
    ] = None,
    layers: Annotated[
        Text, _opt("The decoder layer of each tap, as 4,9,14; or none. Default: as released.")
    ] = None,
) -> None:
    """Turn a checkpoint of the released SparseCut code into a model of ours."""
    from .plan_argument import describe, numbers

    pairs = {"taps": numbers("--taps", taps), "layers": numbers("--layers", layers)}
    from ..conversion.checkpoint import convert

    model, _ = convert(checkpoint, out, vision=vision, fusion=fusion, **pairs)
    typer.echo(f"{describe(model)}\n\nwrote {out}")
