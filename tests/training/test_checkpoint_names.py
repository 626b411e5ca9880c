"""Checkpoints of encoders with other names in files than in memory continue as if undisturbed."""

import json

import pytest
import torch
from helpers.runs import write_records
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from sparsecut.building import load
from sparsecut.config.recipe import parse_recipe
from sparsecut.training.stages import train


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with a tiny random DINOv2, and twelve records."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    Dinov2Model(config).save_pretrained(folder / "vision")
    settings = {"image_processor_type": "BitImageProcessor", "size": {"height": 28, "width": 28}}
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(settings))
    write_records(folder, answers=["ring", "cross", "triangle", "one"])
    return folder


def make_recipe(parts, out, train_parts, steps_saved):
    args = {
        "max_steps": 4,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": steps_saved,
    }
    stage = {"name": "all", "data": {"path": str(parts / "data.json")}, "train": train_parts}
    return parse_recipe(
        {
            "model": {"vision": str(parts / "vision"), "language": "shapes"},
            "fusion": {"method": "sparsecut", "count": 2},
            "stages": [{**stage, "args": args}],
            "output": str(out),
        }
    )


@pytest.mark.parametrize(
    "train_parts", [["vision", "fusion"], ["fusion", "language:lora"]], ids=str
)
def test_a_run_with_dinov2_continues_to_the_bit(parts, tmp_path, train_parts):
    recipe = make_recipe(parts, tmp_path / "out", train_parts, 2)
    model, _ = train(recipe, shown=False)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    stage = tmp_path / "out" / "all"
    in_file = load_file(stage / "checkpoint-2" / "model.safetensors")
    assert not in_file.keys() <= expected.keys()  # else nothing is tested here
    for name in ("versions.json", "model.safetensors"):  # as if killed after the second step
        (stage / name).unlink()
    for path in (stage / "checkpoint-4").rglob("*"):
        if path.is_file():
            path.unlink()
    again, _ = train(recipe, resume=True, shown=False)
    state = again.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert all(torch.equal(x, expected[n]) for n, x in load(stage)[0].state_dict().items())
