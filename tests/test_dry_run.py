"""A dry run counts what the model really has, does and keeps, and tells what of it hangs on data that is not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import write_records
from torch.utils.flop_counter import FlopCounterMode

from sparsecut.building import build
from sparsecut.cost import counter
from sparsecut.dry_run import GIB, PUBLISHED, dry_run, lines
from sparsecut.recipe import load_recipe, parse_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
WORLD = {
    "model": {"vision": "world", "language": "world"},
    "fusion": {"method": "sparsecut", "count": 3},
    "output": "runs/x",
}


def one_stage(**changes) -> dict:
    args = {"max_steps": 10, "per_device_train_batch_size": 4, **changes.pop("args", {})}
    return {"name": "one", "data": {"path": "nowhere.json"}, "train": ["fusion"], "args": args, **changes}


def plan_of(**changes):
    devices = changes.pop("devices", 1)
    return dry_run(parse_recipe({**WORLD, "stages": [one_stage(**changes)]}), devices=devices)[0]


@pytest.fixture
def model():
    return build("world", "world", WORLD["fusion"])[0]


@pytest.mark.parametrize("train", [["fusion"], ["fusion", "language"], ["fusion", "language:lora"]])
def test_parameters_are_those_of_the_model(model, train):
    plan = plan_of(train=train)
    real = {name: sum(p.numel() for p in found) for name, found in model.parts().items()}
    assert abs(sum(plan.parameters.values()) / sum(real.values()) - 1) < 0.01  # the built one has a word more
    assert plan.trained["fusion"] == real["fusion"]
    if "language:lora" in train:
        peft = pytest.importorskip("peft")
        from sparsecut.adapters import adapter_parameters, add_adapters, merge_adapters
        from sparsecut.recipe import Lora

        add_adapters(model, ("language:lora",), Lora())
        assert plan.trained["language:lora"] == sum(p.numel() for p in adapter_parameters(model, "language")) and peft
        merge_adapters(model)


@pytest.mark.parametrize("train", [["fusion"], ["fusion", "language"]])
def test_operations_are_those_of_a_real_step(model, train):
    plan = plan_of(train=train)
    model.requires_grad_(False)
    for name in train:
        for parameter in model.parts()[name]:
            parameter.requires_grad_(True)
    ids = torch.zeros(1, plan.tokens_per_record, dtype=torch.long)
    ids[:, : plan.image_tokens_per_record] = model.config.image_token_id
    pixels = torch.zeros(1, model.plan.num_views, *model.config.grid.view)
    with counter() as real:
        model(input_ids=ids, pixel_values=pixels, labels=ids, use_cache=False).loss.backward()
    assert isinstance(real, FlopCounterMode)
    assert plan.flops_per_step / plan.records_per_step == pytest.approx(real.get_total_flops(), rel=0.02)


def test_arithmetic_of_steps_memory_and_hours(tmp_path):
    write_records(tmp_path)
    data = {"path": str(tmp_path / "data.json")}
    args = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    plan = plan_of(data=data, args=args, devices=2)
    assert (plan.records, plan.records_per_step, plan.steps) == (12, 16, 3)
    assert plan.hours == pytest.approx(3 * plan.flops_per_step / (2 * 989e12 * 0.4) / 3600)
    whole, halves = (
        plan_of(train=["fusion", "language"]),
        plan_of(train=["fusion", "language"], args={"fsdp": True}, devices=2),
    )
    for name in ("weights", "gradients", "optimizer"):
        assert halves.memory[name] == whole.memory[name] / 2
    assert (
        plan_of(train=["fusion", "language"], args={"activation_checkpointing": True}).memory["activations"]
        < whole.memory["activations"]
    )
    assert whole.memory["optimizer"] == 8 * sum(whole.trained.values())


@pytest.mark.parametrize("name, devices, most", [("smol", 1, 16), ("sparsecut-7b", 8, 60)])
def test_recipes_pass_and_fit(name, devices, most, monkeypatch):
    monkeypatch.setenv("LLAVA_DATA", "/nowhere")
    plans = dry_run(load_recipe(CONFIGS / f"{name}.yaml"), devices=devices)
    assert [plan.records for plan in plans] == list(PUBLISHED.values())
    assert [plan.records_per_step for plan in plans] == [256, 128]  # LLaVA-1.5's
    assert all(sum(plan.memory.values()) < most * GIB and plan.hours > 0.01 for plan in plans)
    said = "\n".join(lines(plans, devices=devices, tflops=989.0, mfu=0.4))
    assert "as published" in said and "published sizes" in said


def test_recipes_of_the_paper_differ_in_what_they_should():
    small, large = (load_recipe(CONFIGS / f"sparsecut-{size}.yaml") for size in ("7b", "13b"))
    assert (
        [s.args["learning_rate"] for s in small.stages]
        == [s.args["learning_rate"] for s in large.stages]
        == [1e-3, 2e-5]
    )
    for recipe in (small, large):
        args = [stage.args for stage in recipe.stages]
        steps = [8 * a["per_device_train_batch_size"] * a.get("gradient_accumulation_steps", 1) for a in args]
        assert steps == [256, 128] and recipe.stages[1].max_length == 2048
        assert all(a["warmup_steps"] == 0.03 and a["lr_scheduler_type"] == "cosine" and a["bf16"] for a in args)


def test_the_command_prints_it_and_writes_nothing(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({**WORLD, "stages": [one_stage()]}))
    done = subprocess.run(
        [sys.executable, "-m", "sparsecut", "train", str(recipe), "--dry-run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "stage one" in done.stdout and "note: no records of nowhere.json" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"train": ["projector"]}, "projector"),
        ({"devices": 0}, "devices is 0"),
        ({"train": ["fusion"], "mfu": 2}, "mfu 2"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(changes, sentence):
    more = {name: changes.pop(name) for name in ("devices", "mfu") if name in changes}
    with pytest.raises(ValueError, match=sentence):
        dry_run(parse_recipe({**WORLD, "stages": [one_stage(**changes)]}), **more)
