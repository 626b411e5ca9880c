"""The house rules: who imports whom, how long files are, which names are public, and that documents
hold what they show.
"""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparsecut"
# A module imports from its own room and from rooms to its left, never from the right.
ROOMS = [  # left to right
    "waits",
    "method",
    "model",
    "chat_templates",
    "assembly",
    "config",
    "data",
    "evaluation",
    "training",
    "profiling",
    "conversion",
    "serving",
    "shapes",
    "experiments",
    "reports",
    "cli",
]
METHOD = ["schema", "kinds", "plan", "methods", "baselines", "mixers", "gates", "fusion"]
ASSEMBLY = [
    "building",
    "backbones",
    "replanning",
    "upgrading",
    "fingerprint",
    "prompts",
    "chat",
    "card",
    "drawing",
    "sharing",
    "licences",
]
# The lazy registration of the Auto classes: a configuration's end registers its model class.
AGAINST_THE_GRAIN = {"registration"}
PRIVATE_TO_HOOKS = ("output_capturing", "modeling_layers", "masking_utils")


def name_of(path: Path) -> str:
    """The dotted name of a file below the package, without `sparsecut.`; "" for its own init."""
    return (
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .strip(".")
    )


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(name: str) -> set[str]:
    """Modules of this package that a module imports, wherever in its file."""
    path = MODULES[name]
    home = path.parent.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = home[: len(home) - node.level + 1]
        elif (node.module or "").split(".")[0] == "sparsecut":
            base = ()
        else:
            continue
        module = (node.module or "").removeprefix("sparsecut").strip(".")
        source = ".".join([*base, module]).strip(".")
        for alias in node.names:
            inner = f"{source}.{alias.name}".strip(".")
            found.add(inner if inner in MODULES else source)
    return found - {name, ""}


def room_of(name: str) -> str:
    """The room of a module: its folder, or one of the three that the flat library is made of."""
    if "." in name or MODULES[name].name == "__init__.py":
        return name.split(".")[0]
    if name in METHOD:
        return "method"
    return "assembly" if name in ASSEMBLY else "model"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"", "__main__"}))
def test_imports_go_one_way(name):
    place = ROOMS.index(room_of(name))
    upward = {other for other in imports(name) if ROOMS.index(room_of(other)) > place}
    assert not upward, f"{name} ({room_of(name)}) imports from the right: {sorted(upward)}"


def test_no_modules_import_one_another_in_a_circle():
    graph = {name: imports(name) - AGAINST_THE_GRAIN for name in MODULES if name}
    finished = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in finished:
            for other in graph[name]:
                visit(other, [*path, name])
            finished.add(name)

    for name in graph:
        visit(name, [])


def test_facts_know_nothing_of_torch():
    code = (
        "import sparsecut, sparsecut.plan, sparsecut.methods, sparsecut.config.recipe,"
        " sparsecut.drawing, sys;"
    )
    code += "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_private_names_of_transformers_stay_in_hooks():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "hooks.py":
            assert not any(name in path.read_text() for name in PRIVATE_TO_HOOKS), path


def test_files_can_be_read_in_one_sitting():
    for path in [
        *ROOT.glob("sparsecut/**/*.py"),
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("benchmarks/*.py"),
    ]:
        assert len(path.read_text().splitlines()) <= 450, path


def test_the_public_names_are_there():
    package = importlib.import_module("sparsecut")
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="public names are"):
        package.nothing  # noqa: B018


def test_every_public_thing_has_a_docstring():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_every_recipe_loads():
    from sparsecut.config.recipe import load_recipe

    found = sorted((ROOT / "sparsecut" / "recipes").glob("*.yaml"))
    assert len(found) >= 4
    for path in found:
        assert load_recipe(path).stages, path


def test_every_method_has_a_file_with_its_defaults():
    from sparsecut.cli.plan_argument import read_plan
    from sparsecut.methods import METHODS, make_plan

    assert {
        path.stem for path in (ROOT / "sparsecut" / "recipes" / "methods").glob("*.yaml")
    } == set(METHODS)
    for name in METHODS:
        depths = 24, 32 if name == "official_7b_as_run" else 40
        spec = read_plan(str(ROOT / "sparsecut" / "recipes" / "methods" / f"{name}.yaml"), [])
        assert make_plan(spec, *depths) == make_plan(name, *depths), name


def test_nothing_unfinished_is_left():
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("tests/**/*.py")]:
        assert not any(w in path.read_text() for w in words), path


def test_the_architecture_page_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("```text")[1].split("```")[0]
    words = set(re.findall(r"\w+", tree))
    grouped = ("evaluation.tasks.", "cli.", "profiling.dry_run")  # one line names them together
    names = [name for name in MODULES if name and not name.startswith(grouped)]
    missing = {name for name in names if name.rpartition(".")[2] not in words}
    assert missing == {"__main__"}
    listed = {line[15:].split("  ")[0].strip() for line in tree.splitlines() if line[15:].strip()}
    named = {name.strip(" *") for line in listed for name in line.split(",")}
    leaves = {name.rpartition(".")[2] for name in MODULES} | {"tasks/", "sparsecut/"}
    unknown = {name for name in named if re.fullmatch(r"[a-z_]+", name)} - leaves
    assert not unknown
