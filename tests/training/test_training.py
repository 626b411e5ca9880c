"""Training: only named parts move, at their own rates, over all learned tokens, and the same
twice.
"""

import itertools
import math

import pytest
import torch
from helpers.runs import log, run, stage, trainer_for, write_records
from helpers.tiny import tiny_model

from sparsecut.building import load
from sparsecut.data.collator import Collator


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json and their pictures."""
    write_records(tmp_path)
    return tmp_path


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
    assert changed and all(name.startswith(prefixes) for name in changed)
    trained = {name for name in before if name.startswith(prefixes)}
    unread = {name for name in trained if name.startswith("vision_tower") and name not in changed}
    assert changed == trained - unread
    # What lies above the deepest tap is never run.
    assert all(".layers.5." in name or "post_layernorm" in name for name in unread)


def test_frozen_parts_stay_in_evaluation_mode(folder):
    """With dropout of one half in the frozen language model, two passes give one loss."""
    model, processor = tiny_model()
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = trainer_for(model, processor, folder)
    batch, losses = trainer.data_collator([trainer.train_dataset[i] for i in range(3)]), []
    for _ in range(2):
        model.train()
        losses.append(trainer.compute_loss(model, dict(batch)).item())
    assert losses[0] == losses[1] and model.fusion.training and not model.language_model.training


def test_constant_gates_stay_and_the_model_comes_back_ready(folder):
    model = run(folder)[0]
    assert torch.equal(model.fusion.gates, torch.ones_like(model.fusion.gates))
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_each_part_has_its_own_learning_rate_and_schedule(folder):
    changes = {
        "train": ["fusion", "language"],
        "lr": {"fusion": 1e-3, "head": 0.0},
        "args": {"weight_decay": 0.1, "learning_rate": 1e-4},
    }
    model, processor = tiny_model()
    trainer = trainer_for(model, processor, folder, **changes)
    groups = trainer.create_optimizer().param_groups
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    rates = {g["part"]: g["lr"] for g in groups}
    assert rates == {"fusion": 1e-3, "language": 1e-4, "head": 0.0}
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed and all(p.dim() > 1 for p in model.parameters() if id(p) in decayed)

    head = model.language_model.lm_head.weight.clone()
    run(folder, stage(folder, **changes))
    lines = log(folder)
    assert torch.equal(load(folder / "out" / "one")[0].language_model.lm_head.weight, head)
    assert [line["lr"]["fusion"] for line in lines] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert all(line["lr"]["language"] == pytest.approx(line["lr"]["fusion"] / 10) for line in lines)


def test_trained_gates_are_not_decayed(folder):
    model, processor = tiny_model({"method": "sparsecut", "gate": "zero"})
    trainer = trainer_for(model, processor, folder, args={"weight_decay": 0.1})
    groups = trainer.create_optimizer().param_groups
    assert [
        g["weight_decay"] for g in groups if any(p is model.fusion.gates for p in g["params"])
    ] == [0.0]


def test_the_same_recipe_twice_gives_the_same_losses_to_the_bit(folder):
    stages = [
        stage(folder, template="plain"),
        stage(folder, name="two", train=["fusion", "language"]),
    ]
    runs = []
    for _ in range(2):
        run(folder, *stages)
        runs.append([line["loss"] for name in ("one", "two") for line in log(folder, name)])
    assert runs[0] == runs[1] and len(runs[0]) == 6 and all(math.isfinite(loss) for loss in runs[0])


def test_two_arms_see_the_same_batches_in_the_same_order(folder, monkeypatch):
    seen = []
    collate = Collator.__call__

    def spy(self, items):
        seen[-1].append(
            [item["input_ids"][item["input_ids"] != self.image_token_id].tolist() for item in items]
        )
        return collate(self, items)

    monkeypatch.setattr(Collator, "__call__", spy)
    for plan in ("sparsecut", "llava"):
        seen.append([])
        Collator.image_token_id = tiny_model(plan)[1].image_token_id
        run(folder, stage(folder, args={"max_steps": 9}), plan=plan, output=str(folder / plan))
    assert seen[0] == seen[1] and len(seen[0]) >= 9
    assert seen[0][:3] != seen[0][6:9]  # the second epoch is shuffled anew


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
        model = run(folder, stage(folder, args=args), output=str(folder / str(size)))[0]
        weights.append(
            (
                torch.cat([p.flatten() for p in model.fusion.parameters()]),
                [x["loss"] for x in log(folder, output=str(size))],
            )
        )
    assert torch.allclose(weights[0][0], weights[1][0], atol=1e-6)
    assert weights[0][1] == pytest.approx(weights[1][1], abs=1e-5)


def test_older_code_averages_the_means_of_micro_batches(folder):
    """The switch for it does that; the usual loss is another one, as answers differ in length."""
    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1}
    losses = {}
    for over in ("tokens", "batches"):
        run(folder, stage(folder, args=args, loss_over=over), output=str(folder / over))
        losses[over] = log(folder, output=over)[0]["loss"]
    trainer = trainer_for(*tiny_model(), folder, args=args)
    batches = list(itertools.islice(trainer.get_train_dataloader(), 2))
    alone = [trainer.compute_loss(trainer.model, batch).item() for batch in batches]
    learned = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert losses["batches"] == pytest.approx(sum(alone) / 2, abs=1e-5)
    weighted = sum(loss * num for loss, num in zip(alone, learned, strict=True)) / sum(learned)
    assert losses["tokens"] == pytest.approx(weighted, abs=1e-5)
    assert abs(losses["tokens"] - losses["batches"]) > 1e-4


@pytest.mark.parametrize("parts", [["fusion"], ["vision"], ["fusion", "language"]])
def test_batches_without_pictures_train(folder, parts):
    run(folder, stage(folder, data="texts.json", train=parts))
    assert all(math.isfinite(line["loss"]) and line["image_tokens"] == 0 for line in log(folder))


def test_half_precision_computes_alike_and_keeps_single_precision_weights(folder):
    losses = []
    for half in (False, True):
        model = run(
            folder,
            stage(folder, train=["fusion", "language"], args={"bf16": half}),
            output=str(folder / str(half)),
        )[0]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        losses.append([line["loss"] for line in log(folder, output=str(half))])
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_checkpointing_works_through_frozen_layers(folder):
    losses, (model, processor) = [], tiny_model()
    for checkpointing in (False, True):
        args, output = {"activation_checkpointing": checkpointing}, f"checkpointing-{checkpointing}"
        run(folder, stage(folder, args=args), output=str(folder / output))
        losses.append([line["loss"] for line in log(folder, output=output)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)

    calls = []
    model.language_model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer = trainer_for(model, processor, folder)
    model.activation_checkpointing_enable()
    model.train()
    trainer.compute_loss(model, trainer.data_collator([trainer.train_dataset[0]])).backward()
    assert len(calls) == 2  # once forward, once recomputed
