"""Checks files before they are committed: their size, and that YAML, TOML and JSON can be read.

python .ci/check_files.py FILE...
"""

import json
import sys
import tomllib
from pathlib import Path

import yaml

LARGEST = 2_000_000  # bytes; the shipped encoder has 1.9 million


class TagLoader(yaml.SafeLoader):
    """Reads tags of other programs, such as `!!python/name:`, as plain values."""


TagLoader.add_multi_constructor("", lambda loader, suffix, node: None)
READERS = {
    ".yaml": lambda text: list(yaml.load_all(text, Loader=TagLoader)),
    ".yml": lambda text: list(yaml.load_all(text, Loader=TagLoader)),
    ".cff": yaml.safe_load,
    ".toml": tomllib.loads,
    ".json": json.loads,
    ".ipynb": json.loads,
}


def find_problem(path: Path) -> str | None:
    """What is wrong with a file, or None."""
    size = path.stat().st_size
    if size > LARGEST:
        return f"{size:,} bytes, but a file of the project has at most {LARGEST:,}"
    read = READERS.get(path.suffix)
    if read is None:
        return None
    try:
        read(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        return " ".join(str(error).split())
    return None


def main() -> int:
    """Check the files of the command line; returns 1 where one is wrong."""
    problems = {name: find_problem(Path(name)) for name in sys.argv[1:] if Path(name).is_file()}
    found = {name: problem for name, problem in problems.items() if problem}
    for name, problem in found.items():
        print(f"{name}: {problem}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
