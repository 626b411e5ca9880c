"""Training: named parts alone move, at their own rates, over all learned tokens, the same twice."""

import itertools
import math

import pytest
import torch
from helpers.runs import log, read_losses, run, stage, trainer_for
from helpers.tiny import tiny_model

from sparsecut.building import load
from sparsecut.data.collator import Collator
from sparsecut.hooks import CHECKPOINTING, CHECKPOINTING_NAMES

BOTH = ["fusion", "language"]


@pytest.mark.parametrize(
    "parts, prefixes",
    [
        (["fusion"], ("fusion",)),
        (["language"], ("language_model",)),
        (["fusion", "head"], ("fusion", "language_model.lm_head")),
        (["vision"], ("vision_tower",)),
    ],
)
def test_only_named_parts_change(folder, parts, prefixes):
    before = dict(tiny_model()[0].named_parameters())
    after = dict(run(folder, stage(folder, train=parts))[0].named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    named = {name for name in before if name.startswith(prefixes)}
    assert changed
    assert changed <= named
    # What lies above the deepest tap is never run.
    for name in named - changed:
        assert name.startswith("vision_tower")
        assert ".layers.5." in name or "post_layernorm" in name


def test_frozen_parts_stay_in_evaluation_mode(folder):
    """With dropout of one half in the frozen language model, two passes give one loss."""
    model, processor = tiny_model()
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = trainer_for(model, processor, folder)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    losses = []
    for _ in range(2):
        model.train()
        losses.append(trainer.compute_loss(model, dict(batch)).item())
    assert losses[0] == losses[1]
    assert model.fusion.training
    assert not model.language_model.training


def test_constant_gates_stay_and_the_model_is_ready_afterwards(folder):
    model, _ = run(folder)
    assert torch.equal(model.fusion.gates, torch.ones_like(model.fusion.gates))
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


RATES = {
    "train": BOTH,
    "lr": {"fusion": 1e-3, "head": 0.0},
    "args": {"weight_decay": 0.1, "learning_rate": 1e-4},
}


def test_each_part_has_its_own_learning_rate_and_matrices_are_decayed(folder):
    model, processor = tiny_model()
    groups = trainer_for(model, processor, folder, **RATES).create_optimizer().param_groups
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)
    rates = {group["part"]: group["lr"] for group in groups}
    assert rates == {"fusion": 1e-3, "language": 1e-4, "head": 0.0}
    decayed = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert decayed
    assert all(parameter.dim() > 1 for parameter in decayed)


def test_learning_rates_follow_one_schedule(folder):
    head = tiny_model()[0].language_model.lm_head.weight
    run(folder, stage(folder, **RATES))
    assert torch.equal(load(folder / "out" / "one")[0].language_model.lm_head.weight, head)
    rates = [line["lr"] for line in log(folder)]
    assert [rate["fusion"] for rate in rates] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    for rate in rates:
        assert rate["language"] == pytest.approx(rate["fusion"] / 10)


def test_trained_gates_are_not_decayed(folder):
    model, processor = tiny_model({"method": "sparsecut", "gate": "zero"})
    trainer = trainer_for(model, processor, folder, args={"weight_decay": 0.1})
    decays = []
    for group in trainer.create_optimizer().param_groups:
        if any(parameter is model.fusion.gates for parameter in group["params"]):
            decays.append(group["weight_decay"])
    assert decays == [0.0]


def test_the_same_recipe_twice_gives_the_same_losses_to_the_bit(folder):
    first = stage(folder, template="plain")
    second = stage(folder, name="two", train=BOTH)
    losses = []
    for output in ("first", "again"):
        run(folder, first, second, output=str(folder / output))
        losses.append([read_losses(folder, name, output) for name in ("one", "two")])
    assert losses[0] == losses[1]
    for stage_losses in losses[0]:
        assert len(stage_losses) == 3
        assert all(math.isfinite(loss) for loss in stage_losses)


def test_two_variants_see_the_same_batches_in_the_same_order(folder, monkeypatch):
    batches = {}
    collate = Collator.__call__

    def record(self, items):
        texts = [item["input_ids"][item["input_ids"] != image_token_id] for item in items]
        batches[plan].append([text.tolist() for text in texts])
        return collate(self, items)

    monkeypatch.setattr(Collator, "__call__", record)
    for plan in ("sparsecut", "llava"):
        batches[plan] = []
        image_token_id = tiny_model(plan)[1].image_token_id
        run(folder, stage(folder, args={"max_steps": 9}), plan=plan, output=str(folder / plan))
    assert batches["sparsecut"] == batches["llava"]
    assert len(batches["llava"]) >= 9
    # The second epoch is shuffled anew.
    assert batches["llava"][:3] != batches["llava"][6:9]


def test_the_loss_counts_every_learned_token_of_the_step_once(folder):
    """Two micro-batches of two give the loss, and the weights, of one batch of four."""
    weights = []
    for size, steps in ((4, 1), (2, 2)):
        args = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_steps": 2,
            "optim": "sgd",
        }
        model, _ = run(folder, stage(folder, args=args), output=str(folder / str(size)))
        weights.append(torch.cat([p.flatten() for p in model.fusion.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-6)
    losses = read_losses(folder, output="4")
    assert losses == pytest.approx(read_losses(folder, output="2"), abs=1e-5)


def test_older_code_averages_the_means_of_micro_batches(folder):
    """The switch for it does that; the usual loss is another one, as answers differ in length."""
    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1}
    losses = {}
    for over in ("tokens", "batches"):
        run(folder, stage(folder, args=args, loss_over=over), output=str(folder / over))
        losses[over] = read_losses(folder, output=over)[0]
    trainer = trainer_for(*tiny_model(), folder, args=args)
    total = 0.0
    total_tokens = 0
    means = []
    for batch in itertools.islice(trainer.get_train_dataloader(), 2):
        means.append(trainer.compute_loss(trainer.model, batch).item())
        num_tokens = int((batch["labels"] != -100).sum())
        total += means[-1] * num_tokens
        total_tokens += num_tokens
    assert losses["batches"] == pytest.approx(sum(means) / 2, abs=1e-5)
    assert losses["tokens"] == pytest.approx(total / total_tokens, abs=1e-5)
    assert abs(losses["tokens"] - losses["batches"]) > 1e-4


@pytest.mark.parametrize("parts", [["fusion"], ["vision"], BOTH])
def test_batches_without_images_train(folder, parts):
    run(folder, stage(folder, data="texts.json", train=parts))
    for line in log(folder):
        assert math.isfinite(line["loss"])
        assert line["image_tokens"] == 0


def test_half_precision_computes_alike_and_keeps_single_precision_weights(folder):
    losses = []
    for half in (False, True):
        plain = stage(folder, train=BOTH, args={"bf16": half})
        model, _ = run(folder, plain, output=str(folder / str(half)))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        losses.append(read_losses(folder, output=str(half)))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", CHECKPOINTING_NAMES)
def test_checkpointing_changes_no_loss(folder, name):
    losses = []
    for checkpointing in (False, True):
        plain = stage(folder, args={name: checkpointing})
        run(folder, plain, output=str(folder / str(checkpointing)))
        losses.append(read_losses(folder, output=str(checkpointing)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_checkpointing_recomputes_frozen_layers(folder):
    model, processor = tiny_model()
    calls = []
    layer = model.language_model.model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer = trainer_for(model, processor, folder)
    calls.clear()
    getattr(model, f"{CHECKPOINTING}_enable")()
    model.train()
    trainer.compute_loss(model, trainer.data_collator([trainer.train_dataset[0]])).backward()
    assert len(calls) == 2  # once forward, once recomputed
