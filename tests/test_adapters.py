"""Adapters: only they are trained, they merge or are saved in PEFT's format, and runs resume."""

import json

import pytest
import torch
from helpers.example_bases import build_example_base
from helpers.runs import log, run, stage, trainer_for, write_records
from helpers.tiny import tiny_model
from safetensors.torch import load_file

from sparsecut import load, train, upgrade
from sparsecut.adapters import add_adapters, merge_adapters
from sparsecut.config.recipe import Lora, parse_recipe
from sparsecut.schema import UserError
from sparsecut.training.freezing import freeze
from sparsecut.training.trainer import StageTrainer

peft = pytest.importorskip("peft")
BOTH = ["fusion", "language:lora"]
SMALL = {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}
PREFIXES = {
    "fusion": "fusion.",
    "language": "language_model.",
    "head": "language_model.lm_head",
    "vision": "vision_tower.",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with data.json, texts.json and their images, which no test changes."""
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture
def run_stages(data, tmp_path):
    """Trains the tiny model and returns it; the run folder is tmp_path / "out"."""

    def run_in_folder(*stages, output="out", **changes):
        return run(data, *stages, output=str(tmp_path / output), **changes)[0]

    return run_in_folder


def copy_weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def find_changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def make_batch(data):
    trainer = trainer_for(*tiny_model(), data)
    return trainer.data_collator([trainer.train_dataset[i] for i in range(3)])


@pytest.mark.parametrize(
    "names",
    [["fusion"], ["language"], ["head"], ["vision"], BOTH, ["language:lora"], ["vision:lora"]],
)
def test_a_stage_trains_the_named_parts_alone(data, run_stages, names):
    before = copy_weights(tiny_model()[0])
    lora = {"lora": SMALL} if any(":lora" in name for name in names) else {}
    args = {"max_steps": 2}
    changed = find_changed(
        before, copy_weights(run_stages(stage(data, train=names, args=args, **lora)))
    )
    trained = set()
    for weight in changed:
        name = next(n for n in names if weight.startswith(PREFIXES[n.partition(":")[0]]))
        trained.add(name)
        if ":lora" in name:
            assert weight.rpartition(".")[0].endswith(("q_proj", "v_proj"))
    assert trained == set(names)


def test_merging_changes_no_answer(data):
    model, _ = tiny_model()
    batch = make_batch(data)
    add_adapters(model, ("language:lora",), Lora(r=4))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    with torch.no_grad():
        apart = model(**batch).logits
        merge_adapters(model)
        merged = model(**batch).logits
    assert torch.allclose(apart, merged, atol=1e-5)
    assert not any("lora" in name for name in model.state_dict())


def test_an_adapter_saved_apart_loads_again_and_is_in_the_format_of_peft(
    data, run_stages, tmp_path
):
    model = run_stages(stage(data, train=BOTH, lora={**SMALL, "merge": False}))
    saved = tmp_path / "out" / "final"
    adapter = tmp_path / "out" / "one" / "adapters" / "language"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    assert not any("lora" in name for name in load_file(saved / "model.safetensors"))

    batch = make_batch(data)
    alone, _ = tiny_model()
    alone.fusion.load_state_dict(model.fusion.state_dict())
    peft.PeftModel.from_pretrained(alone.language_model, str(adapter)).eval()
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(load(saved)[0](**batch).logits, expected)
        assert torch.equal(alone(**batch).logits, expected)


def test_a_next_stage_goes_on_training_the_same_adapter(data, run_stages, tmp_path):
    lora = {"lora": {**SMALL, "merge": False}}
    first = stage(data, train=BOTH, **lora)
    second = stage(data, name="two", train=["language:lora"], **lora)
    run_stages(first, second)
    folders = [tmp_path / "out" / name for name in ("one", "two")]
    adapter_file = "adapters/language/adapter_model.safetensors"
    before, after = (load_file(folder / adapter_file) for folder in folders)
    assert find_changed(before, after) == set(before)
    before, after = (load(folder)[0].fusion.state_dict() for folder in folders)
    assert not find_changed(before, after)


@pytest.fixture
def upgraded_recipe(tmp_path):
    """Settings of a recipe that upgrades a saved tiny base."""
    base, processor = build_example_base("llava")
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    fusion = {"method": "sparsecut", "rank": 8}
    return {"model": {"base": str(tmp_path / "base")}, "fusion": fusion}


@pytest.mark.parametrize(("is_upgrade", "merge"), [(False, True), (True, False)])
def test_a_stage_with_adapters_resumes_from_a_checkpoint_to_the_bit(
    data, tmp_path, monkeypatch, upgraded_recipe, is_upgrade, merge
):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    one = stage(data, train=BOTH, lora={**SMALL, "dropout": 0.2, "merge": merge}, args=args)

    def train_to(output: str, resume: bool = False):
        if not is_upgrade:
            run(data, one, output=str(tmp_path / output), resume=resume)
            return
        recipe = {**upgraded_recipe, "stages": [one], "output": str(tmp_path / output)}
        train(parse_recipe(recipe), shown=False, resume=resume)

    train_to("whole")
    training_step = StageTrainer.training_step

    def fail_at_third_step(self, *arguments, **named):
        if self.state.global_step == 3:
            raise InterruptedError
        return training_step(self, *arguments, **named)

    monkeypatch.setattr(StageTrainer, "training_step", fail_at_third_step)
    with pytest.raises(InterruptedError):
        train_to("cut")
    monkeypatch.setattr(StageTrainer, "training_step", training_step)
    train_to("cut", resume=True)

    cut_losses = [line["loss"] for line in log(tmp_path, output="cut")]
    assert cut_losses == [line["loss"] for line in log(tmp_path, output="whole")]
    whole, cut = (copy_weights(load(tmp_path / name / "one")[0]) for name in ("whole", "cut"))
    assert not find_changed(whole, cut)


def test_an_upgrade_is_saved_whole_only_where_the_adapter_was_merged(
    data, tmp_path, upgraded_recipe
):
    """A merged adapter changes the base, so its name no longer identifies its weights."""
    for merge in (True, False):
        one = stage(data, train=BOTH, lora={**SMALL, "merge": merge}, args={"max_steps": 1})
        output = tmp_path / f"merge-{merge}"
        recipe = {**upgraded_recipe, "stages": [one], "output": str(output)}
        train(parse_recipe(recipe), shown=False)
        assert (output / "one" / "model.safetensors").exists() == merge


def test_parts_have_their_own_rate_and_decay(data):
    model, processor = tiny_model()
    changes = {
        "train": BOTH,
        "lora": SMALL,
        "lr": {"language:lora": 1e-3},
        "weight_decay": {"fusion": 0.3},
    }
    args = {"weight_decay": 0.1, "learning_rate": 1e-4}
    add_adapters(model, tuple(BOTH), Lora(**{**SMALL, "targets": ("q_proj", "v_proj")}))
    freeze(model, tuple(BOTH))
    trainer = trainer_for(model, processor, data, args=args, **changes)
    groups = trainer.create_optimizer().param_groups
    assert {(g["part"], g["lr"], g["weight_decay"]) for g in groups} == {
        ("fusion", 1e-4, 0.3),
        ("fusion", 1e-4, 0.0),
        ("language:lora", 1e-3, 0.1),
    }


def test_dropout_of_an_adapter_is_on_while_its_part_is_frozen(data):
    model, processor = tiny_model()
    add_adapters(model, ("language:lora",), Lora(r=4, dropout=0.5))
    trainer = trainer_for(model, processor, data, train=["language:lora"])
    model.train()
    trainer.compute_loss(model, trainer.data_collator([trainer.train_dataset[0]]))
    layer = model.language_model.model.layers[0]
    assert layer.self_attn.q_proj.lora_dropout["default"].training
    assert not layer.mlp.training


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train": ["language", "language:lora"]}, "language and language:lora"),
        ({"train": ["fusion:lora"]}, "'fusion:lora'"),
        ({"lora": {"r": 4}}, "lora .*fusion"),
        ({"train": BOTH, "lora": {"rank": 4}}, r"lora\.rank"),
        ({"train": BOTH, "lora": {"r": 0}}, r"\br\b.* 1"),
        ({"train": BOTH, "lora": {"targets": ["q_prj"]}}, "'q_prj'.*, q_proj"),
        ({"weight_decay": {"language": 0.1}}, "'language'.* fusion"),
    ],
)
def test_mistaken_adapters_are_refused(data, run_stages, changes, problem):
    with pytest.raises(UserError, match=problem):
        run_stages(stage(data, **changes))


def test_a_base_in_eight_bits_trains_with_an_adapter_beside_it(data, tmp_path, upgraded_recipe):
    """The base stays as it is, and only shortcuts and adapter are written."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model, processor = upgrade(
        upgraded_recipe["model"]["base"],
        upgraded_recipe["fusion"],
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float32,
    )
    one = stage(data, train=BOTH, lora={**SMALL, "merge": False}, args={"use_cpu": True})
    recipe = {
        "model": upgraded_recipe["model"],
        "stages": [one],
        "output": str(tmp_path / "out"),
    }
    train(parse_recipe(recipe), model=model, processor=processor, shown=False)
    written = {path.name for path in (tmp_path / "out" / "final").rglob("*.safetensors")}
    assert written == {"fusion.safetensors", "adapter_model.safetensors"}
    assert len(log(tmp_path)) == 3
