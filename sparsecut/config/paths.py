"""Folders that a user names for results, checked before anything is computed for them."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..schema import UserError, read_json_file

PACKAGE = Path(__file__).parents[1]
# Modules whose classes transformers loads from a folder.
CODE_ROOTS = ("modeling", "modeling_upgraded", "processing", "processing_upgraded")


def check_writable_folder(folder: str | Path) -> None:
    """Check that a folder exists and can be written, or can be made.

    Raises:
        UserError: A file stands in its place or above it, or it may not be written.
    """
    path = Path(folder)
    existing = path
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
    except (OSError, ValueError) as error:  # a name that is too long, or has a null byte
        raise UserError(f"{str(path)[:40]!r} cannot be a folder: {error}; name another") from error
    if not existing.is_dir():
        raise UserError(f"{path} cannot be a folder, because {existing} is a file; name another")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{path} cannot be written in {existing} ({error.strerror}); name another"
        ) from error


@contextmanager
def write_whole_folder(folder: str | Path, last: Collection[str]) -> Iterator[Path]:
    """Have files appear in a folder all together, when the block ends, or not at all.

    Args:
        folder: The folder; it is made, and removed again where the block fails.
        last: Names of files by which others know that the folder is whole. They come last.

    Yields:
        A folder of the same name to write the files to.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    around = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    try:
        part = around / folder.absolute().name
        part.mkdir()
        for path in folder.glob("README.md"):  # whoever writes a card keeps one that was edited
            shutil.copy2(path, part)
        yield part
        for path in sorted(part.iterdir(), key=lambda path: path.name in last):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(around, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # it holds the files
                folder.rmdir()


def list_code_files() -> list[str]:
    """Names of the source files that are saved beside models and processors, of any kind."""
    names, waiting = set(), list(CODE_ROOTS)
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
            waiting += re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)
    return sorted(f"{name}.py" for name in names)


def check_replaceable(folder: str | Path, names: Collection[str], owner: str) -> None:
    """Check that files of a folder may be replaced: that they are of an earlier run of the same.

    Args:
        folder: A folder that results are written to.
        names: Files and folders that will be written there, as patterns.
        owner: One of the files, which says whose the others are. Where it is JSON that names keys,
            as "compare.json: baseline, runs", these must be in it.

    Raises:
        UserError: There is one of the files, but no owner.
    """
    folder = Path(folder)
    name, _, keys = owner.partition(": ")
    present = sorted(path.name for pattern in names for path in folder.glob(pattern))
    if not present or _has_keys(folder / name, [key for key in keys.split(", ") if key]):
        return
    raise UserError(
        f"{folder} holds {', '.join(present[:3])} of something else, which would be replaced; give"
        " another folder, or move it away"
    )


def _has_keys(file: Path, keys: list[str]) -> bool:
    """Whether there is a file and, where keys are named, a JSON file with all of them."""
    if not file.is_file() or not keys:
        return file.is_file()
    try:
        return set(keys) <= set(read_json_file(file))
    except UserError:
        return False
