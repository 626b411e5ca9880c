"""What the package needs is what it says: dependencies, extras, and nothing that only Unix has."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Names of modules that differ from those of their distributions.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
UNIX_ONLY = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline"}
# Never imported unless they are there: the code asks first, or an argument of transformers names them.
OPTIONAL = {"liger_kernel", "deepspeed", "bitsandbytes"}


def read_imports(path: Path) -> dict[str, set[str]]:
    """The packages a file imports: "top" as soon as it is imported.

    "inner" ones are imported in a function, or in a `try` that goes on without.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try):
            inner |= {id(child) for child in ast.walk(node)}
    found = {"top": set(), "inner": set()}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        found["inner" if id(node) in inner else "top"] |= {name.split(".")[0] for name in names}
    return found


def spell(name: str) -> str:
    """A distribution's name as registries compare it."""
    return DISTRIBUTIONS.get(name, name).lower().replace("_", "-")


def read_names(requirements: list[str]) -> set[str]:
    """The names of requirements."""
    return {spell(re.match(r"[\w.-]+", one)[0]) for one in requirements}


CORE = read_names(PROJECT["dependencies"])
EXTRAS = {extra: read_names(names) for extra, names in PROJECT["optional-dependencies"].items()}
FILES = sorted((ROOT / "sparsecut").rglob("*.py"))


def test_every_import_is_of_a_declared_package():
    optional = set().union(*EXTRAS.values())
    for path in FILES:
        imports = read_imports(path)
        foreign = (imports["top"] | imports["inner"]) - sys.stdlib_module_names - OPTIONAL
        names = {spell(name) for name in foreign - {"sparsecut"}}
        assert names <= CORE | optional, f"{path.relative_to(ROOT)}: {names - CORE - optional}"


def test_no_module_needs_unix_to_be_imported():
    for path in FILES:
        assert not read_imports(path)["top"] & UNIX_ONLY, path


def test_a_floor_is_never_above_what_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    pinned = {spell(name): version for name, version in pairs}
    everything = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    for requirement in everything:
        name, floor = re.match(r"([\w.-]+)>=([\d.]+)", requirement).groups()
        version = pinned[spell(name)].split("+")[0]
        as_numbers = [[int(part) for part in text.split(".")] for text in (version, floor)]
        assert as_numbers[0] >= as_numbers[1], requirement
