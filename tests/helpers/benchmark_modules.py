"""Modules of the folder benchmarks, which is not left on Python's path."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = str(Path(__file__).parents[2] / "benchmarks")


def import_benchmark(name: str) -> ModuleType:
    """Import a module; a library that looks for vLLM later must not find benchmarks/vllm.py."""
    sys.path.append(FOLDER)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(FOLDER)
