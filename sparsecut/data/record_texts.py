"""Files of records in text, which gzip may have compressed."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import IO

GZIP = ".gz"


def find_suffix(path: Path) -> str:
    """Return the ending that tells what a file of records holds, in small letters.

    Args:
        path: The file; of data.jsonl.gz the ending is .jsonl.
    """
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending == GZIP else ending


def open_text(path: Path) -> IO:
    """Open a file of records to read its bytes, unpacked as they are read."""
    return gzip.open(path) if path.suffix.lower() == GZIP else path.open("rb")
