"""What a shell completes: names of recipes, studies, plans and methods, beside files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..config.shipped import list_shipped
from ..methods import METHODS


def complete_shipped(*kinds: str) -> Callable[[str], list[str]]:
    """A completion by the names of what ships with the package, and by files here.

    Args:
        kinds: Kinds of files, as in `shipped.FOLDERS`.
    """

    def complete(incomplete: str) -> list[str]:
        names = [one.name for kind in kinds for one in list_shipped(kind)]
        return _keep(names, incomplete) + _list_files(incomplete)

    return complete


def complete_long_name(incomplete: str) -> list[str]:
    """Everything that ships with the package, with its folder."""
    return _keep([one.long_name for one in list_shipped()], incomplete)


def complete_plan(incomplete: str) -> list[str]:
    """Methods, recipes that ship with the package, and files here."""
    names = [*METHODS, *(one.name for one in list_shipped("recipe"))]
    return _keep(names, incomplete) + _list_files(incomplete)


def _keep(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _list_files(incomplete: str) -> list[str]:
    """Files and folders that begin as typed; a folder ends with a slash."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    start = "" if incomplete.endswith("/") else typed.name
    try:
        found = sorted(path for path in folder.iterdir() if path.name.startswith(start))
    except OSError:
        return []
    prefix = incomplete[: len(incomplete) - len(start)]
    visible = [path for path in found if start or not path.name.startswith(".")]
    return [f"{prefix}{path.name}{'/' if path.is_dir() else ''}" for path in visible]
