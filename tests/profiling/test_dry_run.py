"""A dry run counts what the model really has, does and keeps, and names what it assumes.

More recipes that ship are tried in tests/conformance/test_recipes.py.
"""

import json

import pytest
import torch
from helpers.dry_runs import (
    CONFIGS,
    FUSION,
    RECIPES,
    check_recipe,
    estimate,
    estimate_base,
    make_recipe,
    write_backbones,
)
from helpers.example_bases import build_example_base
from helpers.runs import write_records, write_word_records
from helpers.tiny import tiny_model
from transformers import AutoConfig

from sparsecut import upgrade
from sparsecut.adapters import add_adapters, get_adapter_parameters
from sparsecut.building import save
from sparsecut.cli.main import app
from sparsecut.config.recipe import Lora, load_recipe, parse_recipe
from sparsecut.hooks import CHECKPOINTING_NAMES
from sparsecut.modeling import SparseCutForConditionalGeneration
from sparsecut.profiling.dry_run import dry_run, format_estimates
from sparsecut.profiling.dry_run_data import PUBLISHED, read_record_facts
from sparsecut.profiling.fake_models import build_config, create_flop_counter, train_only
from sparsecut.training.arguments import compute_accumulation_steps

BOTH = ["fusion", "language"]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """A folder with configurations of a tiny encoder and a tiny language model."""
    return write_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture
def data(tmp_path):
    """A folder for files of records, with the one image that they name."""
    (tmp_path / "one.png").write_bytes(b"")
    return tmp_path


def build_real(backbones):
    """The model that a recipe around the backbones trains, with random weights."""
    configs = [AutoConfig.from_pretrained(backbones / part) for part in ("vision", "language")]
    return SparseCutForConditionalGeneration(build_config(*configs, FUSION))


def count_parts(model) -> dict[str, int]:
    groups = model.parameter_groups()
    return {name: sum(p.numel() for p in parameters) for name, parameters in groups.items()}


def test_parameters_are_those_of_the_model(backbones):
    parts = count_parts(build_real(backbones))
    estimated = estimate(backbones, train=BOTH)
    assert estimated.parameters == parts
    assert estimated.trained == {name: parts[name] for name in BOTH}


def test_a_view_size_is_counted(backbones):
    recipe = make_recipe(backbones)
    recipe["model"]["view_size"] = 48
    larger = dry_run(parse_recipe(recipe))[0]
    flops = estimate(backbones).flops_per_step
    assert larger.flops_per_step > 1.5 * flops


def test_adapters_have_the_parameters_that_peft_gives_them(backbones):
    pytest.importorskip("peft")
    estimated = estimate(backbones, train=["fusion", "language:lora"])
    model = build_real(backbones)
    add_adapters(model, ("language:lora",), Lora())
    parameters = get_adapter_parameters(model, "language")
    assert estimated.trained["language:lora"] == sum(p.numel() for p in parameters)


@pytest.mark.parametrize("train", [["fusion"], BOTH])
def test_flops_are_those_of_a_real_step(backbones, train):
    estimated = estimate(backbones, train=train)
    model = build_real(backbones)
    train_only(model, train)
    ids = torch.zeros(1, round(estimated.tokens_per_record), dtype=torch.long)
    ids[:, : round(estimated.image_tokens_per_record)] = model.config.image_token_id
    pixels = torch.zeros(1, model.plan.num_views, *model.config.grid.view)
    with create_flop_counter() as real:
        model(input_ids=ids, pixel_values=pixels, labels=ids, use_cache=False).loss.backward()
    flops_per_record = estimated.flops_per_step / estimated.records_per_step
    assert flops_per_record == pytest.approx(real.get_total_flops(), rel=0.02)


def test_steps_and_hours_follow_from_records_and_devices(backbones, tmp_path):
    write_records(tmp_path)
    args = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    data = {"path": str(tmp_path / "data.json")}
    estimated = estimate(backbones, data=data, args=args, devices=2)
    assert estimated.records == 12
    assert estimated.records_per_step == 16
    assert estimated.steps == 3
    seconds = 3 * estimated.flops_per_step / (2 * 989e12 * 0.4)
    assert estimated.hours == pytest.approx(seconds / 3600)


def test_memory_is_adams_and_is_divided_where_it_is_sharded(backbones):
    whole = estimate(backbones, train=BOTH)
    halves = estimate(backbones, train=BOTH, args={"fsdp": True}, devices=2)
    for name in ("weights", "gradients", "optimizer"):
        assert halves.memory[name] == whole.memory[name] / 2
    assert whole.memory["optimizer"] == 8 * sum(whole.trained.values())
    for name in CHECKPOINTING_NAMES:
        checkpointed = estimate(backbones, train=BOTH, args={name: True})
        assert checkpointed.memory["activations"] < whole.memory["activations"]


def test_deepspeed_shards_what_its_stage_says(backbones, tmp_path):
    def estimate_memory(level: int, devices: int) -> dict[str, float]:
        file = tmp_path / "zero.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": level}}))
        args = {"deepspeed": str(file), "bf16": True}
        return estimate(backbones, args=args, devices=devices).memory

    one = estimate_memory(3, devices=1)
    sharded = ("optimizer", "gradients", "weights")
    for level in (1, 2, 3):
        four = estimate_memory(level, devices=4)
        for name in sharded[:level]:
            assert four[name] == one[name] / 4
        for name in sharded[level:]:
            assert four[name] == one[name]


def test_a_deepspeed_file_that_is_absent_is_named(backbones, tmp_path):
    with pytest.raises(ValueError, match=r"none\.json"):
        estimate(backbones, args={"deepspeed": str(tmp_path / "none.json")})


def test_a_recipe_of_full_size_fits_its_devices(monkeypatch):
    check_recipe("upgrade-llava-7b", monkeypatch)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_know_their_published_data_and_make_its_batches(name, monkeypatch):
    monkeypatch.setenv("LLAVA_DATA", "/nowhere")
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    devices, _ = RECIPES[name]
    numbers = [read_record_facts(stage).number for stage in recipe.stages]
    assert numbers == list(PUBLISHED.values())[-len(numbers) :]
    batches = []
    for stage in recipe.stages:
        steps = compute_accumulation_steps(stage, devices)
        batches.append(devices * stage.args["per_device_train_batch_size"] * steps)
    assert batches == [256, 128][-len(batches) :]
    assert recipe.stages[-1].max_length == 2048


def test_recipes_of_the_paper_learn_at_its_rates():
    for size in ("7b", "13b"):
        recipe = load_recipe(CONFIGS / f"sparsecut-{size}.yaml")
        assert [stage.args["learning_rate"] for stage in recipe.stages] == [1e-3, 2e-5]
        for stage in recipe.stages:
            assert stage.args["warmup_steps"] == 0.03
            assert stage.args["lr_scheduler_type"] == "cosine"
            assert stage.args["bf16"]


def test_the_command_prints_it_and_writes_nothing(backbones, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps(make_recipe(backbones)))
    app(args=["train", str(recipe), "--dry-run"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "stage one" in printed
    assert "nowhere.json" in printed
    with pytest.raises(ValueError, match="--dry-run"):
        app(args=["train", str(recipe), "--json"], standalone_mode=False)
    app(args=["train", str(recipe), "--dry-run", "--json"], standalone_mode=False)
    (plain,) = json.loads(capsys.readouterr().out)
    assert plain["name"] == "one"
    assert plain["steps"] == 10
    assert plain["records_said"] == "absent"
    assert plain["memory"]["optimizer"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_part_that_the_model_lacks_is_named(backbones):
    with pytest.raises(ValueError, match="projector"):
        estimate(backbones, train=["projector"])


@pytest.mark.parametrize(
    ("options", "named"), [({"devices": 0}, "devices is 0"), ({"mfu": 2}, "mfu is 2")]
)
def test_a_machine_that_cannot_be_is_refused(backbones, options, named):
    with pytest.raises(ValueError, match=named):
        dry_run(parse_recipe(make_recipe(backbones)), **options)


def test_a_folder_that_does_not_exist_yet_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(CONFIGS / "nlvr.yaml")
    with pytest.raises(ValueError, match=recipe.model.language):
        dry_run(recipe)


def test_texts_have_no_image_and_mixtures_count_by_weight(backbones, data):
    texts = write_word_records(data / "t.json", {f"t{i}": 40 for i in range(30)}, has_images=False)
    images = write_word_records(data / "i.json", {f"i{i}": 40 for i in range(10)})
    alone = estimate(backbones, data=texts)
    both = estimate(backbones, data=[texts, images])
    assert alone.image_tokens_per_record == 0
    assert both.image_tokens_per_record == 16 / 4
    with_images = estimate(backbones, data=images).flops_per_step
    assert alone.flops_per_step < both.flops_per_step < with_images
    halves = estimate(backbones, data=[{**texts, "weight": 1}, {**images, "weight": 1}])
    assert halves.image_tokens_per_record == 8
    assert halves.records == 40


def test_the_longest_records_say_what_memory_is_needed(backbones, data):
    even = write_word_records(data / "even.json", {f"e{i}": 30 for i in range(20)})
    words = {f"e{i}": 20 for i in range(19)} | {"long": 220}
    mixed = write_word_records(data / "mixed.json", words)
    short = estimate(backbones, data=even)
    long = estimate(backbones, data=mixed)
    assert long.tokens_per_record == pytest.approx(short.tokens_per_record, abs=2)
    assert long.memory["activations"] > 3 * short.memory["activations"]
    cut = estimate(backbones, data=mixed, max_length=60)
    assert cut.memory["activations"] < long.memory["activations"]


def test_packed_rows_hold_as_many_records_as_fit(backbones, data):
    even = write_word_records(data / "even.json", {f"e{i}": 30 for i in range(20)})
    args = {"max_steps": -1, "num_train_epochs": 1}
    packed = estimate(backbones, data=even, pack=300, args=args)
    tokens_per_record = packed.tokens_per_record
    assert packed.longest == 300
    assert packed.records_per_step == pytest.approx(4 * 300 / tokens_per_record, rel=0.01)
    assert packed.steps == 2  # twenty records, nineteen a step


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_an_upgraded_model_is_counted_as_it_will_be(kind, tmp_path):
    base, processor = build_example_base(kind)
    model, _ = upgrade(base, processor=processor)
    parts = count_parts(model)
    model.save_pretrained(tmp_path / "saved")
    model.detach().save_pretrained(tmp_path / "base")
    for folder in ("base", "saved"):
        estimated = estimate_base(tmp_path / folder)
        assert estimated.parameters == parts
        assert estimated.trained == {"fusion": parts["fusion"]}
        assert estimated.memory["optimizer"] == 8 * parts["fusion"]
    with pytest.raises(ValueError, match="pack is 64"):
        estimate_base(tmp_path / "base", pack=64)
    if kind == "llava":
        estimated = estimate_base(tmp_path / "base", train=["projector"])
        assert estimated.trained == {"projector": parts["projector"]}
        assert estimated.flops_per_step > 0
    else:  # images of any size: what depends on theirs is unknown
        assert estimated.flops_per_step is None
        assert "activations" not in estimated.memory
        text = format_estimates([estimated], devices=1, tflops=989.0, mfu=0.4)
        assert "unknown TFLOP" in text
        with pytest.raises(ValueError, match="projector"):
            estimate_base(tmp_path / "base", train=["projector"])


def test_a_saved_model_brings_its_own_plan(tmp_path):
    model, processor = tiny_model()
    save(model, processor, tmp_path / "mine")
    assert estimate_base(tmp_path / "mine").parameters == count_parts(model)
    with pytest.raises(ValueError, match="none/such/folder"):
        estimate_base("none/such/folder")
