"""Recipes, studies, plans and DeepSpeed settings that ship with the package, found by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePath

from ..schema import UserError, nearest, read_text_file
from .mistaken_files import find_neighbour
from .yaml_io import expand_path

logger = logging.getLogger(__name__)

# Kinds of files, with the folder of each and what reads them.
FOLDERS = {"recipe": "", "study": "study", "plan": "methods", "deepspeed": "deepspeed"}
USES = {
    "recipe": "sparsecut train NAME",
    "study": "sparsecut study NAME",
    "plan": "sparsecut show NAME",
    "deepspeed": "args: {deepspeed: NAME}",
}
FILE_TYPES = (".yaml", ".yml", ".json")
OLD_FOLDER = "configs"  # of the repository, before the files shipped with the package


@dataclass(frozen=True)
class Shipped:
    """A file that ships with the package.

    Attributes:
        name: What a user types, such as "tiny" or "shapes".
        kind: One of `FOLDERS`.
        path: The file.
    """

    name: str
    kind: str
    path: Path

    @property
    def long_name(self) -> str:
        """The name with its folder, such as "study/shapes", which is unique over all kinds."""
        return "/".join(filter(None, [FOLDERS[self.kind], self.name]))

    def read_head(self) -> list[str]:
        """The comment lines at the start of the file, without their marks."""
        lines = []
        for line in read_text_file(self.path).splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.removeprefix("#").removeprefix(" "))
        return lines

    def describe(self) -> dict[str, str]:
        """What the file is for: `what`, and for a recipe or study `takes` and `needs`."""
        lines = self.read_head()
        found = {"what": lines[0] if lines else ""}
        for line in lines[1:]:
            if match := re.match(r"(takes|needs): (.+)", line):
                found[match[1]] = match[2]
        return found

    def list_commands(self) -> list[str]:
        """The commands at the head of the file, in their order."""
        return [line.strip() for line in self.read_head() if line.startswith("  ")]


def list_shipped(kind: str | None = None) -> list[Shipped]:
    """List the files of a kind, or of all kinds, by name."""
    found = []
    for one, folder in FOLDERS.items():
        if kind in (None, one):
            paths = sorted(_get_folder(folder).iterdir())
            found += [Shipped(p.stem, one, p) for p in paths if p.suffix in FILE_TYPES]
    return found


def _get_folder(name: str) -> Path:
    return Path(str(files("sparsecut") / "recipes" / name))


def find_shipped(text: str, kinds: Sequence[str]) -> Shipped | None:
    """Find a file by what a user typed.

    Args:
        text: A name ("shapes"), a name with its folder ("study/shapes"), or a path of the
            repository as it was before ("configs/study/shapes.yaml").
        kinds: The kinds to look among, in their order.

    Returns:
        The file, or None where none of these kinds has that name.
    """
    path = PurePath(text)
    is_old = path.parts[:1] == (OLD_FOLDER,) and path.suffix in FILE_TYPES
    if is_old:
        path = PurePath(*path.parts[1:]).with_suffix("")
    for kind in kinds:
        for one in list_shipped(kind):
            if path.as_posix() in (one.long_name, None if is_old else one.name):
                if is_old:
                    logger.warning("%s ships with the package now, as %s", text, one.long_name)
                return one
    return None


def find_file(text: str | Path, kind: str) -> Path:
    """Find a file that a user named: one that exists, else one that ships with the package.

    Args:
        text: A path or a name.
        kind: One of `FOLDERS`.

    Raises:
        UserError: There is neither; the error has the nearest name.
    """
    path = Path(text)
    if _is_file(path):
        return path
    text = path.as_posix()
    shipped = find_shipped(text, [kind])
    if shipped is not None:
        return shipped.path
    other = find_shipped(text, list(FOLDERS))
    if other is not None:
        raise UserError(
            f"{text} is no {kind} but a {other.kind} that ships with the package; use it with"
            f" `{USES[other.kind].replace('NAME', other.name)}`"
        )
    names = [one.name for one in list_shipped(kind)]
    hint = find_neighbour(path, FILE_TYPES) or nearest(path.stem, names)
    raise UserError(
        f"there is no {kind} {text}{hint}; give a file, or one that ships with the package:"
        f" {', '.join(names)}"
    )


def find_deepspeed(text: str) -> Path:
    """Find the file that `args: {deepspeed: ...}` names, by its path or as zero2 or zero3.

    Raises:
        UserError: There is no such file.
    """
    try:
        return find_file(expand_path(text), "deepspeed")
    except UserError as error:
        raise UserError(f"args.deepspeed: {error}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null byte
        return False
