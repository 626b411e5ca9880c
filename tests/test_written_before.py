"""What the code before the redesign wrote still loads, goes on, and gives equal numbers.

`fixtures/before_redesign/make.py` says what lies there and which code wrote it. On the machine that
wrote it numbers must be equal to the bit, elsewhere they must be close. Only public names, commands
and names of files are used here, so that this test need not change when modules move.
"""

import hashlib
import inspect
import json
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import sparsecut

WRITTEN = Path(__file__).parent / "fixtures" / "before_redesign"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
QUESTION = "<image> what is it"


def machine() -> str:
    """A name for this processor and build of torch: equal ones compute equal bits."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    facts = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return hashlib.sha256("\n".join([*facts, torch.__version__]).encode()).hexdigest()[:16]


EXACT = machine() == EXPECTED["machine"]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A folder with the old files, as working directory."""
    with tarfile.open(WRITTEN / "written.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for index in tmp_path.rglob("index.json"):
        index.write_text(index.read_text().replace("FOLDER", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_files_are_small():
    sizes = [path.stat().st_size for path in WRITTEN.rglob("*") if path.is_file()]
    assert sum(sizes) < 300_000


def test_a_saved_model(written):
    check_model(*sparsecut.load("built"), EXPECTED["built"])


def test_a_model_saved_with_its_code_is_read_by_the_package(written):
    check_model(*sparsecut.load("with_code"), EXPECTED["built"])


def test_shortcuts_and_their_base(written):
    model, processor = sparsecut.load("shortcuts")
    check_model(model, processor, EXPECTED["shortcuts"])
    saved = load_file("shortcuts/fusion.safetensors")
    loaded = model.fusion.state_dict()
    assert saved.keys() == loaded.keys()
    for name in saved:
        assert torch.equal(saved[name], loaded[name]), name


def test_an_upgraded_model_saved_whole(written):
    check_model(*sparsecut.load("upgraded"), EXPECTED["shortcuts"])


REMOTE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparsecut":
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, Absent())
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

image = Image.open("data/0.png").convert("RGB")
logits = {}
for folder in ("with_code", "upgraded"):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=image, text="<image> what is it", return_tensors="pt")
    with torch.no_grad():
        logits[folder] = model(**inputs).logits[0].tolist()
json.dump(logits, open("logits.json", "w"))
"""


@pytest.mark.skipif(
    "past_key_values" not in inspect.signature(LlamaForCausalLM.forward).parameters,
    reason="the code saved in these models names the cache as transformers did before 5.24",
)
def test_models_saved_with_their_code_need_no_package(written):
    settings = os.environ | {"HF_HOME": str(written), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    logits = json.loads(Path("logits.json").read_text())
    check_numbers(logits["with_code"], EXPECTED["built"]["logits"])
    check_numbers(logits["upgraded"], EXPECTED["shortcuts"]["logits"])


def test_a_run_that_was_killed_goes_on(written):
    expected = EXPECTED["killed"]
    first = files_of("killed/one")
    before = Path("killed/two/log.jsonl").read_text().splitlines()
    command("train", "killed.yaml", "--resume")
    for name in first:
        assert files_of("killed/one")[name] == first[name], f"{name} of a finished stage is new"
    after = Path("killed/two/log.jsonl").read_text().splitlines()
    assert after[:4] == before[:4], "the steps before the checkpoint were done again"
    for stage in ("one", "two"):
        check_numbers(losses(f"killed/{stage}"), expected["losses"][stage], close=1e-4)
    check_weights("killed/final", expected)
    assert answers("killed/eval") == expected["answers"]
    sparsecut.load("killed/final")


def test_cached_features_are_read_and_not_made_again(written):
    before = files_of("features")
    command("train", "cached.yaml")
    assert files_of("features") == before
    check_numbers(losses("cached/one"), EXPECTED["cached"]["losses"], close=1e-4)
    check_weights("cached/final", EXPECTED["cached"])


def test_a_study_goes_on_where_it_stopped(written):
    expected = EXPECTED["study"]
    cut = Path("study/runs/main/cut/0")
    kept = ("study/runs/main/plain", "study/states")
    before = [files_of(folder) for folder in kept]
    log = (cut / "tune" / "log.jsonl").read_text().splitlines()
    command("study", "study.yaml", "--workers", "1")
    assert [files_of(folder) for folder in kept] == before
    assert (cut / "tune" / "log.jsonl").read_text().splitlines()[:4] == log[:4]
    check_numbers(losses(cut / "tune"), expected["losses"], close=1e-4)
    check_weights(cut / "final", expected)
    assert answers(cut / "eval") == expected["answers"]
    assert (cut / "facts.json").is_file()
    assert Path("study/report.html").is_file()


def test_finished_evaluations_are_compared(written):
    expected = EXPECTED["evals"]
    command("compare", "evals/built", "evals/trained", "--out", "compared")
    numbers = numbers_in(json.loads(Path("compared/compare.json").read_text()))
    for name in ("averages", "interval", "difference"):
        for number in expected[name]:
            assert any(abs(number - one) < 1e-6 for one in numbers), f"{number} of {name}"


@pytest.mark.parametrize("folder", ["built", "interrupted"])
def test_an_evaluation_goes_on(written, folder):
    file = Path("evals") / folder / "predictions.jsonl"
    before = file.read_text().splitlines()
    asked = ("--data", "data/ask.json", "--max-new-tokens", "3")
    command("eval", "built", *asked, "--out", f"evals/{folder}")
    after = file.read_text().splitlines()
    assert after[:3] == before[:3]
    assert after == Path("evals/built/predictions.jsonl").read_text().splitlines()
    result = json.loads((file.parent / "result.json").read_text())
    assert result["num_kept"] == {"built": 8, "interrupted": 3}[folder]
    assert result["accuracy"] == EXPECTED["evals"]["averages"][0]
    assert answers(file.parent) == EXPECTED["evals"]["answers"]


def command(*arguments: str) -> None:
    """Run a command of the command line in this process."""
    typed, sys.argv = sys.argv, ["sparsecut", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("sparsecut", run_name="__main__")
    finally:
        sys.argv = typed
    assert not ended.value.code


def check_model(model, processor, expected: dict) -> None:
    """A model's weights, its logits of a question about an image, and its greedy answer."""
    assert hash_of(model.state_dict()) == expected["weights"]
    image = Image.open("data/0.png").convert("RGB")
    inputs = processor(images=image, text=QUESTION, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    check_numbers(logits[0].tolist(), expected["logits"])
    chat = sparsecut.Chat(model, processor, max_new_tokens=6, min_new_tokens=6)
    assert chat.ask("what is it", "data/1.png") == expected["answer"]


def check_weights(folder, expected: dict) -> None:
    """The weights that training left: equal on the same machine, elsewhere of close norms."""
    weights = load_file(Path(folder) / "model.safetensors")
    for name, norm in expected["norms"].items():
        check_numbers([float(weights[name].double().norm())], [norm], close=1e-4)
    if EXACT:
        assert hash_of(weights) == expected["weights"]


def check_numbers(found: list, expected: list, close: float = 1e-5) -> None:
    """Equal numbers on the same machine, close ones elsewhere."""
    close = 0 if EXACT else close
    one, other = torch.tensor(found).double(), torch.tensor(expected).double()
    torch.testing.assert_close(one, other, rtol=close, atol=close)


def hash_of(weights: dict) -> str:
    """A hash of the names and bytes of weights."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + weights[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def files_of(folder) -> dict:
    """Every file below a folder: when it was written, and its bytes."""
    files = {}
    for path in Path(folder).rglob("*"):
        if path.is_file():
            files[str(path)] = (path.stat().st_mtime_ns, path.read_bytes())
    return files


def losses(stage) -> list[float]:
    """The losses in a stage's log."""
    return [line["loss"] for line in lines_of(Path(stage) / "log.jsonl")]


def answers(folder) -> list[str]:
    """The answers of an evaluation."""
    return [line["prediction"] for line in lines_of(Path(folder) / "predictions.jsonl")]


def lines_of(file: Path) -> list[dict]:
    """What a JSON Lines file holds."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers_in(tree) -> list[float]:
    """All fractional numbers in plain data, whatever their keys."""
    if isinstance(tree, float):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    numbers = []
    for one in tree if isinstance(tree, list) else []:
        numbers += numbers_in(one)
    return numbers
