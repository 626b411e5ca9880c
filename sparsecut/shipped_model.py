"""The trained model that ships with the package, by its name, and the two backbones inside it.

It is imported before any model library.
"""

from __future__ import annotations

from pathlib import Path

from .schema import read_json_file

SHIPPED_MODEL = "shapes"  # as `build` names the two backbones that it was made of
SHIPPED_FOLDER = Path(__file__).parent / "shapes" / "final"  # requests call it "shapes"
BACKBONES_FOLDER = Path(__file__).parent / "shapes" / "weights"  # the two it was made of
DEPTH_KEYS = ("num_hidden_layers", "n_layer")  # of their configurations
MODEL_FILES = ("config.json", "fusion.json")  # one of them says that a folder holds a model


def find_shipped_model(name: str | Path) -> str | Path:
    """Return the folder of the shipped model where a name means it, and any other name as it is.

    A folder of that name in the working directory comes first where it holds a model.
    """
    if str(name) != SHIPPED_MODEL:
        return name
    if any((Path(SHIPPED_MODEL) / file).is_file() for file in MODEL_FILES):
        return name
    return str(SHIPPED_FOLDER)


def name_model(folder: str | Path) -> str:
    """Return what a user calls the model of a folder: the shipped model's name, else the folder."""
    return SHIPPED_MODEL if Path(folder) == SHIPPED_FOLDER else str(folder)


def read_backbone_depth(part: str) -> int:
    """Read how many blocks or layers a built-in backbone has, without a model library.

    Args:
        part: "vision" or "language".
    """
    config = read_json_file(BACKBONES_FOLDER / part / "config.json")
    return next(config[key] for key in DEPTH_KEYS if key in config)
