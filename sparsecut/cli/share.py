"""Commands that hand a saved model on: its card, and its folder to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..hub import check_hub_answers, looks_like_hub_name
from ..schema import UserError
from ..shipped_model import MODEL_FILES
from .app import File, Text, app, argument, check_output_folder, echo, option
from .early_checks import check_holds

SavedFolder = Annotated[Path, argument("The folder of a saved model or of shortcuts.", "FOLDER")]


@app.command()
def card(
    folder: SavedFolder,
    scores: Annotated[
        list[Path] | None,
        option("Output folder of an evaluation (`eval --out`); may be repeated."),
    ] = None,
    overwrite: Annotated[
        bool, option("Replace a card that was edited by hand.", "--overwrite")
    ] = False,
) -> None:
    """Write a model's card (README.md): its plan, parts, licences, data, scores and use."""
    _check_folder(folder)
    check_holds(folder, MODEL_FILES, f"give the folder of a saved model, such as {folder}/final")
    for out in scores or []:
        check_holds(out, ["result.json", "*/result.json"], "give what `sparsecut eval --out` wrote")
    from ..card import CARD
    from ..sharing import read_scores
    from ..training.run_card import find_recipe, write_run_card

    found = []
    for out in scores or []:
        found += read_scores(out)
    recipe = find_recipe(folder)
    if overwrite:
        (folder / CARD).unlink(missing_ok=True)
    if not write_run_card(folder, recipe, tuple(found)):
        raise UserError(
            f"{folder / CARD} was edited by hand and stays as it is; add --overwrite to replace it"
        )
    echo(f"wrote {folder / CARD}")


@app.command()
def push(
    folder: SavedFolder,
    name: Annotated[str, argument("The repository's name on the hub, owner/model.", "NAME")],
    private: Annotated[bool, option("Make a new repository private.", "--private")] = False,
    token: Annotated[Text, option("Token of the hub. Default: that of `hf auth login`.")] = None,
    dry_run: Annotated[
        File,
        option(
            "Write what would be pushed to this folder, and push nothing.",
            callback=check_output_folder,
        ),
    ] = None,
) -> None:
    """Push a saved model to the Hugging Face hub: weights, processor, code, adapters and card."""
    _check_folder(folder)
    if dry_run is None and looks_like_hub_name(name):
        check_hub_answers(name, token)
    check_holds(folder, MODEL_FILES, f"give the folder of a saved model, such as {folder}/final")
    from ..sharing import push_folder

    address = push_folder(folder, name, private=private or None, token=token, dry_run=dry_run)
    echo(f"{'wrote' if dry_run else 'pushed to'} {address}")


def _check_folder(folder: Path) -> None:
    """Raise UserError for a folder that is not there, before anything slow is imported."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder of a saved model")
