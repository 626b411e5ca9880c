"""Adapters and checkpoints with weights that are not the model's are refused."""

import json
import shutil

import pytest
import torch
from helpers.tiny import tiny_language, tiny_model
from safetensors.torch import load_file, save_file

from sparsecut.adapters import add_adapters, load_checkpoint, save_adapters, strip_adapters
from sparsecut.building import load, save
from sparsecut.config.recipe import Lora
from sparsecut.schema import UserError

peft = pytest.importorskip("peft")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def build_adapted(**parts):
    model, processor = tiny_model(**parts)
    add_adapters(model, ("language:lora",), Lora(r=2, alpha=4, targets=("q_proj", "v_proj")))
    return model, processor


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A folder with a model and an adapter on its language model beside it, and that model."""
    folder = tmp_path_factory.mktemp("adapted")
    model, processor = build_adapted()
    save(tiny_model()[0], processor, folder)
    save_adapters(model, folder)
    return folder


def rewrite(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def remove_one(weights):
    del weights[sorted(weights)[0]]


def add_one(weights):
    name = sorted(weights)[0]
    weights[f"{name}.more"] = weights[name].clone()


def poison_one(weights):
    weights[sorted(weights)[0]][0, 0] = torch.nan


def shrink_one(weights):
    name = sorted(weights)[0]
    weights[name] = weights[name][:1].clone()


def set_config(**values):
    def change(folder):
        file = folder / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


DAMAGES = {
    "missing": lambda folder: rewrite(folder / WEIGHTS, remove_one),
    "unknown": lambda folder: rewrite(folder / WEIGHTS, add_one),
    "not finite": lambda folder: rewrite(folder / WEIGHTS, poison_one),
    "another shape": lambda folder: rewrite(folder / WEIGHTS, shrink_one),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "garbage": lambda folder: (folder / WEIGHTS).write_bytes(b"abc" * 99),
    "cut": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
    "no configuration": lambda folder: (folder / CONFIG).unlink(),
    "a list": lambda folder: (folder / CONFIG).write_text("[1]"),
    "unknown kind": set_config(peft_type="XYZ"),
    "fewer layers": set_config(target_modules=["q_proj"]),
    "no layer": set_config(target_modules=["abc"]),
    "imports": set_config(megatron_config={"a": 1}, megatron_core="antigravity"),
    "unknown part": lambda folder: folder.rename(folder.parent / "speech"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_an_adapter_that_is_not_the_models_is_refused(adapted, tmp_path, damage):
    folder = shutil.copytree(adapted, tmp_path / "model")
    assert load(folder)
    DAMAGES[damage](folder / "adapters" / "language")
    with pytest.raises(UserError):
        load(folder)


@pytest.mark.parametrize("change", [remove_one, add_one])
@pytest.mark.parametrize("file", ["model.safetensors", f"adapters/language/{WEIGHTS}"])
def test_a_checkpoint_with_other_weights_is_refused(tmp_path, file, change):
    model, _ = build_adapted(language=tiny_language(tie=True))
    weights = strip_adapters(model.state_dict())
    del weights["language_model.lm_head.weight"]  # tied to the embeddings
    save_file(weights, tmp_path / "model.safetensors")
    save_adapters(model, tmp_path)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    load_checkpoint(model, tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    rewrite(tmp_path / file, change)
    with pytest.raises(UserError):
        load_checkpoint(model, tmp_path)
