"""Records that a process reads once for many runs, as a study's processes do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from ..config.source import Source
from .file_facts import read_stamp
from .record_files import RecordFile

CHOOSING = ("where", "hold_out", "keep", "dev", "side", "text_only", "group", "weight")
KEPT: dict[str, list] = {}  # what was read -> all its examples
_is_keeping = False


@contextmanager
def keep_records() -> Iterator[None]:
    """Keep what is read inside the block, for sources that choose other records of the same files.

    Files that have changed are read again. Memory holds all records until the block ends.
    """
    global _is_keeping
    before, _is_keeping = _is_keeping, True
    try:
        yield
    finally:
        _is_keeping = before
        if not before:
            KEPT.clear()


def describe_reading(source: Source, files: Sequence[RecordFile]) -> str | None:
    """What reading all of a source depends on; None where nothing is kept.

    A source that skips bad records is not kept, because it also reports them.
    """
    if not _is_keeping or source.on_error == "skip":
        return None
    values = {key: value for key, value in asdict(source).items() if key not in CHOOSING}
    stamps = [[str(stored), *read_stamp(stored)] for file in files for stored in file.list_stored()]
    return json.dumps([values, stamps])
