"""The README's shell blocks run as printed, one after the other, in an empty folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_run_as_printed(tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    commands = [block for block in blocks if "sparsecut " in block]
    assert len(commands) >= 2
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    # This checkout's command, whatever is installed.
    shell = f'sparsecut() {{ "{sys.executable}" -m sparsecut "$@"; }}\nset -e\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", shell + "\n".join(commands)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "runs" / "tiny" / "final" / "config.json").is_file()
    assert (tmp_path / "runs" / "tiny" / "again" / "result.json").is_file()
