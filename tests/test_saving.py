"""A saved model is an ordinary Hugging Face folder: for this package, for the Auto classes, and for
machines without it.
"""

import os
import subprocess
import sys

import pytest
import torch
from helpers.tiny import tiny_language, tiny_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsecut.building import load, save

PROBE = """
ids = torch.tensor([[5, 6, *[model.config.image_token_id] * 4, 7]])
pixels = torch.linspace(-1, 1, model.plan.num_views * 3 * 256).reshape(1, -1, 3, 16, 16)
with torch.no_grad():
    logits = model(input_ids=ids, pixel_values=pixels).logits
"""
AUTO = """
{first}
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline
{second}
from PIL import Image
from safetensors.torch import load_file
folder = {folder!r}
assert type(AutoConfig.from_pretrained(folder)) is sparsecut.SparseCutConfig
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
assert type(model) is sparsecut.SparseCutForConditionalGeneration and type(processor) is sparsecut.SparseCutProcessor
{probe}
assert torch.equal(logits, load_file(folder + "/expected")["logits"])
talk = [{{"role": "user", "content": [{{"type": "image", "image": Image.new("RGB", (30, 20))}}, {{"type": "text", "text": "what is it"}}]}}]
answer = pipeline("image-text-to-text", model=folder)(text=[talk, talk], max_new_tokens=3, return_full_text=False)
prompt = processor.apply_chat_template([talk], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
written = model.generate(**prompt, max_new_tokens=3)[0, prompt["input_ids"].shape[1]:]
assert [a[0]["generated_text"].strip() for a in answer] == [processor.decode(written, skip_special_tokens=True).strip()] * 2
"""
LIGHT = """
import sys, sparsecut
assert not {{"torch", "transformers", "numpy", "PIL"}} & set(sys.modules), "importing sparsecut loads too much"
"""
REMOTE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparsecut":
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from safetensors.torch import load_file
folder = {folder!r}
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
{probe}
assert torch.equal(logits, load_file(folder + "/expected")["logits"])
assert processor.expand("<image>") == "<image>" * 4 and "sparsecut" not in sys.modules
assert len(model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3)[0]) <= ids.shape[1] + 3
"""


def probe(model):
    """Logits of one fixed prompt with one fixed picture."""
    scope = {"torch": torch, "model": model}
    exec(PROBE, scope)
    return scope["logits"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, processor, folder): saved with its code, and the logits of the probe beside it."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = tiny_model()
    save(model, processor, folder, code=True)
    save_file({"logits": probe(model)}, folder / "expected")
    return model, processor, folder


def run(script, saved, tmp_path, **names):
    """A script in a fresh process, far from this repository and with an empty cache of remote
    code.
    """
    names |= {"folder": str(saved[2]), "probe": PROBE}
    settings = os.environ | {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", script.format(**names)]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "order", [(LIGHT.strip(), ""), ("", "import sparsecut")], ids=["first", "last"]
)
def test_auto_classes_and_pipeline_know_the_model_in_a_fresh_process(saved, tmp_path, order):
    first, second = order
    run(AUTO, saved, tmp_path, first=first.format(), second=second)


def test_a_folder_with_its_code_needs_no_package(saved, tmp_path):
    run(REMOTE, saved, tmp_path)


def test_code_is_saved_only_on_request_and_leaves_no_trace(saved, tmp_path):
    model, processor, folder = saved
    save(model, processor, tmp_path)
    assert {p.name for p in folder.glob("*.py")} >= {
        "modeling.py",
        "processing.py",
        "configuration.py",
        "plan.py",
        "hooks.py",
    }
    assert not list(tmp_path.glob("*.py"))
    assert not any("auto_map" in p.read_text() for p in tmp_path.glob("*.json"))


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "plan", ["llava", {"method": "sparsecut", "gate": "one"}], ids=["llava", "gated"]
)
def test_loading_gives_back_the_same_model(tmp_path, plan, tie):
    model, processor = tiny_model(plan, language=tiny_language(tie=tie))
    with torch.no_grad():
        for p in model.fusion.parameters():
            p.add_(0.01)
    save(model, processor, tmp_path)
    for again in (load(tmp_path)[0], AutoModelForImageTextToText.from_pretrained(tmp_path)):
        assert torch.equal(probe(again), probe(model))
        assert all(
            torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True)
        )
        assert again.plan == model.plan and again.generation_config.suppress_tokens == [
            model.config.image_token_id
        ]
        head, table = again.get_output_embeddings().weight, again.get_input_embeddings().weight
        assert (head.data_ptr() == table.data_ptr()) == tie
    picture, text = Image.new("RGB", (30, 20), (250, 80, 10)), "<image> what is it"
    for again in (load(tmp_path)[1], AutoProcessor.from_pretrained(tmp_path)):
        for name, value in processor(images=picture, text=text, return_tensors="pt").items():
            assert torch.equal(again(images=picture, text=text, return_tensors="pt")[name], value)
        assert (
            again.tokenizer.padding_side == "left"
            and again.chat_template == processor.chat_template
        )


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_the_file_holds_every_weight_once(tmp_path, tie):
    model, processor = tiny_model(language=tiny_language(tie=tie))
    save(model, processor, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters <= set(stored) and ("language_model.lm_head.weight" in stored) != tie
    assert (
        sum(torch.Size(s).numel() for name, s in stored.items() if name in parameters)
        == model.num_parameters()
    )


def test_weights_missing_from_the_file_are_drawn_like_new_ones(tmp_path):
    model, processor = tiny_model({"method": "sparsecut", "gate": "zero"})
    save(model, processor, tmp_path)
    weights = {
        k: v
        for k, v in load_file(tmp_path / "model.safetensors").items()
        if not k.startswith("fusion.")
    }
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    again, _ = load(tmp_path)
    assert not again.fusion.gates.any()
    for path in again.fusion.paths:
        for linear in (path.linear_1, path.linear_2):
            bound = linear.in_features**-0.5
            assert (
                0.8 * bound < linear.weight.abs().max() <= bound
                and linear.bias.abs().max() <= bound
            )
    assert torch.equal(again.language_model.lm_head.weight, model.language_model.lm_head.weight)


def test_a_model_can_be_loaded_in_half_precision(saved):
    model, _ = load(saved[2], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(probe(model).float(), probe(saved[0]), atol=0.1, rtol=0.1)
