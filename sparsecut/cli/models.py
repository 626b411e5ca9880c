"""Commands that make models: joined from two parts, upgraded, converted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..config.folder_lock import claim_new_folder
from ..config.paths import check_writable_folder, write_whole_folder
from ..config.places import check_backbone_place, check_model_files
from ..schema import check_choice
from ..shipped_model import MODEL_FILES
from ..view_sizes import check_fitting
from ..waits import show_step
from .app import (
    MethodOptions,
    Number,
    Text,
    app,
    argument,
    echo,
    option,
    output_folder,
)
from .completion import complete_plan
from .early_checks import check_holds, check_spec

FUSIONS = ("cross_mlp", "cross_attention", "mlp2x_gelu")  # of the released code


@app.command()
def build(
    vision: Annotated[
        str,
        option("Vision encoder: hub name, folder, or shapes."),
    ],
    language: Annotated[
        str,
        option("Causal language model: hub name, folder, or shapes."),
    ],
    out: Annotated[Path, output_folder("Folder to write the model to.")],
    plan: Annotated[
        str, option("A method's name, or a file with a plan.", autocompletion=complete_plan)
    ] = "sparsecut",
    view_size: Annotated[
        Number, option("Pixels of a view, where the encoder takes other sizes than its own.", min=1)
    ] = None,
    coarse: Annotated[
        str, option("How images are fitted: squash, crop, or native (aspect ratio kept).")
    ] = "squash",
    min_pixels: Annotated[Number, option("With native: fewest pixels of a resized image.")] = None,
    max_pixels: Annotated[Number, option("With native: most pixels of a resized image.")] = None,
    method_options: MethodOptions = None,
) -> None:
    """Join a vision encoder and a language model by an untrained fusion."""
    from .plan_argument import check_no_model, describe_model, read_plan

    spec = read_plan(plan, method_options or [])
    check_no_model(out)
    check_fitting(coarse, min_pixels, max_pixels)
    check_backbone_place(vision, "vision")
    check_backbone_place(language, "language")
    check_spec(spec, vision, language)
    from ..building import build, save

    with claim_new_folder(out):
        model, processor = build(
            vision,
            language,
            spec,
            view_size=view_size,
            coarse=coarse,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        check_no_model(out)
        with show_step(f"saving {out}"), write_whole_folder(out, MODEL_FILES) as part:
            save(model, processor, part)
    echo(f"{describe_model(model)}\n\nwrote {out}; its fusion is untrained")


@app.command()
def upgrade(
    base: Annotated[str, argument("A pretrained VLM: folder or hub name.", "BASE")],
    out: Annotated[Path, output_folder("Folder to write the shortcuts to.")],
    plan: Annotated[
        Text,
        option(
            "A method's name, or a file with a plan. Default: sparsecut, narrow projectors.",
            autocompletion=complete_plan,
        ),
    ] = None,
    method_options: MethodOptions = None,
    whole: Annotated[
        bool, option("Write the base model too, so that the folder needs nothing else.", "--whole")
    ] = False,
) -> None:
    """Add untrained shortcuts to a pretrained VLM. Until trained, it answers exactly as before."""
    from .plan_argument import check_no_model, describe_model, read_upgrade_plan

    spec = read_upgrade_plan(plan, method_options or [])
    check_no_model(out)
    check_spec(spec)
    check_model_files(base, "base")
    from ..building import save
    from ..card import write_card
    from ..profiling.upgraded import count_upgrade, format_upgrade_cost
    from ..sharing import describe_folder
    from ..upgrading import upgrade

    with claim_new_folder(out):
        model, processor = upgrade(base, spec)
        check_no_model(out)
        with show_step(f"saving {out}"), write_whole_folder(out, MODEL_FILES) as part:
            if whole:
                save(model, processor, part)
            else:
                model.save_fusion(part)
                write_card(part, describe_folder(part))
    with show_step("counting what the shortcuts cost"):
        cost = format_upgrade_cost(count_upgrade(model, processor))
    echo(f"{describe_model(model)}\n\n{cost}\n\nwrote {out}; its shortcuts are untrained")


@app.command()
def convert(
    checkpoint: Annotated[Path, argument("Folder that the released code saved.")],
    out: Annotated[Path, argument("Folder to write our model to.")],
    vision: Annotated[
        str,
        option("The vision tower it was trained with: hub name or folder."),
    ],
    fusion: Annotated[
        Text,
        option("cross_mlp, cross_attention or mlp2x_gelu. Default: from config.json."),
    ] = None,
    taps: Annotated[
        Text,
        option("Encoder blocks, 0 = after the first, as 0,3,6; or none. Default: as released."),
    ] = None,
    layers: Annotated[
        Text, option("The decoder layer of each tap, as 4,9,14; or none. Default: as released.")
    ] = None,
) -> None:
    """Convert a checkpoint of the released SparseCut code into a model of this library."""
    from .plan_argument import check_no_model, describe_model, parse_numbers

    check_writable_folder(out)
    check_no_model(out)
    pairs = {"taps": parse_numbers("--taps", taps), "layers": parse_numbers("--layers", layers)}
    check_model_files(vision, "vision tower")
    check_holds(checkpoint, ["config.json"], "give the folder that the released code saved")
    if fusion is not None:
        check_choice("--fusion", fusion, FUSIONS)
    from ..conversion.checkpoint import convert

    with (
        claim_new_folder(out),
        show_step(f"converting {checkpoint}"),
        write_whole_folder(out, MODEL_FILES) as part,
    ):
        model, _ = convert(checkpoint, part, vision=vision, fusion=fusion, **pairs)
    echo(f"{describe_model(model)}\n\nwrote {out}")
