"""The house rules: who imports whom, how long files are, which names are public, and that documents hold what they show."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparsecut"
LAYERS = [  # a module imports from earlier rows, or from its own family; modules of a row do not import one another
    {"plan"},
    {"peers"},
    {
        "methods",
        "recipe",
        "checked",
        "yaml_text",
        "drawing",
        "registration",
        "charts",
        "plots",
        "scoring",
        "statistics",
        "study",
    },
    {"mixers", "outputs", "body", "identity", "encoders"},
    {"fusion", "graft", "world"},
    {"families"},
    {"configuration", "configuration_upgraded", "overlay"},
    {"modeling", "upgraded", "processing", "fine_views", "prompting"},
    {"audio"},
    {"upgrading", "adapters"},
    {
        "building",
        "official",
        "data",
        "labels",
        "base_labels",
        "records",
        "shards",
        "pictures",
        "states",
        "streams",
        "answers",
        "kept",
        "checking",
    },
    {
        "convert",
        "training",
        "stage_trainer",
        "arguments",
        "batching",
        "parts",
        "shortcut_watch",
        "run_folder",
        "stopping",
        "progress",
        "evaluation",
        "eval_folder",
        "chat",
        "serving",
        "fetching",
        "wire",
        "sketch",
        "cost",
        "timing",
        "upgrade_cost",
    },
    {
        "study_runner",
        "search",
        "desk",
        "explain",
        "explain_page",
        "compare",
        "compare_page",
        "report",
        "demo",
        "demo_report",
        "study_report",
        "study_figures",
        "study_tables",
        "study_page",
        "dry_run",
        "dry_data",
        "dry_model",
    },
    {"server", "web_page", "lmms", "tasks"},
    {"cli", "cli_eval", "cli_study", "cli_models", "cli_serve"},
]
FAMILIES = [
    {"data", "labels", "base_labels", "records", "shards", "pictures", "states", "streams", "checking"},
    {"recipe", "checked", "yaml_text", "study"},
    {
        "training",
        "stage_trainer",
        "arguments",
        "batching",
        "parts",
        "shortcut_watch",
        "run_folder",
        "stopping",
        "progress",
    },
    {
        "demo",
        "demo_report",
        "report",
        "study_runner",
        "search",
        "study_report",
        "study_figures",
        "study_tables",
        "study_page",
    },
    {"explain", "explain_page"},
    {"dry_run", "dry_data", "dry_model"},
    {"compare", "compare_page", "report"},
    {"charts", "plots"},
    {"evaluation", "eval_folder"},
    {"report", "study_report", "study_figures", "study_tables", "study_page"},
    {"cost", "timing", "upgrade_cost"},
    {"cli", "cli_eval", "cli_study", "cli_models", "cli_serve"},
]
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__"))
FOLDERS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))
PRIVATE_TO_GRAFT = ("output_capturing", "modeling_layers", "masking_utils")


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        depth = len(path.relative_to(PACKAGE).parts)
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsecut."):
            found.add(node.module.split(".")[1])
    return found & {*MODULES, *FOLDERS}


def row(module: str) -> int:
    places = [i for i, names in enumerate(LAYERS) if module in names]
    assert places, f"{module} stands in no layer of tests/test_house.py; give it one"
    return places[0]


# The lazy registration of the Auto classes is the one import that goes against the grain, and says so.
ALLOWED = {
    ("registration", name)
    for name in ("configuration", "modeling", "processing", "configuration_upgraded", "upgraded", "fine_views", "audio")
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    for other in imports(PACKAGE / f"{module}.py") - {module}:
        family = any({module, other} <= f for f in FAMILIES)
        assert family or (module, other) in ALLOWED or row(other) < row(module), f"{module} imports {other}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_of_folders_go_one_way(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        for other in imports(path) - {folder}:
            assert row(other) < row(folder), f"{path} imports {other}"


def test_facts_know_nothing_of_torch():
    code = "import sparsecut, sparsecut.plan, sparsecut.methods, sparsecut.recipe, sparsecut.drawing, sys;"
    code += "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_private_names_of_transformers_stay_in_graft():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "graft.py":
            assert not any(name in path.read_text() for name in PRIVATE_TO_GRAFT), path


def test_files_can_be_read_in_one_sitting():
    for path in [*ROOT.glob("sparsecut/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert len(path.read_text().splitlines()) <= 300, path


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

    found = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(found) >= 4
    for path in found:
        assert load_recipe(path).stages, path


def test_every_method_has_a_file_with_its_defaults():
    from sparsecut.methods import METHODS, make_plan
    from sparsecut.cli.plan_argument import read_plan

    assert {path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")} == set(METHODS)
    for name in METHODS:
        depths = 24, 32 if name == "official_7b_as_run" else 40
        spec = read_plan(str(ROOT / "configs" / "methods" / f"{name}.yaml"), [])
        assert make_plan(spec, *depths) == make_plan(name, *depths), name


def test_the_readme_names_files_that_exist():
    tree = re.search(r"```text\n(sparsecut/\n.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert tree, "the README has no file tree"
    for line in tree[1].splitlines()[1:]:
        name = re.match(r"[ |`+-]*([\w./-]+)", line)[1]
        assert list(ROOT.glob(name)) or list(PACKAGE.glob(name)), f"{name} stands in the README's tree only"


def test_nothing_unfinished_is_left():
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("tests/*.py")]:
        assert not any(w in path.read_text() for w in words), path
