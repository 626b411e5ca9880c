"""The whole of what is measured on a GPU: one command, one clock, one JSON, one page.

It is rehearsed on a CPU at tiny sizes, with stand-ins for parts that this machine lacks.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--tiny", "--device=cpu", "--plans", "llava"]
STAND_IN = """
import json, sys
out = sys.argv[sys.argv.index("--out") + 1]
open(out + ".json", "w").write(json.dumps({"words": sys.argv[1:]}))
open(out + ".md", "w").write("# Inside vLLM\\n\\n| server | requests/s |\\n")
"""


@pytest.fixture
def run(monkeypatch):
    """The command as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_run

    yield gpu_run
    for name in ("gpu_run", "gpu_python", "gpu_table"):
        sys.modules.pop(name, None)


def test_the_command_measures_and_names_what_is_missing(tmp_path):
    out = tmp_path / "bench"
    command = [sys.executable, BENCHMARKS / "gpu_run.py", *TINY, "--no-vllm", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["plans"]["llava"]["stage 2"]["ms"] > 0 and not result["notes"]
    page = out.with_suffix(".md").read_text()
    assert result["date"] in page and result["machine"]["device"] in page
    assert not list(tmp_path.glob("*.part"))


def test_parts_that_take_too_long_are_ended(run):
    start = time.monotonic()
    code = (
        "import subprocess, sys;"
        " subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    why = run.run_part([sys.executable, "-c", code], 1.5)
    assert "ended" in why and time.monotonic() - start < 20
    assert "exit code 3" in run.run_part([sys.executable, "-c", "raise SystemExit(3)"], 60)
    assert run.run_part([sys.executable, "-c", ""], 60) is None


def test_results_of_an_ended_part_are_kept(run, tmp_path, monkeypatch):
    """gpu.py hangs after its first section, as on a device that no longer answers."""
    out = tmp_path / "bench"
    left = {"date": "x", "machine": {"device": "D", "torch": "t", "cuda": None}, "notes": []}
    left["vllm"] = {"page": "# Inside vLLM\n"}
    left |= {"vision": "v", "language": "l", "dtype": "d", "attention": "a", "matmul_tflops": 1.0}
    left |= {"settings": {"batches": [1], "skip_training": True, "tiny": True}}
    left["plans"] = {"llava": {"image_tokens": 4, "missing": {"decode 1": "not reached in time"}}}

    def write_and_hang(command, seconds):
        out.with_suffix(".json").write_text(json.dumps(left))
        return f"was ended after {seconds:.0f} s"

    monkeypatch.setattr(run, "run_part", write_and_hang)
    monkeypatch.setattr(run, "find_python", lambda device: sys.executable)
    run.main([*TINY, "--no-vllm", f"--out={out}", "--seconds=100"])
    page = out.with_suffix(".md").read_text()
    assert "\n## Inside vLLM" in page
    assert "was ended after 85 s" in page and "llava, decode 1: not reached in time" in page


def test_vllm_joins_where_it_is_installed(run, tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(STAND_IN)
    out = tmp_path / "bench"
    a, _ = run.parse(["--device=cpu", f"--out={out}"])
    monkeypatch.setattr(run, "HERE", tmp_path)
    result, note = run.measure_vllm(a, sys.executable, 100)
    assert note is None and "| server |" in result["page"]
    words = result["words"]
    assert words[words.index("--size") + 1] == "7b"
    assert float(words[words.index("--budget-seconds") + 1]) < 100
    result, note = run.measure_vllm(a, sys.executable, 5)
    assert result is None and "not reached" in note
    (tmp_path / "vllm.py").write_text("raise SystemExit(4)")
    result, note = run.measure_vllm(a, sys.executable, 100)
    assert result is None and "exit code 4" in note  # and what an earlier run wrote is gone


def has(torch="2.9", cuda=True, missing=None):
    return {"torch": torch, "cuda": cuda, "missing": missing, "folders": ["/x/site-packages"]}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            has(torch=None, cuda=False, missing="ModuleNotFoundError: torch"),
            ["no torch", "PYTHON="],
        ),
        (has(cuda=False), ["2.9", "no GPU", "--device cpu"]),
        (has(missing="ModuleNotFoundError: No module named 'einops'"), ["einops", "gpu-pack"]),
    ],
    ids=["no torch", "no GPU", "no network"],
)
def test_what_is_missing_is_told(run, tmp_path, monkeypatch, found, words):
    import gpu_python

    packages = tmp_path / "gpu" / "packages"  # empty, so nothing can be installed from it
    packages.mkdir(parents=True)
    monkeypatch.setattr(gpu_python, "FOLDER", tmp_path / "gpu")
    monkeypatch.setattr(gpu_python, "PACKAGES", packages)
    monkeypatch.setattr(gpu_python, "probe", lambda python: found)
    with pytest.raises(gpu_python.NoPythonError) as error:
        gpu_python.find_python("cuda")
    assert all(word in str(error.value) for word in words)


def test_a_python_that_has_all_is_taken_as_it_is(run, monkeypatch):
    import gpu_python

    monkeypatch.setattr(gpu_python, "make_environment", None)
    monkeypatch.setattr(gpu_python, "probe", lambda python: has())
    assert Path(gpu_python.find_python("cuda")).exists()
