"""A Python that can run benchmarks/gpu.py, on a machine that may have nothing but torch.

    # on a machine with a network: fetch what may be missing
    python benchmarks/gpu_python.py --pack

It takes `.venv`, or the Python that runs this file, if all is there. Else it makes an environment
in `.corners/gpu` that sees the installed torch, and installs the rest there: from the packages
beside it where they were fetched before, else from the registry. torch is never fetched. Only
Python's standard library is used here.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".corners" / "gpu"
PACKAGES = FOLDER / "packages"  # fetched beforehand
NEEDED = ("transformers", "accelerate", "einops", "pillow", "psutil")
BUILT_FOR_GPUS = ("torch", "torchvision", "torchaudio", "triton", "nvidia", "cuda")
# Prints what a Python has: its torch, whether that sees a GPU, its folders, and what is missing.
PROBE = """
import json, sys
found = {"torch": None, "cuda": False, "missing": None}
found["folders"] = [x for x in sys.path if x.endswith(("site-packages", "dist-packages"))]
try:
    import torch
    found["torch"], found["cuda"] = torch.__version__, torch.cuda.is_available()
    sys.path[:0] = sys.argv[1:]
    import gpu
except Exception as error:
    found["missing"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(found))
"""


class NoPythonError(Exception):
    """No Python here can run the benchmark; the message says what is missing."""


def find_python(device: str) -> str:
    """Find or make a Python that can run the benchmark.

    Raises:
        NoPythonError: torch or the GPU is missing, or the rest could not be installed.
    """
    places = [ROOT / ".venv" / "bin" / "python", Path(sys.executable), FOLDER / "bin" / "python"]
    found = {str(place): probe(place) for place in places if place.exists()}
    with_torch = {python: has for python, has in found.items() if has["torch"]}
    if not with_torch:
        raise NoPythonError(
            f"{sys.executable} has no torch; install one that fits this machine's GPU, or name a"
            " Python that has it: make gpu PYTHON=/path/to/python"
        )
    fitting = {n: has for n, has in with_torch.items() if has["cuda"] or device != "cuda"}
    if not fitting:
        versions = ", ".join(sorted({has["torch"] for has in with_torch.values()}))
        raise NoPythonError(
            f"torch {versions} finds no GPU here; run this on a machine with one, or try it on the"
            " CPU at tiny sizes: python benchmarks/gpu_run.py --tiny --device cpu"
        )
    for python, has in fitting.items():
        if not has["missing"]:
            return python
    return make_environment(*next(iter(fitting.items())))


def probe(python: Path) -> dict:
    """What a Python has; one that does not run has nothing."""
    command = [python, "-c", PROBE, Path(__file__).parent, ROOT]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    try:
        return json.loads(run.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"torch": None, "cuda": False, "missing": "it does not run", "folders": []}


def make_environment(python: str, has: dict) -> str:
    """Make an environment with what is missing beside an installed torch; returns its Python."""
    for name in ("bin", "lib", "include", "pyvenv.cfg"):
        path = FOLDER / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    made = FOLDER / "bin" / "python"
    run_or_tell([python, "-m", "venv", FOLDER], python, has)
    (site,) = (FOLDER / "lib").glob("python*/site-packages")
    (site / "installed.pth").write_text("\n".join(has["folders"]) + "\n", encoding="utf-8")
    source = ["--no-index", "--find-links", PACKAGES] if PACKAGES.is_dir() else []
    versions = choose_versions()
    run_or_tell([made, "-m", "pip", "install", "-q", *source, *versions, *NEEDED], python, has)
    after = probe(made)
    if after["missing"] or after["torch"] != has["torch"]:
        raise NoPythonError(
            f"the environment {FOLDER} does not work beside torch {has['torch']} of {python}"
            f" ({after['missing'] or 'it got another torch'}); install what is missing there, and"
            " try again"
        )
    return str(made)


def run_or_tell(command: list, python: str, has: dict) -> None:
    """Run a command, or say what is missing and how it can be had."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode == 0:
        return
    last = (run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1]
    raise NoPythonError(
        f"{python} has torch {has['torch']}, but not all that is needed ({has['missing']}), and it"
        f" could not be installed ({last}); install {' '.join(NEEDED)} there, or run"
        " `make gpu-pack` where there is a network and copy .corners/gpu/packages here"
    )


def choose_versions() -> list:
    """Arguments of pip: the project's versions of all but torch."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(BUILT_FOR_GPUS)]
    path = FOLDER / "constraints.txt"
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return ["--disable-pip-version-check", "-c", path]


def pack() -> None:
    """Fetch what may be missing on a machine without a network, without torch (some 60 MB)."""
    shutil.rmtree(PACKAGES, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary", ":all:"]
    command += ["-d", PACKAGES, *choose_versions()]
    # accelerate alone would bring torch; what else it needs comes with the others.
    subprocess.run([*command, *(name for name in NEEDED if name != "accelerate")], check=True)
    subprocess.run([*command, "--no-deps", "accelerate"], check=True)
    size = sum(path.stat().st_size for path in PACKAGES.iterdir()) / 1e6
    print(f"{len(list(PACKAGES.iterdir()))} packages, {size:.0f} MB, in {PACKAGES}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--pack"]:
        sys.exit("usage: python benchmarks/gpu_python.py --pack")
    pack()
