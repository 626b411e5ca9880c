"""What the package needs is what it says: dependencies, extras, and nothing that only Unix has."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import sparsecut

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Names of modules that differ from those of their distributions.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
UNIX_ONLY = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline"}
# Imported only where they are there: the code asks first, or an argument of transformers names
# them.
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


def test_every_file_of_the_package_is_in_the_wheel():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = pyproject["tool"]["setuptools"]["package-data"]["sparsecut"]
    package = ROOT / "sparsecut"
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    for path in package.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert path in packed, path


def test_nothing_in_the_package_reads_files_of_the_repository():
    outside = {"docs", "benchmarks", "examples", "tests", "configs"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_join = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
            if is_join and isinstance(node.right, ast.Constant):
                assert node.right.value not in outside, f"{path}:{node.lineno}"


def test_files_that_read_linux_catch_their_absence():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        if any(str(text).startswith(("/proc/", "/sys/")) for text in texts):
            handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
            caught = {name for one in handlers for name in re.findall(r"\w+", ast.dump(one.type))}
            assert "OSError" in caught, f"{path} reads files of Linux alone"


def test_every_python_that_is_allowed_can_compile_the_package():
    lowest = tuple(map(int, re.search(r"(\d+)\.(\d+)", PROJECT["requires-python"]).groups()))
    for path in FILES:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=lowest)


def test_scripts_above_the_clone_find_an_editable_installation(tmp_path):
    pytest.importorskip("setuptools", minversion="77")  # the first that reads our licence
    (tmp_path / "clone").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "clone")
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    shutil.copytree(ROOT / "sparsecut" / "shapes", tmp_path / "clone" / "sparsecut")
    command = (
        f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path / "clone", check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        # A finder would come after the folder of the clone, which is a package without a file.
        assert [Path(name).suffix for name in names] == [".pth"]
        assert wheel.read(names[0]).decode().strip() == str(tmp_path / "clone")


def test_its_facts_agree():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cff["version"] == PROJECT["version"] == sparsecut.__version__
    assert cff["license"] == PROJECT["license"]
    assert cff["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]
    assert "2602.00505" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_files_are_checked_before_a_commit(tmp_path):
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    assert {entry.split("/")[2].split()[0] for entry in entries} == {"ruff", "python"}
    script = ROOT / ".ci" / "check_files.py"
    assert any(script.name in entry for entry in entries)
    bad = {"a.yaml": "a: [", "b.json": "{", "c.toml": "=", "d.txt": "x" * 2_100_000}
    for name, text in bad.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    own = [path for path in ROOT.glob("*.*") if path.is_file()]
    own += [*ROOT.glob("sparsecut/recipes/**/*.*"), *ROOT.glob("sparsecut/shapes/weights/*/*")]
    command = [sys.executable, script]
    assert subprocess.run([*command, *own]).returncode == 0
    done = subprocess.run(
        [*command, *(tmp_path / name for name in bad)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert all(name in done.stdout for name in bad)
