"""Tests SparseCut in the corners of what it may be installed with.

    python .ci/corners.py                  # all of them
    python .ci/corners.py newest core      # these

Each corner is an environment of its own below `.corners/`. It is made with pip, and kept until what
goes into it changes. Only Python's standard library is used here.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".corners"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WHAT = {
    "pinned": "with dev, the versions in constraints.txt",
    "oldest": "with dev, the lowest versions that pyproject.toml allows",
    "newest": "with dev, the newest versions that pyproject.toml allows",
    "core": "without extras, the versions in constraints.txt, and pytest",
}
# They run and draw the tests and are no part of the package, so the oldest corner has new ones.
TOOLS = {"pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-pyyaml", "setuptools"}
TOOLS |= {"nbformat", "nbclient", "ipykernel"}
# What touches transformers, and what differs between its releases.
TESTS = [
    "test_packaging.py",
    "test_hooks.py",
    "test_modeling.py",
    "test_headless.py",
    "test_generation.py",
    "test_processing.py",
    "test_saving.py",
    "test_chat.py",
    "test_upgrade_running.py",
    "test_upgrade_families.py",
    "test_upgrade_ecosystem.py",
    "test_upgrade_hub.py",
    "test_written_before.py",
]
SHOWN = ["torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy", "pillow", "peft"]
# What pip says when a registry does not answer. A version that does not exist reads otherwise.
UNREACHABLE = re.compile(
    r"NewConnectionError|ConnectTimeoutError|ReadTimeoutError|Read timed out|ProxyError"
    r"|Temporary failure in name resolution|Name or service not known|Network is unreachable"
    r"|Connection refused|Connection reset|Connection broken|50[0-4] Server Error"
)


class CornerError(Exception):
    """A corner is red."""


class UnreachableError(Exception):
    """A corner could not be installed, because the registry did not answer."""


def main() -> int:
    """Test the corners that the command line names; returns the exit code."""
    arguments = parse_arguments()
    results = {}
    for corner in arguments.corners:
        start = time.monotonic()
        try:
            results[corner] = test_corner(corner, arguments)
        except CornerError as error:
            results[corner] = f"FAILED: {error}"
        except UnreachableError as error:
            results[corner] = f"NOT RUN: {error}"
        took = (time.monotonic() - start) / 60
        results[corner] += f" ({took:.1f} minutes)"
        say(f"corner {corner}: {results[corner]}")
    if len(results) > 1:
        say("\n".join(["corners", *(f"  {name}: {text}" for name, text in results.items())]))
    bad = ["FAILED"] if arguments.skip_unreachable else ["FAILED", "NOT RUN"]
    return int(any(text.startswith(tuple(bad)) for text in results.values()))


def parse_arguments() -> argparse.Namespace:
    """What the command line and the environment say."""
    parser = argparse.ArgumentParser(description="Test SparseCut in the corners of its versions.")
    corners = "; ".join(f"{name}: {what}" for name, what in WHAT.items())
    parser.add_argument("corners", nargs="*", metavar="CORNER", help=f"{corners} (default: all)")
    parser.add_argument(
        "--torch",
        default=os.environ.get("TORCH") or None,
        help="a version of torch for every corner, such as one that lies on this machine",
    )
    parser.add_argument("--processes", type=int, default=2, help="test processes (default: 2)")
    parser.add_argument(
        "--skip-unreachable",
        action="store_true",
        help="a registry that does not answer is told, and is no failure",
    )
    arguments = parser.parse_args()
    arguments.corners = arguments.corners or list(WHAT)
    if unknown := sorted(set(arguments.corners) - set(WHAT)):
        parser.error(f"no corner is named {', '.join(unknown)}; there are {', '.join(WHAT)}")
    return arguments


def test_corner(corner: str, arguments: argparse.Namespace) -> str:
    """Install a corner, show what it has, and run its tests.

    Raises:
        CornerError: It cannot be installed, or a test fails.
        UnreachableError: The registry did not answer.
    """
    say(f"corner {corner}: {WHAT[corner]}")
    python = install(corner, arguments.torch)
    versions = list_versions(python)
    say("  ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions))
    if corner == "core":
        files, processes = ["tests/without_extras"], []
    else:
        files = [f"tests/{name}" for name in TESTS]
        processes = ["-n", str(arguments.processes), "--dist", "loadfile"]
        processes = processes if arguments.processes > 1 else []
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    settings["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    command = [python, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", *processes, *files]
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}).returncode
    if code:
        raise CornerError(f"pytest ended with code {code}")
    return "green"


def install(corner: str, torch: str | None) -> Path:
    """Make a corner's environment, unless it is there; returns its Python."""
    home = FOLDER / corner
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    home.mkdir(parents=True, exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n", encoding="utf-8")
    constraints = FOLDER / f"{corner}.txt"
    constraints.write_text("".join(f"{one}\n" for one in pin(corner, torch)), encoding="utf-8")
    wanted = describe_installation(constraints)
    stamp = home / "installed"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted and corner != "newest":
        return python
    if corner != "newest" or not python.exists():
        shutil.rmtree(home)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
    packages = ["-e", "."] if corner == "core" else ["-e", ".[dev]"]
    if corner == "core":
        packages.append("pytest")
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"] if corner == "newest" else []
    pip(python, [*upgrade, "-c", constraints, *packages])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def pin(corner: str, torch: str | None) -> Iterator[str]:
    """Lines for pip that choose a corner's versions."""
    lines = []
    if corner in ("pinned", "core"):
        text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if "==" in line]
    elif corner == "oldest":
        for requirement in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
            name, floor = re.match(r"([\w.-]+)(?:\[.*?\])?>=([\w.]+)", requirement).groups()
            if name not in TOOLS:
                lines.append(f"{name}=={floor}")
    for line in lines:
        if not (torch and line.startswith("torch==")):
            yield line
    if torch:
        yield f"torch=={torch}"


def describe_installation(constraints: Path) -> str:
    """A hash of all that decides what an environment holds."""
    total = hashlib.sha256(sys.version.encode())
    for file in (constraints, ROOT / "pyproject.toml"):
        total.update(file.read_bytes())
    total.update(os.environ.get("PIP_ARGS", "").encode())
    return total.hexdigest()


def pip(python: Path, arguments: list) -> None:
    """Install with pip, showing that it lives.

    Raises:
        CornerError: pip failed.
        UnreachableError: It failed because the registry did not answer.
    """
    more = os.environ.get("PIP_ARGS", "").split()
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-compile",
        *more,
        *arguments,
    ]
    log = FOLDER / "pip.log"
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        running = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        while running.poll() is None:
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                lines = read_log(log) or [""]
                say(f"  {time.monotonic() - start:4.0f} s: {lines[-1].strip()[:80]}")
    if running.returncode == 0:
        return
    lines = read_log(log)
    say("\n".join(lines[-15:]))
    if any(UNREACHABLE.search(line) for line in lines):
        raise UnreachableError("the package registry did not answer; try again later")
    raise CornerError("pip could not install it, see above")


def read_log(log: Path) -> list[str]:
    """What pip has said so far, without notes on indexes that lack a package."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if not line.startswith("WARNING: Location")]


def list_versions(python: Path) -> dict[str, str]:
    """Distributions that an environment has, with their versions."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "list", "--format", "freeze"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(line.lower().split("==") for line in text.splitlines() if "==" in line)


def say(text: str) -> None:
    """Print at once, so that a log shows where a run is."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
