"""`sparsecut shapes`: the built-in drawn images and their two small backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..config.folder_lock import claim_new_folder
from ..config.paths import check_writable_folder
from ..config.places import check_model_files
from ..schema import UserError
from ..waits import show_step
from .app import (
    SETTINGS,
    App,
    Device,
    app,
    argument,
    echo,
    find_device,
    find_model,
    load_model,
    option,
    output_folder,
)
from .early_checks import check_device

shapes_app = App(
    help="The built-in drawn images, and the two small backbones made for them.", **SETTINGS
)
app.add_typer(shapes_app, name="shapes")


PASS_ON = {"ignore_unknown_options": True, "help_option_names": []}


@app.command("world", hidden=True, context_settings=PASS_ON)
def run_under_its_old_name(arguments: Annotated[list[str] | None, argument("")] = None) -> None:
    """`sparsecut shapes` under its old name, with a line that names the new one."""
    echo("`sparsecut world` is now called `sparsecut shapes`", err=True)
    app(args=["shapes", *(arguments or [])], prog_name="sparsecut")


@shapes_app.command("draw")
def draw(
    folder: Annotated[Path, argument("Folder for images and questions.")],
    train: Annotated[int, option("Number of training images.", min=0)] = 1000,
    dev: Annotated[int, option("Number of dev images, to choose by.", min=0)] = 100,
    test: Annotated[int, option("Number of test images, to report on.", min=0)] = 100,
    questions: Annotated[int, option("Questions about each image.", min=1)] = 12,
    seed: Annotated[int, option("Equal seeds give equal files.")] = 0,
    size: Annotated[
        str, option("small (96 x 96 pixels) or large (192 x 192, more things).")
    ] = "small",
) -> None:
    """Draw images with questions in LLaVA's format, split by split."""
    from ..shapes import write_split

    check_writable_folder(folder)
    numbers = {"train": train, "dev": dev, "test": test}
    with claim_new_folder(folder):
        for split, number in numbers.items():
            if number:
                write_split(folder, split, number, questions, seed=seed, size=size)
                echo(f"{split}: {number} images, {folder}/{split}.json")


@shapes_app.command("pretrain")
def pretrain(
    out: Annotated[Path, output_folder("Folder for the two backbones.")] = Path("runs/shapes"),
    seed: Annotated[int, option("Seed of all random choices.")] = 0,
    noise: Annotated[
        float, option("Noise before the encoder's last blocks; see shapes/vision.py.")
    ] = 3.0,
    quick: Annotated[
        bool, option("Run a few steps only, to see that it works.", "--quick")
    ] = False,
    size: Annotated[str, option("small (the shipped ones) or large (for a GPU).")] = "small",
    device: Annotated[
        str, option("Where to compute, such as cpu or cuda.", callback=check_device)
    ] = "cpu",
    overwrite: Annotated[
        bool, option("Replace two backbones that --out holds already.", "--overwrite")
    ] = False,
) -> None:
    """Train the encoder and the language model for the drawn images from scratch."""
    from ..shapes.sizes import find_size

    find_size(size)
    made = [name for name in ("vision", "language") if (out / name / "config.json").is_file()]
    if len(made) == 2 and not overwrite:
        raise UserError(
            f"{out} holds two trained backbones; give another --out, or add --overwrite to train"
            " them again"
        )
    from ..shapes import pretrain

    settings = {"seed": seed, "noise": noise, "quick": quick, "size": size}
    with claim_new_folder(out):
        pretrain(out, **settings, device=find_device(device), log=echo)


@shapes_app.command("point")
def point(
    models: Annotated[
        list[str], argument("Models that answer the questions, trained on them.", "MODEL...")
    ],
    data: Annotated[
        Path | None,
        option(
            "A file of questions of your own, each with `region`: [left, top, right, bottom] as"
            " fractions of its image. Default: drawn shapes."
        ),
    ] = None,
    images: Annotated[
        int, option("Number of images, with a question for each detail.", min=1)
    ] = 100,
    most: Annotated[int, option("Maximum number of questions for each shortcut.", min=1)] = 100,
    seed: Annotated[int, option("Seed of the images, and of the shuffled maps.")] = 0,
    max_new_tokens: Annotated[int, option("Longest answer, in tokens.", min=1)] = 2,
    out: Annotated[Path | None, option("A new JSON file for the numbers.")] = None,
    device: Device = None,
) -> None:
    """Check heat maps against details at known places: the share of maps that peak there."""
    if out is not None and out.exists():
        raise UserError(f"--out is {out}, which exists and would be replaced; name a new file")
    places = [find_model(model, "shapes point") for model in models]
    for place in places:
        check_model_files(place)
    import json

    from ..experiments.pointing import make_items, play, read_items
    from ..reports.pointing import make_table
    from ..schema import write_text_file

    items = make_items(images, seed) if data is None else read_items(data)
    settings = {"most": most, "seed": seed, "max_new_tokens": max_new_tokens}
    rows = []
    for model, place in zip(models, places, strict=True):
        loaded, processor = load_model(place, device)
        with show_step(model) as progress:
            found = play(loaded, processor, items, **settings, progress=progress)
        rows += [{"model": model, **row} for row in found]
    echo(make_table(rows))
    if out is not None:
        write_text_file(out, json.dumps(rows, indent=1) + "\n")
