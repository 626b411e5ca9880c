"""Dry runs of recipes around tiny backbones, whose folders hold a configuration and no weights."""

from pathlib import Path

from transformers import CLIPVisionConfig, LlamaConfig

from sparsecut.config.recipe import load_recipe, parse_recipe
from sparsecut.profiling.dry_run import GIB, dry_run, format_estimates
from sparsecut.profiling.dry_run_data import PUBLISHED

CONFIGS = Path(__file__).parents[2] / "sparsecut" / "recipes"
FUSION = {"method": "sparsecut", "count": 2}
IMAGE_TOKENS = 16
# Recipe, devices, and GiB that each of them must suffice.
RECIPES = {
    "smol": (1, 16),
    "sparsecut-7b": (8, 60),
    "sparsecut-13b": (8, 70),
    "upgrade-llava-7b": (8, 60),
}


def write_backbones(folder: Path) -> Path:
    """Write an encoder of 4 x 4 patches and a language model, two and three layers deep."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    language = LlamaConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=64,
    )
    vision.save_pretrained(folder / "vision")
    language.save_pretrained(folder / "language")
    return folder


def make_stage(**changes) -> dict:
    """A stage in a recipe's plain form: ten steps of four records that are nowhere."""
    args = {"max_steps": 10, "per_device_train_batch_size": 4, **changes.pop("args", {})}
    stage = {"name": "one", "data": {"path": "nowhere.json"}, "train": ["fusion"]}
    return {**stage, "args": args, **changes}


def make_recipe(backbones: Path, **changes) -> dict:
    """A recipe in plain form, of one stage with these changes."""
    model = {"vision": str(backbones / "vision"), "language": str(backbones / "language")}
    return {"model": model, "fusion": FUSION, "output": "runs/x", "stages": [make_stage(**changes)]}


def estimate(backbones: Path, *, devices: int = 1, **changes):
    """The estimate of one stage with these changes."""
    return dry_run(parse_recipe(make_recipe(backbones, **changes)), devices=devices)[0]


def estimate_base(folder: Path, **changes):
    """The estimate of one stage that starts from a base."""
    plain = {"model": {"base": str(folder)}, "output": "x", "stages": [make_stage(**changes)]}
    return dry_run(parse_recipe(plain))[0]


def check_recipe(name: str, monkeypatch) -> None:
    """Assert that a recipe that ships fits its devices, by published sizes alone."""
    devices, max_gib = RECIPES[name]
    monkeypatch.setenv("LLAVA_DATA", "/nowhere")
    estimates = dry_run(load_recipe(CONFIGS / f"{name}.yaml"), devices=devices)
    numbers = list(PUBLISHED.values())[-len(estimates) :]
    assert [e.records for e in estimates] == numbers
    batches = [256, 128][-len(estimates) :]  # LLaVA-1.5's
    assert [e.records_per_step for e in estimates] == batches
    assert estimates[-1].longest == 2048
    for e in estimates:
        assert sum(e.memory.values()) < max_gib * GIB
        assert e.hours > 0.01
    text = format_estimates(estimates, devices=devices, tflops=989.0, mfu=0.4)
    assert "as published" in text
    assert "published sizes" in text
    if name == "smol":  # its head is tied, and counted once
        assert round(estimates[0].parameters["language"] / 1e6, 1) == 134.5
