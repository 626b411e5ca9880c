"""Statistics of shortcuts: norms of autograd, ratios of what is added, and dead ones."""

import logging
import math

import pytest
import torch
from helpers.runs import log, read_losses, recipe, run, stage, trainer_for
from helpers.tiny import tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparsecut import train
from sparsecut.training.shortcut_stats import BLIND_PATIENCE, PATIENCE, ShortcutMonitor

SPARSE = {"method": "sparsecut", "pattern": "sparse"}
LONG_ENOUGH = {"max_steps": PATIENCE + 2}


def make_trainer(folder):
    """(a trainer that has not started, a batch with images)."""
    trainer = trainer_for(*tiny_model(), folder)
    return trainer, trainer.data_collator([trainer.train_dataset[i] for i in range(3)])


def test_statistics_are_those_of_the_step(folder):
    trainer, batch = make_trainer(folder)
    model = trainer.model
    model.zero_grad()
    with trainer.monitor.observe(True):
        trainer.compute_loss(model, dict(batch)).backward()
    trainer.monitor.record_gradients(True)
    statistics = trainer.monitor.get_statistics()
    for figures, projector in zip(statistics, model.fusion.paths, strict=True):
        squares = sum(p.grad.square().sum().item() for p in projector.parameters())
        assert figures["grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)
        assert squares > 0
    ratios = {figures["layer"]: figures.get("ratio") for figures in statistics}
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
        features = model.get_image_features(batch["pixel_values"])
    mask = batch["input_ids"] == model.config.image_token_id
    for layer, added in zip(model.plan.layers, features.deepstack_features, strict=True):
        before = hidden[layer][mask]  # features are added on the way into the layer
        ratio = torch.cat(added).norm(dim=-1).mean() / before.norm(dim=-1).mean()
        assert ratios[layer] == pytest.approx(ratio.item(), rel=1e-4)


def test_statistics_reach_the_log_and_tensorboard(folder):
    args = {"report_to": "tensorboard", "logging_steps": 2, "max_steps": 4}
    model = run(folder, stage(folder, args=args))[0]
    numbers = list(range(len(model.plan.shortcuts)))
    for line in log(folder):
        assert [statistics["number"] for statistics in line["shortcuts"]] == numbers
        assert line["grad_norm"] > 0
        assert line["memory_gib"] > 0
    path = next(iter((folder / "out" / "one").rglob("events.out.tfevents*")))
    tags = set(EventAccumulator(str(path.parent)).Reload().Tags()["scalars"])
    for number, shortcut in enumerate(model.plan.shortcuts):
        assert f"train/shortcuts/{number}_into_layer_{shortcut.layer}/grad_norm" in tags
    speeds = {"train/tokens_per_second", "train/image_tokens_per_second"}
    assert {*speeds, "train/memory_gib"} <= tags


def find_dead(caplog) -> list[str]:
    """The warnings about dead shortcuts."""
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "dead" in message]


def test_a_shortcut_without_gradient_is_called_dead_once(folder, caplog):
    trainer, batch = make_trainer(folder)
    model = trainer.model
    for parameter in model.fusion.paths[1].parameters():
        # GELU of zero times zero: nothing flows back through either map but into the last bias.
        parameter.data.zero_()
    model.fusion.gates.data.zero_()
    with caplog.at_level(logging.WARNING):
        for _ in range(PATIENCE + 2):
            model.zero_grad()
            trainer.compute_loss(model, dict(batch)).backward()
            trainer.monitor.record_gradients(True)
    warnings = find_dead(caplog)
    assert len(warnings) == len(model.fusion.gated)
    assert "stage one" in warnings[0]
    assert "shortcut 1 " in warnings[0]


def watch_steps(trainer, batch, share: float, number: int = BLIND_PATIENCE + 2) -> None:
    """Log steps on which the largest gradient of a shortcut is so much of the whole."""
    model = trainer.model
    for _ in range(number):
        model.zero_grad()
        with trainer.monitor.observe(True):
            trainer.compute_loss(model, dict(batch)).backward()
        trainer.monitor.record_gradients(True)
        norms = [figures["grad_norm"] for figures in trainer.monitor.get_statistics()]
        trainer.monitor.watch(max(norms) / share)


def enlarge(fusion, factor: float) -> None:
    """Make what every shortcut adds so much larger."""
    for path in fusion.paths:
        for parameter in path.linear_2.parameters():
            parameter.data.mul_(factor)


def find_blind(caplog) -> list[str]:
    """The warnings about a model that ignores its shortcuts."""
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "lr.fusion" in message]


def test_shortcuts_that_drown_the_model_and_learn_nothing_are_named_once(folder, caplog):
    trainer, batch = make_trainer(folder)
    trainer.monitor.rate = 3e-3
    enlarge(trainer.model.fusion, 100)
    with caplog.at_level(logging.WARNING):
        watch_steps(trainer, batch, share=0.005)
    [warning] = find_blind(caplog)
    figures = [one for one in trainer.monitor.get_statistics() if "ratio" in one]
    largest = max(figures, key=lambda one: one["ratio"])
    assert largest["ratio"] > 0.5
    for fact in (
        "blind",
        "stage one",
        f"shortcut {largest['number']} ",
        "0.003",
        "lr.fusion: 0.0003",
    ):
        assert fact in warning


@pytest.mark.parametrize(
    ("factor", "share", "number"),
    [(1e-3, 0.005, BLIND_PATIENCE + 2), (100, 0.3, BLIND_PATIENCE + 2), (100, 0.005, 4)],
)
def test_shortcuts_that_are_small_or_learn_are_no_cause_to_warn(
    folder, caplog, factor, share, number
):
    trainer, batch = make_trainer(folder)
    enlarge(trainer.model.fusion, factor)
    with caplog.at_level(logging.WARNING):
        watch_steps(trainer, batch, share, number)
        trainer.monitor.watch(None)
        watch_steps(trainer, batch, share, min(number, 4))
    assert not find_blind(caplog)


def test_the_trainer_hands_the_rate_and_the_norm_of_a_logged_step_to_the_watch(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(ShortcutMonitor, "watch", lambda self, norm: seen.append((self.rate, norm)))
    lr = {"fusion": 2e-3}
    run(folder, stage(folder, train=["fusion", "language"], lr=lr, args={"max_steps": 3}))
    assert seen == [(2e-3, line["grad_norm"]) for line in log(folder)]


@pytest.mark.parametrize("gate", ["zero", "zero_projector"])
def test_shortcuts_that_start_at_zero_are_not_called_dead(folder, gate, caplog):
    with caplog.at_level(logging.WARNING):
        run(folder, stage(folder, args=LONG_ENOUGH), plan={**SPARSE, "gate": gate})
    assert not find_dead(caplog)
    for statistics in log(folder)[0]["shortcuts"]:
        assert statistics["grad_norm"] > 0
        assert statistics["layer"] == 0 or statistics["ratio"] == 0


def test_texts_alone_have_no_ratio_and_are_no_sign_of_death(folder, caplog):
    with caplog.at_level(logging.WARNING):
        run(folder, stage(folder, data="texts.json", args=LONG_ENOUGH))
    assert not find_dead(caplog)
    for line in log(folder):
        assert all("ratio" not in statistics for statistics in line["shortcuts"])


def test_evaluating_on_the_way_changes_no_loss(folder):
    """Dropout would show random numbers that the evaluation has taken."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    for output, args in {"plain": {}, "evaluated": evaluated}.items():
        model, processor = tiny_model()
        for layer in model.language_model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        given = recipe(
            folder,
            stage(folder, train=["fusion", "language"], args=args),
            output=str(folder / output),
            evaluate={"data": {"path": str(folder / "data.json"), "keep": 4}},
        )
        train(given, model=model, processor=processor, shown=False)
    losses = read_losses(folder, output="plain")
    assert len(losses) == 3
    assert read_losses(folder, output="evaluated") == losses
    lines = log(folder, output="evaluated")
    eval_losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(eval_losses) == 3
    assert all(math.isfinite(loss) for loss in eval_losses)
