"""The source distribution holds what it should, and its wheel works in an empty folder without the
repository, as somebody who installs the package has it.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = (
    ".git",
    ".venv",
    ".corners",
    "runs",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "project", ignore=shutil.ignore_patterns(*LEFT_OUT))
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "project", check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def program(sdist, tmp_path_factory):
    """The command `sparsecut` of an environment that has the wheel, and packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist]
    subprocess.run(wheel, check=True)
    venv.create(folder / "env")
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    (wheel,) = folder.glob("*.whl")
    install = ["--python", scripts / "python", "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True)
    # A folder in a .pth file is put on the path, but .pth files in it are not read: so what is
    # installed here in editable form stays out.
    (site,) = (folder / "env").rglob("site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    return scripts / "sparsecut"


@pytest.fixture(scope="module")
def run(program, tmp_path_factory):
    """Runs a command in an empty folder; returns what it prints."""
    folder = tmp_path_factory.mktemp("empty")

    def run(*words) -> str:
        settings = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            list(map(str, words)), cwd=folder, env=settings, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    run.folder = folder
    return run


def test_the_source_distribution_has_tests_and_licence(sdist):
    names = ["LICENSE", "README.md", "CITATION.cff", "CHANGELOG.md", "Makefile", "constraints.txt"]
    names += ["tests/conftest.py", "tests/helpers/tiny.py", "tests/conformance/test_wheel.py"]
    names += ["docs/data.md", "examples/slurm.sh", "benchmarks/grid.py", ".ci/run"]
    names += ["sparsecut/py.typed", "sparsecut/recipes/tiny.yaml"]
    assert [name for name in names if not (sdist / name).is_file()] == []
    assert not list(sdist.rglob("*.pyc"))


def test_the_installed_package_is_the_one_that_runs(program, run):
    code = "import sparsecut; print(sparsecut.__file__)"
    python = program.parent / "python"
    assert Path(run(python, "-c", code).strip()).is_relative_to(program.parents[1])


def test_recipes_are_listed_and_tiny_is_trained(program, run):
    assert "  tiny " in run(program, "recipes")
    steps = ("stages.0.args.max_steps=2", "stages.1.args.max_steps=2")
    assert "mean over levels" in run(program, "train", "tiny", *steps)
    assert (run.folder / "runs" / "tiny" / "final" / "config.json").is_file()
    estimate = run(program, "train", "sparsecut-7b", "--dry-run", "--devices", "8")
    assert "stage align" in estimate
    assert "vision encoder" in run(program, "show", "upgrade-llava-7b")
    run(program, "recipes", "show", "study/shapes", "--copy", "mine.yaml")


def test_the_demo_writes_its_report(program, run):
    run(program, "demo", "--quick", "--out", "demo")
    page = (run.folder / "demo" / "report.html").read_text(encoding="utf-8")
    assert "LLaVA baseline" in page


def test_the_first_block_of_the_readme_runs(program, run):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    assert run(program.parent / "python", "-c", block).strip()
