"""The name under which requests call a model."""

from __future__ import annotations

from pathlib import Path


def get_default_name(model: str | Path) -> str:
    """The folder's name; of .../final, as training writes it, the name of the folder above."""
    folder = Path(model)
    if folder.is_dir():
        folder = folder.resolve()
    return folder.parent.name if folder.name == "final" else folder.name
