"""Adapters: they alone move, they are merged without a change of answers or kept in PEFT's format,
and a run with them goes on.
"""

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
from sparsecut.training.freezing import freeze
from sparsecut.training.trainer import StageTrainer

peft = pytest.importorskip("peft")
BOTH = ["fusion", "language:lora"]
SMALL = {"r": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}
PARTS = ["vision", "fusion", "language", "head"]


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json and their pictures."""
    write_records(tmp_path)
    return tmp_path


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    "names",
    [["fusion"], ["language"], ["head"], ["vision"], BOTH, ["language:lora"], ["vision:lora"]],
)
def test_freezing_freezes_every_tensor_but_those_of_the_parts_named(folder, names):
    before = weights(tiny_model()[0])
    more = {"lora": SMALL} if any(":lora" in name for name in names) else {}
    after = weights(run(folder, stage(folder, train=names, **more))[0])
    assert before.keys() == after.keys()
    starts = {
        "fusion": "fusion.",
        "language": "language_model.",
        "head": "language_model.lm_head",
        "vision": "vision_tower.",
    }
    for name in changed(before, after):
        part = next(part for part in names if name.startswith(starts[part.partition(":")[0]]))
        assert ":lora" not in part or name.rpartition(".")[0].endswith(("q_proj", "v_proj"))
    for part in names:
        assert any(
            name.startswith(starts[part.partition(":")[0]]) for name in changed(before, after)
        )


def test_merging_changes_no_answer(folder):
    model, processor = tiny_model()
    trainer = trainer_for(model, processor, folder)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
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


def test_an_adapter_kept_apart_comes_back_and_is_peft_s_own(folder):
    first = stage(folder, train=BOTH, lora={**SMALL, "merge": False})
    model = run(folder, first)[0]
    saved = folder / "out" / "final"
    adapter = saved.parent / "one" / "adapters" / "language"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    assert not any("lora" in name for name in load_file(saved / "model.safetensors"))
    trainer = trainer_for(*tiny_model(), folder)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(load(saved)[0](**batch).logits, expected)
        alone, _ = tiny_model()
        alone.fusion.load_state_dict(model.fusion.state_dict())
        peft.PeftModel.from_pretrained(alone.language_model, str(adapter)).eval()
        assert torch.equal(alone(**batch).logits, expected)


def test_a_next_stage_goes_on_training_the_same_adapter(folder):
    kept = {"lora": {**SMALL, "merge": False}}
    stages = [
        stage(folder, train=BOTH, **kept),
        stage(folder, name="two", train=["language:lora"], **kept),
    ]
    run(folder, *stages)
    one, two = (
        load_file(folder / "out" / name / "adapters" / "language" / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys() and changed(one, two) == set(one)
    assert torch.equal(
        *(load(folder / "out" / name)[0].fusion.paths[0].linear_1.weight for name in ("one", "two"))
    )


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("upgraded", [False, True])
def test_a_stage_with_adapters_goes_on_from_a_checkpoint_to_the_bit(
    folder, monkeypatch, upgraded, merge
):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    given = stage(folder, train=BOTH, lora={**SMALL, "dropout": 0.2, "merge": merge}, args=args)
    if upgraded:
        base, processor = build_example_base("llava")
        base.save_pretrained(folder / "base")
        processor.save_pretrained(folder / "base")

    def go(output: str, resume: bool = False):
        if not upgraded:
            return run(folder, given, output=str(folder / output), resume=resume)[0]
        plain = {
            "model": {"base": str(folder / "base")},
            "fusion": {"method": "sparsecut", "rank": 8},
            "stages": [given],
        }
        return train(
            parse_recipe({**plain, "output": str(folder / output)}), shown=False, resume=resume
        )[0]

    go("whole")
    step = StageTrainer.training_step

    def fails(self, *arguments, **named):
        if self.state.global_step == 3:
            raise InterruptedError
        return step(self, *arguments, **named)

    monkeypatch.setattr(StageTrainer, "training_step", fails)
    with pytest.raises(InterruptedError):
        go("cut")
    monkeypatch.setattr(StageTrainer, "training_step", step)
    go("cut", resume=True)
    assert [x["loss"] for x in log(folder, output="cut")] == [
        x["loss"] for x in log(folder, output="whole")
    ]
    one, two = (weights(load(folder / name / "one")[0]) for name in ("whole", "cut"))
    assert one.keys() == two.keys() and not changed(one, two)
    if (
        upgraded
    ):  # an adapter beside the base leaves it what its name says; one that is merged does not
        assert (folder / "whole" / "one" / "model.safetensors").exists() == merge


def test_parts_have_their_own_rate_and_decay(folder):
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
    trainer = trainer_for(model, processor, folder, args=args, **changes)
    groups = trainer.create_optimizer().param_groups
    assert {(g["part"], g["lr"], g["weight_decay"]) for g in groups} == {
        ("fusion", 1e-4, 0.3),
        ("fusion", 1e-4, 0.0),
        ("language:lora", 1e-3, 0.1),
    }


def test_dropout_of_an_adapter_is_on_while_its_part_rests(folder):
    model, processor = tiny_model()
    add_adapters(model, ("language:lora",), Lora(r=4, dropout=0.5))
    trainer = trainer_for(model, processor, folder, train=["language:lora"])
    model.train()
    trainer.compute_loss(model, trainer.data_collator([trainer.train_dataset[0]]))
    layer = model.language_model.model.layers[0].self_attn.q_proj
    assert (
        layer.lora_dropout["default"].training
        and not model.language_model.model.layers[0].mlp.training
    )


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"train": ["language", "language:lora"]}, "names both language and language:lora"),
        ({"train": ["fusion:lora"]}, "train names a part that is 'fusion:lora'"),
        ({"lora": {"r": 4}}, "lora is set, but stage one trains fusion"),
        ({"train": BOTH, "lora": {"rank": 4}}, r"lora.rank is not known"),
        ({"train": BOTH, "lora": {"r": 0}}, "r is at least 1"),
        ({"train": BOTH, "lora": {"targets": ["q_prj"]}}, "its linear layers are .*q_proj"),
        (
            {"weight_decay": {"language": 0.1}},
            "weight_decay is set for 'language', but stage one trains fusion",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_a_sentence(folder, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(folder, stage(folder, **changes))


def test_a_base_in_eight_bits_trains_with_an_adapter_beside_it(folder):
    """Where bitsandbytes is installed: the base stays as it is, and only shortcuts and adapter are
    written.
    """
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base, processor = build_example_base("llava")
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    plan, eight = {"method": "sparsecut", "rank": 8}, BitsAndBytesConfig(load_in_8bit=True)
    model, processor = upgrade(
        str(folder / "base"), plan, quantization_config=eight, dtype=torch.float32
    )
    given = stage(folder, train=BOTH, lora={**SMALL, "merge": False}, args={"use_cpu": True})
    plain = {
        "model": {"base": str(folder / "base")},
        "stages": [given],
        "output": str(folder / "out"),
    }
    train(parse_recipe(plain), model=model, processor=processor, shown=False)
    written = {path.name for path in (folder / "out" / "final").rglob("*.safetensors")}
    assert written == {"fusion.safetensors", "adapter_model.safetensors"}
    assert len(log(folder)) == 3
