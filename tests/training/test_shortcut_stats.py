"""What training says of its shortcuts: norms that are those of autograd, ratios of what is added,
and which of them is dead.
"""

import logging
import math

import pytest
import torch
from helpers.runs import log, recipe, run, stage, trainer_for, write_records
from helpers.tiny import tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsecut import train
from sparsecut.training.shortcut_stats import PATIENCE

ZERO = {"method": "sparsecut", "pattern": "sparse", "gate": "zero"}


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json and their pictures."""
    write_records(tmp_path)
    return tmp_path


def test_figures_are_those_of_the_step(folder):
    model, processor = tiny_model()
    trainer = trainer_for(model, processor, folder)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    model.zero_grad()
    with trainer.monitor.observe(True):
        trainer.compute_loss(model, dict(batch)).backward()
    trainer.monitor.record_gradients(True)
    for figures, path in zip(trainer.monitor.get_statistics(), model.fusion.paths, strict=True):
        expected = math.sqrt(sum(p.grad.square().sum().item() for p in path.parameters()))
        assert figures["grad_norm"] == pytest.approx(expected, rel=1e-5) and expected > 0
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
        features = model.get_image_features(batch["pixel_values"])
    mask = batch["input_ids"] == model.config.image_token_id
    for layer, added in zip(model.plan.layers, features.deepstack_features, strict=True):
        met = hidden[layer][
            mask
        ]  # before the addition, which takes place on the way into the layer
        ratio = torch.cat(added).norm(dim=-1).mean() / met.norm(dim=-1).mean()
        found = next(f["ratio"] for f in trainer.monitor.get_statistics() if f["layer"] == layer)
        assert found == pytest.approx(ratio.item(), rel=1e-4)


def test_figures_reach_the_log_and_tensorboard(folder):
    model = run(
        folder, stage(folder, args={"report_to": "tensorboard", "logging_steps": 2, "max_steps": 4})
    )[0]
    lines = log(folder)
    numbers = range(len(model.plan.shortcuts))
    assert all([s["number"] for s in line["shortcuts"]] == list(numbers) for line in lines)
    assert all(line["grad_norm"] > 0 and line["memory_gib"] > 0 for line in lines)
    path = next(iter((folder / "out" / "one").rglob("events.out.tfevents*")))
    tags = EventAccumulator(str(path.parent)).Reload().Tags()["scalars"]
    wanted = {
        f"train/shortcuts/{i}_into_layer_{model.plan.shortcuts[i].layer}/grad_norm" for i in numbers
    }
    assert wanted | {
        "train/tokens_per_second",
        "train/image_tokens_per_second",
        "train/memory_gib",
    } <= set(tags)


def test_a_shortcut_without_gradient_is_called_dead_once(folder, caplog):
    model, processor = tiny_model()
    trainer = trainer_for(model, processor, folder)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    for parameter in model.fusion.paths[1].parameters():
        # GELU of zero times zero: nothing flows back through either map but into the last bias
        parameter.data.zero_()
    model.fusion.gates.data.zero_()
    with caplog.at_level(logging.WARNING):
        for _ in range(PATIENCE + 2):
            model.zero_grad()
            trainer.compute_loss(model, dict(batch)).backward()
            trainer.monitor.record_gradients(True)
    warned = [record.getMessage() for record in caplog.records if "dead" in record.getMessage()]
    assert len(warned) == len(model.fusion.gated)
    assert "shortcut 1 " in warned[0] and "stage one" in warned[0]


@pytest.mark.parametrize(
    "plan", [ZERO, {"method": "sparsecut", "pattern": "sparse", "gate": "zero_projector"}]
)
def test_shortcuts_that_start_at_zero_are_not_called_dead(folder, plan, caplog):
    args = {"max_steps": PATIENCE + 2}
    with caplog.at_level(logging.WARNING):
        run(folder, stage(folder, args=args), plan=plan)
    assert not [record for record in caplog.records if "dead" in record.getMessage()]
    first = log(folder)[0]["shortcuts"]
    assert all(s["grad_norm"] > 0 for s in first) and all(
        s["ratio"] == 0 for s in first if s["layer"]
    )


def test_texts_alone_have_no_ratio_and_are_no_sign_of_death(folder, caplog):
    with caplog.at_level(logging.WARNING):
        run(folder, stage(folder, data="texts.json", args={"max_steps": PATIENCE + 2}))
    assert not [record for record in caplog.records if "dead" in record.getMessage()]
    assert all("ratio" not in s for line in log(folder) for s in line["shortcuts"])


def test_looking_at_held_out_data_changes_no_loss(folder):
    """Dropout would show random numbers that were taken by the look."""
    losses = []
    for name, args in {"plain": {}, "looked": {"eval_strategy": "steps", "eval_steps": 1}}.items():
        model, processor = tiny_model()
        for layer in model.language_model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        given = recipe(
            folder,
            stage(folder, train=["fusion", "language"], args=args),
            output=str(folder / name),
            evaluate={"data": {"path": str(folder / "data.json"), "keep": 4}},
        )
        train(given, model=model, processor=processor, shown=False)
        losses.append([line["loss"] for line in log(folder, output=name) if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    looked = [line["eval_loss"] for line in log(folder, output="looked") if "eval_loss" in line]
    assert len(looked) == 3 and all(math.isfinite(loss) for loss in looked)
