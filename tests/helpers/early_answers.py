"""Commands of the command line, and the model libraries that each imports before it answers."""

import json
import subprocess
import sys
from pathlib import Path

MOST_SECONDS = 2.0  # of the processor; a quarter of one is usual

# Runs commands one after another, and prints of each its exit code, the model library that it would
# import (which ends the command), the seconds of the processor it took, and what it wrote to
# stderr.
CODE = """
import importlib.machinery, io, json, sys, time, traceback

class Imported(BaseException):
    pass

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name not in ("torch", "transformers", "datasets"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = self  # whether a library is there may be asked
        return spec

    def create_module(self, spec):
        raise Imported(spec.name)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Guard())
from sparsecut.cli.main import main

for command in json.load(sys.stdin):
    sys.argv, code, start = ["sparsecut", *command.split()], 0, time.process_time()
    sys.stderr = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    found = []
    try:
        main()
    except SystemExit as exit:
        code = exit.code
    except Imported as error:
        found = [str(error)]
        traceback.print_exc()
    said = sys.stderr.buffer.getvalue().decode()
    print(json.dumps([code, found, time.process_time() - start, said]))
"""


def answer_commands(commands: list[str], folder: Path) -> dict[str, list]:
    """Run commands in a folder; their exit codes, imported libraries, seconds and errors."""
    command = [sys.executable, "-c", CODE]
    typed = json.dumps(commands)
    done = subprocess.run(command, input=typed, capture_output=True, text=True, cwd=folder)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(commands), done.stdout + done.stderr
    return dict(zip(commands, lines, strict=True))
