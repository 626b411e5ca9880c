"""All that is measured on one GPU, in at most nine minutes: plans at CLIP-L + 7B size, and vLLM.

    make gpu                                                        # the same as
    python benchmarks/gpu_run.py --out runs/gpu/bench               # writes bench.json and bench.md
    python benchmarks/gpu_run.py --tiny --device cpu --out runs/try # on a CPU; figures mean nothing

It needs a Python with torch and a GPU; gpu_python.py sees to the rest, and this time counts. Then
it runs gpu.py, and vllm.py where vLLM is installed, in processes that end with their part of the
time. A part that is ended leaves what it measured. Further options are those of gpu.py.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_python import ROOT, NoPythonError, find_python
from gpu_table import write_result

HERE = Path(__file__).parent
MARGIN = 15  # seconds to end in
FOR_VLLM = 300  # seconds of the whole for two servers of vLLM, where it is installed
LEAST = {"cuda": 90, "cpu": 20}  # seconds that are of use to a part


class Clock:
    """Counts down from the start of this process.

    Args:
        seconds: Of all parts together.
    """

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def get_left(self) -> float:
        """Seconds that parts may take."""
        return self.end - MARGIN - time.monotonic()


def parse(words: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what is passed on to gpu.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu" / "bench")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-vllm", action="store_true")
    return parser.parse_known_args(words)


def has_vllm(python: str) -> bool:
    """Whether a Python has vLLM, and not only this folder's file of that name."""
    code = "import vllm.version"
    return subprocess.run([python, "-c", code], capture_output=True, cwd=ROOT).returncode == 0


def run_part(command: list, seconds: float) -> str | None:
    """Run a process for a time at most; returns why it is not whole, or None."""
    settings = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [str(word) for word in command]
    process = subprocess.Popen(command, cwd=ROOT, env=settings, start_new_session=True)
    try:
        code = process.wait(timeout=max(1, seconds))
    except subprocess.TimeoutExpired:
        return f"was ended after {seconds:.0f} s"
    finally:
        end_group(process)
    return None if code == 0 else f"failed with exit code {code}; its messages are above"


def end_group(process: subprocess.Popen) -> None:
    """End a process with all that it started, such as servers."""
    for what in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, what)
        except ProcessLookupError:
            break
        for _ in range(30):
            if process.poll() is not None:
                break
            time.sleep(0.1)
    process.wait()


def read_json(path: Path) -> dict | None:
    """What a part wrote, or None."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def measure_plans(a: argparse.Namespace, further: list[str], python: str, left: float) -> dict:
    """Run gpu.py; returns its result, with a note where it is not whole."""
    a.out.with_suffix(".json").unlink(missing_ok=True)
    command = [python, HERE / "gpu.py", "--out", a.out, "--device", a.device, *further]
    command += ["--tiny"] if a.tiny else []
    why = run_part([*command, "--budget-seconds", left - MARGIN], left)
    result = read_json(a.out.with_suffix(".json"))
    if result is None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
        raise SystemExit(f"{now}: gpu.py {why}; nothing was measured")
    if why:
        result["notes"].append(f"The part with the plans {why}.")
    return result


def measure_vllm(a: argparse.Namespace, python: str, left: float) -> tuple[dict | None, str | None]:
    """Run vllm.py; returns (its result, a note)."""
    if left < LEAST[a.device]:
        return None, f"vLLM was not reached: {max(0, left):.0f} s were left."
    out = a.out.with_name(f"{a.out.name}-vllm")
    out.with_suffix(".json").unlink(missing_ok=True)
    size = "tiny" if a.tiny else "7b"
    command = [python, HERE / "vllm.py", "--out", out, "--size", size, "--device", a.device]
    # The stock LLaVA and our default: other servers would not start in time.
    command += ["--plans", "sparsecut", "--local", "--budget-seconds", left - MARGIN]
    why = run_part(command, left)
    result = read_json(out.with_suffix(".json"))
    if result is not None:
        result["page"] = out.with_suffix(".md").read_text(encoding="utf-8")
    return result, f"The part with vLLM {why}." if why else None


def main(words: list[str] | None = None) -> dict:
    """Measure, write both files, and return what the JSON holds."""
    a, further = parse(words)
    a.out = a.out.absolute()
    clock = Clock(a.seconds)
    try:
        python = find_python(a.device)
    except NoPythonError as error:
        raise SystemExit(str(error)) from None
    with_vllm = not a.no_vllm and has_vllm(python)
    for_plans = clock.get_left() - (min(FOR_VLLM, clock.get_left() / 2) if with_vllm else 0)
    result = measure_plans(a, further, python, for_plans)
    note = None if a.no_vllm else f"vLLM is not installed beside {python}."
    if with_vllm:
        result["vllm"], note = measure_vllm(a, python, clock.get_left())
    result["notes"] += [note] if note else []
    write_result(result, a.out)
    print(f"{a.out}.json and {a.out}.md were written, {clock.get_left() + MARGIN:.0f} s early")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
