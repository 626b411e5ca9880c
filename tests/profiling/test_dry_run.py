"""A dry run counts what the model really has, does and keeps, and tells what of it hangs on data
that is not there.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers.example_bases import build_example_base
from helpers.runs import write_records, write_word_records
from helpers.tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from sparsecut import upgrade
from sparsecut.building import build, save
from sparsecut.cli.main import app
from sparsecut.config.recipe import load_recipe, parse_recipe
from sparsecut.profiling.counting import counter
from sparsecut.profiling.dry_run import GIB, dry_run, lines
from sparsecut.profiling.dry_run_data import PUBLISHED, records_of
from sparsecut.training.arguments import compute_accumulation_steps

CONFIGS = Path(__file__).parents[2] / "configs"
WORLD = {
    "model": {"vision": "shapes", "language": "shapes"},
    "fusion": {"method": "sparsecut", "count": 3},
    "output": "runs/x",
}


def one_stage(**changes) -> dict:
    args = {"max_steps": 10, "per_device_train_batch_size": 4, **changes.pop("args", {})}
    return {
        "name": "one",
        "data": {"path": "nowhere.json"},
        "train": ["fusion"],
        "args": args,
        **changes,
    }


def plan_of(**changes):
    devices = changes.pop("devices", 1)
    return dry_run(parse_recipe({**WORLD, "stages": [one_stage(**changes)]}), devices=devices)[0]


@pytest.fixture
def model():
    return build("shapes", "shapes", WORLD["fusion"])[0]


@pytest.mark.parametrize("train", [["fusion"], ["fusion", "language"], ["fusion", "language:lora"]])
def test_parameters_are_those_of_the_model(model, train):
    plan = plan_of(train=train)
    real = {name: sum(p.numel() for p in found) for name, found in model.parameter_groups().items()}
    assert (
        abs(sum(plan.parameters.values()) / sum(real.values()) - 1) < 0.01
    )  # the built one has a word more
    assert plan.trained["fusion"] == real["fusion"]
    if "language:lora" in train:
        peft = pytest.importorskip("peft")
        from sparsecut.adapters import add_adapters, get_adapter_parameters, merge_adapters
        from sparsecut.config.recipe import Lora

        add_adapters(model, ("language:lora",), Lora())
        assert (
            plan.trained["language:lora"]
            == sum(p.numel() for p in get_adapter_parameters(model, "language"))
            and peft
        )
        merge_adapters(model)


@pytest.mark.parametrize("train", [["fusion"], ["fusion", "language"]])
def test_operations_are_those_of_a_real_step(model, train):
    plan = plan_of(train=train)
    model.requires_grad_(False)
    for name in train:
        for parameter in model.parameter_groups()[name]:
            parameter.requires_grad_(True)
    ids = torch.zeros(1, round(plan.tokens_per_record), dtype=torch.long)
    ids[:, : round(plan.image_tokens_per_record)] = model.config.image_token_id
    pixels = torch.zeros(1, model.plan.num_views, *model.config.grid.view)
    with counter() as real:
        model(input_ids=ids, pixel_values=pixels, labels=ids, use_cache=False).loss.backward()
    assert isinstance(real, FlopCounterMode)
    assert plan.flops_per_step / plan.records_per_step == pytest.approx(
        real.get_total_flops(), rel=0.02
    )


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
        plan_of(train=["fusion", "language"], args={"activation_checkpointing": True}).memory[
            "activations"
        ]
        < whole.memory["activations"]
    )
    assert whole.memory["optimizer"] == 8 * sum(whole.trained.values())


@pytest.mark.parametrize(
    ("name", "devices", "most"),
    [
        ("smol", 1, 16),
        ("sparsecut-7b", 8, 60),
        ("sparsecut-13b", 8, 70),
        ("upgrade-llava-7b", 8, 60),
    ],
)
def test_recipes_pass_and_fit(name, devices, most, monkeypatch):
    monkeypatch.setenv("LLAVA_DATA", "/nowhere")
    plans = dry_run(load_recipe(CONFIGS / f"{name}.yaml"), devices=devices)
    assert [plan.records for plan in plans] == list(PUBLISHED.values())[-len(plans) :]
    assert [plan.records_per_step for plan in plans] == [256, 128][-len(plans) :]  # LLaVA-1.5's
    assert (
        name != "smol" or round(plans[0].parameters["language"] / 1e6, 1) == 134.5
    )  # its head is tied, and counted once
    assert plans[-1].longest == 2048 and "are assumed" in "".join(plans[-1].notes)
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
        steps = [
            8 * s.args["per_device_train_batch_size"] * compute_accumulation_steps(s, 8)
            for s in recipe.stages
        ]
        assert steps == [256, 128] and recipe.stages[1].max_length == 2048
        assert all(
            a["warmup_steps"] == 0.03 and a["lr_scheduler_type"] == "cosine" and a["bf16"]
            for a in args
        )


def test_the_command_prints_it_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps({**WORLD, "stages": [one_stage()]}))
    app(args=["train", str(recipe), "--dry-run"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "stage one" in printed and "note: no records of nowhere.json" in printed
    with pytest.raises(ValueError, match="give --dry-run too"):
        app(args=["train", str(recipe), "--json"], standalone_mode=False)
    app(args=["train", str(recipe), "--dry-run", "--json"], standalone_mode=False)
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["name"] == "one" and plan["steps"] == 10 and plan["memory"]["optimizer"] > 0
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


def test_records_are_those_that_the_stage_takes(tmp_path):
    (tmp_path / "one.png").write_bytes(b"")
    words = {f"{'keep' if i % 4 else 'out'}-{i}": 20 for i in range(40)} | {"keep-long": 400}
    data = write_word_records(tmp_path / "a.json", words)
    whole = records_of(parse_recipe({**WORLD, "stages": [one_stage(data=data)]}).stages[0])
    assert (whole.number, whole.pictured, whole.longest, whole.most) == (
        41,
        1.0,
        round(1.5 * 401),
        1,
    )
    chosen = plan_of(data={**data, "where": "^keep", "keep": 10})
    assert chosen.records == 10
    held = plan_of(data={**data, "hold_out": "long"})
    assert (held.records, held.longest) == (40, round(1.5 * 21) + 16)
    with pytest.raises(ValueError, match="gives no record to use"):
        plan_of(data={**data, "where": "nobody"})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        plan_of(data={"path": str(tmp_path / "broken.json")})
    assert plan_of(data={**data, "streaming": True}).records_said == "a stream"


def test_texts_have_no_picture_and_mixtures_count_by_weight(tmp_path):
    (tmp_path / "one.png").write_bytes(b"")
    texts = write_word_records(
        tmp_path / "texts.json", {f"t{i}": 40 for i in range(30)}, pictures=False
    )
    shown = write_word_records(tmp_path / "shown.json", {f"s{i}": 40 for i in range(10)})
    alone, both = plan_of(data=texts), plan_of(data=[texts, shown])
    assert alone.image_tokens_per_record == 0 and both.image_tokens_per_record == 16 / 4
    assert alone.flops_per_step < both.flops_per_step < plan_of(data=shown).flops_per_step
    halves = plan_of(data=[{**texts, "weight": 1}, {**shown, "weight": 1}])
    assert halves.image_tokens_per_record == 8 and halves.records == 40


def test_the_longest_records_say_what_memory_is_needed(tmp_path):
    (tmp_path / "one.png").write_bytes(b"")
    even = write_word_records(tmp_path / "even.json", {f"e{i}": 30 for i in range(20)})
    mixed = write_word_records(
        tmp_path / "mixed.json", {f"e{i}": 20 for i in range(19)} | {"long": 220}
    )
    one, two = plan_of(data=even), plan_of(data=mixed)
    assert two.tokens_per_record == pytest.approx(one.tokens_per_record, abs=2)
    assert two.memory["activations"] > 3 * one.memory["activations"]
    assert plan_of(data=mixed, max_length=60).memory["activations"] < two.memory["activations"]
    rows = plan_of(data=even, pack=300, args={"max_steps": -1, "num_train_epochs": 1})
    assert rows.longest == 300 and rows.records_per_step == pytest.approx(
        4 * 300 / one.tokens_per_record, rel=0.01
    )
    assert rows.steps == 2  # twenty records, nineteen a step


@pytest.mark.parametrize(
    ("level", "shared"),
    [
        (1, {"optimizer"}),
        (2, {"optimizer", "gradients"}),
        (3, {"optimizer", "gradients", "weights"}),
    ],
)
def test_deepspeed_shares_out_what_its_stage_says(level, shared, tmp_path):
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": level}}))
    one, four = (
        plan_of(args={"deepspeed": str(settings), "bf16": True}, devices=n).memory for n in (1, 4)
    )
    assert {
        name for name in ("weights", "gradients", "optimizer") if four[name] == one[name] / 4
    } == shared
    assert all(four[name] == one[name] for name in {"weights", "gradients", "optimizer"} - shared)
    with pytest.raises(ValueError, match="which is not there"):
        plan_of(args={"deepspeed": str(tmp_path / "none.json")})


@pytest.mark.parametrize(
    ("processes", "args", "many"),
    [(1, {}, 64), (8, {}, 8), (8, {"gradient_accumulation_steps": 8}, 8), (64, {}, 1)],
)
def test_a_global_batch_is_accumulated(processes, args, many):
    one = parse_recipe({**WORLD, "stages": [one_stage(global_batch=256, args=args)]}).stages[0]
    assert compute_accumulation_steps(one, processes) == many


@pytest.mark.parametrize(
    ("processes", "args", "sentence"),
    [
        (
            3,
            {},
            (
                "global_batch is 256, which per_device_train_batch_size 4 x 3 processes does not"
                " give; choose a divisor"
            ),
        ),
        (128, {}, "x 128 processes does not give"),
        (
            1,
            {"gradient_accumulation_steps": 2},
            "4 x 1 process x gradient_accumulation_steps 2 = 8 does not give; leave",
        ),
        (
            1,
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size is 0, but must be a whole number",
        ),
        (1, {"gradient_accumulation_steps": -2}, "gradient_accumulation_steps is -2"),
        (1, {"auto_find_batch_size": True}, "auto_find_batch_size makes batches smaller"),
    ],
)
def test_a_global_batch_that_cannot_be_is_refused_with_its_arithmetic(processes, args, sentence):
    one = parse_recipe({**WORLD, "stages": [one_stage(global_batch=256, args=args)]}).stages[0]
    with pytest.raises(ValueError, match=sentence):
        compute_accumulation_steps(one, processes)


def test_a_folder_that_is_made_first_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder; correct it, or make it first"):
        dry_run(load_recipe(CONFIGS / "nlvr.yaml"))


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_a_finished_model_is_counted_as_it_will_be(kind, tmp_path):
    base, processor = build_example_base(kind)
    model, _ = upgrade(base, processor=processor)
    real = {name: sum(p.numel() for p in found) for name, found in model.parameter_groups().items()}
    model.save_pretrained(tmp_path / "saved")
    model.detach().save_pretrained(tmp_path / "base")
    for folder in ("base", "saved"):
        (plan,) = finished(tmp_path / folder)
        assert plan.parameters == real and plan.trained == {"fusion": real["fusion"]}
        assert plan.memory["optimizer"] == 8 * real["fusion"]
    if kind == "llava":
        (plan,) = finished(tmp_path / "base", train=["projector"])
        assert plan.trained == {"projector": real["projector"]} and plan.flops_per_step > 0
    else:  # pictures of any size: what hangs on theirs is left out, in words
        assert plan.flops_per_step is None and "activations" not in plan.memory
        said = "\n".join(lines([plan], devices=1, tflops=989.0, mfu=0.4))
        assert "unknown TFLOP" in said and "at sizes of their own" in said
        with pytest.raises(ValueError, match="would train nothing"):
            finished(tmp_path / "base", train=["projector"])
    with pytest.raises(ValueError, match="pack is 64, but a finished model"):
        finished(tmp_path / "base", pack=64)


def finished(folder: Path, **changes):
    """The dry run of a recipe with this base."""
    return dry_run(
        parse_recipe(
            {"model": {"base": str(folder)}, "output": "x", "stages": [one_stage(**changes)]}
        )
    )


def test_a_saved_model_brings_its_own_plan(tmp_path):
    model, processor = tiny_model()
    save(model, processor, tmp_path / "mine")
    (plan,) = finished(tmp_path / "mine")
    assert plan.parameters == {
        name: sum(p.numel() for p in found) for name, found in model.parameter_groups().items()
    }
    with pytest.raises(ValueError, match="there is no"):
        finished(tmp_path / "none" / "such" / "folder")
