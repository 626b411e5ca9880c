"""Models are handed on: pushed to an imitation of the hub, loaded from it without this package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import runs
from helpers.bases import build_base, build_inputs, randomize_fusion
from helpers.ecosystem import upgraded_with_processor
from helpers.example_bases import build_audio, build_example_base
from helpers.hub import serve_hub
from helpers.tiny import tiny_model
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from sparsecut import upgrade
from sparsecut.building import save
from sparsecut.card import is_unedited
from sparsecut.schema import UserError
from sparsecut.sharing import push_folder

ENCODE = '''
import numpy as np, torch
from PIL import Image

def encode(processor):
    """The inputs of one question about an image or a clip."""
    if hasattr(processor, "audio_token"):
        clip = np.sin(np.arange(4000) / 9).astype(np.float32)
        return processor(audio=[clip], text=[processor.audio_token], return_tensors="pt")
    image = Image.radial_gradient("L").convert("RGB")
    text = [{"type": "image", "image": image}, {"type": "text", "text": "what is it"}]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    messages = [{"role": "user", "content": text}]
    return processor.apply_chat_template([messages], add_generation_prompt=True, **settings)

@torch.no_grad()
def compute_logits(model, processor):
    return model(**encode(processor), use_cache=False).logits.contiguous()
'''
ADAPT = '''
def adapt(model):
    """Put an adapter with an effect on the language model."""
    from peft import LoraConfig, get_peft_model
    from sparsecut.adapters import get_adapters

    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_adapters(model)["language"] = get_peft_model(model.language_backbone(), settings).eval()
    return model
'''
exec(ENCODE + ADAPT)
ROOT = Path(__file__).parents[1]
BASE = "llava-hf/llava-1.5-7b-hf"  # as the page names one

CARDS = {
    "me/base": "---\nlicense: mit\n---\nA base.\n",
    "me/edited": "---\nlicense: mit\n---\nWords of a user.\n",
}
# Each runs in a child of one process that has imported transformers: most time is spent there.
PUSH = """
import sparsecut, transformers
model, processor = sparsecut.load("built")  # it has an adapter
processor.push_to_hub("me/built")
model.push_to_hub("me/built", tags=["mine"])
for part in reversed(sparsecut.load("audio")):
    part.save_pretrained("copy", push_to_hub=True, repo_id="me/audio")
model, processor = sparsecut.load("llava")
for part in (processor, model, processor, model):
    part.push_to_hub("me/llava", tags=["mine"])
qwen = transformers.AutoModelForImageTextToText.from_pretrained("qwen")
qwen.push_to_hub("me/qwen")
base = sparsecut.load("llava")[0]
base.base.push_to_hub("me/base")
transformers.AutoProcessor.from_pretrained("base").push_to_hub("me/base")
model, processor = sparsecut.upgrade("me/base")
model.fusion.load_state_dict(base.fusion.state_dict())
model.save_fusion("short", push_to_hub=True, repo_id="me/short")
adapt(model)
model.push_fusion("me/tuned", processor)
torch.save(compute_logits(model.eval(), processor), "tuned.pt")

from sparsecut.sharing import push_folder
push_folder("audio", "me/edited")
qwen.config.save_pretrained("edited")
qwen.save_pretrained("edited", push_to_hub=True, repo_id="me/edited")
"""
# The blocks of docs/share.md, as printed.
PAGE = """
import shlex
import sparsecut.cli.main
from sparsecut.cli.app import app

room = {}
for language, block in BLOCKS:
    if language == "python":
        exec(block, room)
        continue
    for line in block.splitlines():
        sys.argv = shlex.split(line, comments=True)
        app(args=sys.argv[1:], standalone_mode=False)
"""
LOAD_SHORTCUTS = """
import sparsecut
from sparsecut.building import is_saved
assert is_saved("me/short") and is_saved("me/built")
expected = torch.load("tuned.pt")
assert torch.equal(compute_logits(*sparsecut.load("me/tuned")), expected)
assert not torch.equal(compute_logits(*sparsecut.load("me/short")), expected)
assert torch.equal(compute_logits(*sparsecut.load("me/short")), read("llava"))
"""
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparsecut":
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Absent())
"""
LOAD = """
from transformers import *
whole = AutoModelForImageTextToText, AutoModelForMultimodalLM
kinds = {"AutoConfig": AutoConfig, "AutoProcessor": AutoProcessor, "AutoModel": AutoModel}
kinds |= {kind.__name__: kind for kind in whole}
places = {"me/my-model": "trained", "me/built": "built", "me/audio": "audio", "me/llava": "llava"}
places["pushed"] = "trained"
# First, because code that was loaded once stays known to the process.
for place in ("me/my-model", "me/llava", "audio", "pushed"):
    for name, kind in kinds.items():
        try:
            kind.from_pretrained(place)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), (place, name, error)
        else:
            raise AssertionError(f"{name} gives something for {place} without a question")
for place, saved in places.items():
    processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
    for kind in whole if place == "pushed" else whole[:1]:
        model = kind.from_pretrained(place, trust_remote_code=True).eval()
        assert torch.equal(compute_logits(model, processor), read(saved)), (place, kind)
    inputs = encode(processor)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    assert "head" not in type(AutoModel.from_pretrained(place, trust_remote_code=True)).__name__
qwen = AutoModelForImageTextToText.from_pretrained("me/qwen", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(qwen(**load_file("inputs.safetensors")).logits, read("qwen"))
ask = pipeline("image-text-to-text", "pushed", trust_remote_code=True)
assert "sparsecut" not in sys.modules
# Handed on once more, by somebody without the package.
model.push_to_hub("me/again")
processor.push_to_hub("me/again")
again = AutoModelForImageTextToText.from_pretrained("me/again", trust_remote_code=True).eval()
assert torch.equal(compute_logits(again, processor), read("trained"))
try:
    AutoProcessor.from_pretrained("plain", trust_remote_code=True)
except OSError as error:
    assert "install_sparsecut" in str(error)
else:
    raise AssertionError("a part of a processor was handed out")
"""
FORK = """
import os, sys, traceback
import torch, transformers, PIL.Image
from safetensors.torch import load_file

def read(name):
    return load_file("expected.safetensors")[name]

for script in {scripts!r}:
    child = os.fork()
    if child:
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
        continue
    try:
        exec({shared!r} + script)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def handed_on(tmp_path_factory):
    """(folder, hub): models of every kind, pushed and loaded again by other processes."""
    folder = tmp_path_factory.mktemp("shared")
    base, processor = build_example_base("llava")
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    models = {
        "built": adapt_tiny(),
        "audio": build_audio(),
        "llava": upgraded_with_processor(),
        "trained": train_tiny(folder),
    }
    for name, pair in models.items():
        if name != "trained":
            save(*pair, folder / name)
    save(*models["llava"], folder / "plain", code=False)
    logits = {name: compute_logits(*pair) for name, pair in models.items()}  # noqa: F821
    logits["qwen"] = save_qwen(folder)
    save_file(logits, folder / "expected.safetensors")
    place = folder / BASE
    place.parent.mkdir()
    place.symlink_to(folder / "base")
    for name, text in CARDS.items():
        card = folder / "hub/models" / name / "README.md"
        card.parent.mkdir(parents=True)
        card.write_text(text)
    scripts = [PUSH, read_page(), LOAD_SHORTCUTS, ABSENT + LOAD]
    with serve_hub(folder / "hub") as hub:
        run(FORK.format(scripts=scripts, shared=ENCODE + ADAPT), folder, hub.url)
    return folder, hub


def adapt_tiny():
    model, processor = tiny_model()
    return adapt(model), processor  # noqa: F821


def read_page() -> str:
    """A script that runs the blocks of the page on sharing."""
    page = (ROOT / "docs/share.md").read_text()
    return PAGE.replace("BLOCKS", repr(re.findall(r"```(python|bash)\n(.*?)```", page, re.S)))


@torch.no_grad()
def save_qwen(folder):
    """Save an upgraded Qwen2.5-VL and inputs for it; returns its logits."""
    model = randomize_fusion(upgrade(build_base("qwen2_5_vl"))[0])
    inputs = build_inputs("qwen2_5_vl", model.base)
    model.save_pretrained(folder / "qwen")
    save_file(inputs, folder / "inputs.safetensors")
    return model.eval()(**inputs).logits.contiguous()


def train_tiny(folder):
    runs.write_records(folder)
    (folder / "ask.json").write_bytes((folder / "data.json").read_bytes())
    stage = runs.stage(folder, train=["fusion", "language"])
    return runs.run(folder, stage, output=str(folder / "runs/mine"))


def run(script, folder, address):
    """Run a script in a fresh process that knows no hub but the imitation."""
    settings = {
        "HF_ENDPOINT": address,
        "HF_TOKEN": "hf_imitated",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_kind_of_model_is_pushed_and_loaded_without_the_package(handed_on):
    _, hub = handed_on
    for name in ("built", "audio", "llava", "qwen", "my-model", "again"):
        files = hub.list_files(f"me/{name}")
        assert files >= {"config.json", "model.safetensors", "README.md", "plan.py"}
        assert name == "qwen" or "processor_config.json" in files
        assert is_unedited((hub.root / "models/me" / name / "README.md").read_text())
    assert "adapters/language/adapter_model.safetensors" in hub.list_files("me/built")


def test_a_card_that_was_edited_on_the_hub_stays(handed_on):
    _, hub = handed_on
    assert "modeling_upgraded.py" in hub.list_files("me/edited")
    edited = (hub.root / "models/me/edited/README.md").read_text()
    assert edited == CARDS["me/edited"]


def test_scores_are_added_to_the_card_as_the_page_says(handed_on):
    folder, _ = handed_on
    text = (folder / "runs/mine/final/README.md").read_text()
    result = json.loads((folder / "scores/result.json").read_text())
    low, high = (f"{100 * bound:.1f}" for bound in result["interval"])
    assert f"| {100 * result['accuracy']:.1f} | {low} to {high} | 12 |" in text
    assert "--data ask.json" in text and ModelCard(text).data.eval_results


def read_card(hub, name) -> ModelCard:
    return ModelCard((hub.root / "models" / name / "README.md").read_text())


def test_cards_of_pushed_models_name_their_parts(handed_on):
    _, hub = handed_on
    built = read_card(hub, "me/built")
    assert built.data.pipeline_tag == "image-text-to-text" and "mine" in built.data.tags
    assert read_card(hub, "me/audio").data.pipeline_tag == "audio-text-to-text"
    short = read_card(hub, "me/short").data
    assert short.base_model == ["me/base"] and short.base_model_relation == "adapter"
    assert short.library_name == "sparsecut" and short.license == "mit"


def test_shortcuts_are_a_small_repository_of_their_own(handed_on):
    _, hub = handed_on
    files = hub.list_files("me/short")
    assert files == {"fusion.json", "fusion.safetensors", "README.md"}
    tuned = hub.list_files("me/tuned")
    assert {"adapters/language/adapter_config.json", "processor_config.json"} <= tuned
    assert not any(name.startswith("model") and name.endswith("tensors") for name in tuned)


def test_what_is_pushed_leaves_the_run_behind(handed_on):
    folder, _ = handed_on
    pushed = {path.name for path in (folder / "pushed").iterdir()}
    assert not pushed & {"log.jsonl", "training_args.bin"} and "config.yaml" in pushed
    text = (folder / "pushed/README.md").read_text()
    assert 'name = "me/my-model"' in text and "data.json" in text and str(folder) not in text
    again = push_folder(folder / "runs/mine/final", "me/other", dry_run=folder / "second")
    assert 'name = "me/other"' in (Path(again) / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"folder": "nothing"}, "nothing"),
        ({"name": "a/b/c"}, "a/b/c"),
        ({"name": "bad name"}, "bad name"),
        ({"dry_run": "built"}, "built"),
        ({"dry_run": "runs/mine/final/inside"}, "inside"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_anything_is_written(handed_on, settings, fact):
    folder, _ = handed_on
    paths = {"folder": "runs/mine/final", "dry_run": "new"} | settings
    name = paths.pop("name", "me/model")
    paths = {key: folder / value for key, value in paths.items()}
    with pytest.raises(UserError, match=fact):
        push_folder(name=name, **paths)
    assert not (folder / "new").exists()


def test_a_hub_that_is_away_is_told_in_a_sentence(handed_on, monkeypatch):
    folder, _ = handed_on
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="me/model"):
        push_folder(folder / "runs/mine/final", "me/model")
