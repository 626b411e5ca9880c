"""The model card of a run: what the model was trained on, as its recipe says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..card import ModelFacts, Score, is_hub_name, write_card
from ..config.recipe import Recipe, load_recipe
from ..config.yaml_io import expand_path
from ..sharing import describe_folder
from .run_dir import RECIPE


def write_run_card(folder: Path, recipe: Recipe | None, scores: tuple[Score, ...] = ()) -> bool:
    """Write the card of a trained model; one that a user has edited stays.

    Args:
        folder: The model's folder.
        recipe: The recipe of its run, None where there is none.
        scores: What an evaluation found.

    Returns:
        Whether it was written.
    """
    facts = replace(describe_folder(folder), scores=scores)
    if recipe is not None:
        facts = _add_data(facts, recipe)
    # The run's folder tells more than its "final".
    name = "/".join(folder.resolve().parts[-2:]) if folder.name == "final" else None
    return write_card(folder, facts, name=name)


def find_recipe(folder: Path) -> Recipe | None:
    """The recipe that a run has left beside its model, None where there is none."""
    file = folder / RECIPE
    return load_recipe(file) if file.is_file() else None


def _add_data(facts: ModelFacts, recipe: Recipe) -> ModelFacts:
    lines, datasets = [], []
    for stage in recipe.stages:
        for source in stage.data:
            path = source.path
            on_hub = "/" in path and is_hub_name(path) and not Path(expand_path(path)).exists()
            if on_hub:
                datasets.append(path)
            shown = path if on_hub else Path(path).name
            parts = ", ".join(stage.train)
            lines.append(f"`{shown.replace('`', '')}` in stage {stage.name}, which trains {parts}")
    unique = tuple(dict.fromkeys(datasets))
    return replace(facts, data=tuple(lines), datasets=unique)
