"""Files named where something else belongs, told by what they are, with what to type instead."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..schema import UserError, read_text_file
from ..shipped_model import SHIPPED_MODEL
from .yaml_io import read_yaml

KINDS = {  # what files are by the ends of their names
    "an image": (
        *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
        *(".ppm", ".svg", ".heic"),
    ),
    "a sound file": (".wav", ".flac", ".mp3", ".ogg"),
    "data": (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".tar", ".gz"),
    "a recipe": (".yaml", ".yml"),
}
# What to type, where such a file stands in the place of the model.
LINES = {
    ("an image", "chat"): "sparsecut chat {model} {file}",
    ("a sound file", "chat"): "sparsecut chat MODEL --audio {file}",
    ("data", "eval"): "sparsecut eval {model} --data {file}",
    ("data", "explain"): "sparsecut explain {model} --data {file}",
}


def name_kind(name: str | Path) -> str | None:
    """Return what a file is by its name, such as "an image"; None for names of other ends."""
    end = Path(name).suffix.lower()
    return next((kind for kind, ends in KINDS.items() if end in ends), None)


def check_no_file(name: str, command: str) -> None:
    """Check that what stands in the place of a model is no file, by its name or on the disk.

    Args:
        name: What was typed.
        command: The command's name.

    Raises:
        UserError: It is a file; the message has a line to type, with the shipped model.
    """
    kind, is_here = name_kind(name), _is_file(Path(name))
    if Path(name).is_dir() or (kind is None and not is_here):
        return
    what = f"{kind} by its name" if kind else "a file"
    line = LINES.get((kind or "", command), f"sparsecut {command} {{model}}")
    missing = "" if is_here else f" (and there is no file {name})"
    raise UserError(
        f"MODEL is {name}, which is {what}{missing}, but the model comes first: a folder or a hub"
        f" name; type for example: {line.format(model=SHIPPED_MODEL, file=name)}"
        f" ({SHIPPED_MODEL} names the model that ships with the package)"
    )


def read_settings_file(path: Path, kind: str) -> Any:
    """Return what a file of settings holds, as YAML.

    Args:
        path: The file.
        kind: What it must be: "recipe", "study" or "plan".

    Raises:
        UserError: It cannot be read, or is an image, a sound, or records.
    """
    remedy = (
        f"a {kind} is YAML, which names data under `data: {{path: {path}}}`; `sparsecut recipes`"
        " lists examples"
    )
    named = name_kind(path)
    is_records = named == "data" and path.suffix != ".json"
    if named in ("an image", "a sound file") or is_records:
        raise UserError(f"{path} is {named} by its name, but {remedy}")
    text = read_text_file(path)
    values = _read_json_list(text)
    if values is None:  # PyYAML would read a long file of JSON for minutes
        values = read_yaml(text, str(path))
    if isinstance(values, list) and all(isinstance(value, dict) for value in values):
        number = "1 record" if len(values) == 1 else f"{len(values):,} records"
        raise UserError(f"{path} is a list of {number}, which is data, but {remedy}")
    return values


def _read_json_list(text: str) -> list | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def find_neighbour(path: str | Path, ends: Collection[str] = ()) -> str:
    """Return a hint at a file whose name is like that of one that is missing; or nothing.

    Args:
        path: The missing file.
        ends: Ends of names to look among; empty for all.
    """
    path = Path(path)
    try:
        names = sorted(os.listdir(path.parent))
    except (OSError, ValueError):  # no folder, or no path at all
        return ""
    names = [name for name in names if not ends or Path(name).suffix in ends]
    same = [name for name in names if Path(name).stem.lower() == path.stem.lower()]
    close = same or difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {str(path.parent / close[0])!r}?)" if close else ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null byte
        return False
