"""A run's folder: what is written, resumed, refused, skipped; what cannot be trained on stops with
a sentence.
"""

import json

import pytest
import torch
from helpers.runs import log, recipe, run, stage, trainer_for, write_records
from helpers.tiny import tiny_model

from sparsecut.building import load
from sparsecut.config.recipe import load_recipe
from sparsecut.data.dataset import TrainingData
from sparsecut.training.freezing import freeze
from sparsecut.training.stages import train
from sparsecut.training.trainer import StageTrainer


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json and their pictures."""
    write_records(tmp_path)
    return tmp_path


def test_what_is_written_repeats_the_run(folder):
    given = recipe(folder, stage(folder), stage(folder, name="two"), seed=4)
    model, processor = tiny_model()
    train(given, model=model, processor=processor, shown=False)
    out = folder / "out"
    assert load_recipe(out / "config.yaml") == load_recipe(out / "final" / "config.yaml") == given
    assert json.loads((out / "one" / "plan.json").read_text()) == model.plan.to_dict()
    versions = json.loads((out / "final" / "versions.json").read_text())
    assert versions["seed"] == 4 and versions["torch"] and versions["python"]
    loaded = load(out / "final")[0]
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    tokens = [line["tokens"] for line in log(folder)]
    assert tokens == sorted(tokens) and log(folder)[-1]["step"] == 3


def test_another_recipe_does_not_overwrite_a_run(folder):
    run(folder)
    with pytest.raises(
        ValueError,
        match=r"out .*seed",
    ):
        run(folder, seed=1)
    run(
        folder, evaluate={"data": {"path": str(folder / "texts.json")}}
    )  # what is asked afterwards changes no weight


class Interrupted(Exception):
    """Stands for a power cut."""


def test_resuming_gives_the_weights_of_an_uninterrupted_run(folder, monkeypatch):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    stages = [stage(folder), stage(folder, name="two", train=["fusion", "language"], args=args)]
    whole = run(folder, *stages, output=str(folder / "whole"))[0]

    step = StageTrainer.training_step

    def fails(self, *arguments, **named):
        if self.stage.name == "two" and self.state.global_step == 5:
            raise Interrupted
        return step(self, *arguments, **named)

    monkeypatch.setattr(StageTrainer, "training_step", fails)
    with pytest.raises(Interrupted):
        run(folder, *stages)
    monkeypatch.setattr(StageTrainer, "training_step", step)
    resumed = run(folder, *stages, resume=True)[0]
    assert [line["step"] for line in log(folder, "two")] == [1, 2, 3, 4, 5, 6]
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_check_reads_everything_and_writes_nothing(folder):
    model, processor = tiny_model()
    train(recipe(folder), model=model, processor=processor, check=True, shown=False)
    assert not (folder / "out").exists()
    (folder / "5.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"data.json record \d+: .*5.png"):
        train(recipe(folder), model=model, processor=processor, check=True, shown=False)


def test_bad_records_are_skipped_and_listed_where_the_recipe_says_so(folder):
    (folder / "5.png").write_bytes(b"broken")
    (folder / "6.png").unlink()
    source = {"path": str(folder / "data.json"), "on_error": "skip"}
    run(folder, stage(folder, args={"max_steps": 6}) | {"data": source})
    (before,) = (folder / "out" / "skipped.txt").read_text().splitlines()
    (while_training,) = (folder / "out" / "one" / "skipped.txt").read_text().splitlines()
    assert "6.png" in before and "5.png" in while_training


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"args": {"learning_rte": 1}},
            "args.learning_rte .*'learning_rate'",
        ),
        ({"args": {"output_dir": "x"}}, "args.output_dir .*`output`"),
        ({"args": {"seed": 3}}, "args.seed .*`seed`"),
        (
            {"args": {"learning_rate": "fast"}},
            "args.learning_rate .*'fast'",
        ),
        ({"args": {"remove_unused_columns": True}}, "args.remove_unused_columns"),
        ({"args": {"eval_strategy": "steps", "eval_steps": 1}}, "args.eval_strategy .*`evaluate`"),
        ({"args": {"label_smoothing_factor": 0.1}}, "args.label_smoothing_factor"),
        (
            {"loss_over": "token"},
            "loss_over is 'token' .did you mean 'tokens'",
        ),
        ({"args": {"save_strategy": "sometimes"}}, "TrainingArguments refuses args: .*sometimes"),
        ({"max_length": 5}, "record 0: the record has .* would cut off image tokens"),
        ({"data": {"path": "nowhere.json"}}, "nowhere.json is not a file of records"),
        (
            {"args": {"learning_rate": 1e30, "max_grad_norm": 0}},
            "step [23] has the loss .*, so training cannot go on",
        ),
    ],
)
def test_what_cannot_be_trained_stops_with_a_sentence(folder, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(folder, stage(folder) | changes if "data" in changes else stage(folder, **changes))


def test_a_step_or_part_without_anything_to_learn_is_an_error(folder, monkeypatch):
    model, processor = tiny_model()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(ValueError, match="training head"):
        freeze(model, ("head",))
    trainer = trainer_for(tiny_model()[0], processor, folder)
    with pytest.raises(ValueError, match="step 1"):
        trainer.training_step(trainer.model, {}, torch.tensor(0))
    with pytest.raises(ValueError, match="fusion"):
        train(recipe(folder, fusion="llava"), model=model, processor=processor, shown=False)
    monkeypatch.setattr(
        TrainingData,
        "_encode",
        lambda self, i: {"input_ids": torch.ones(3).int(), "labels": torch.full((3,), -100)},
    )
    with pytest.raises(ValueError, match=r"stage one: .*label"):
        run(folder)


def test_tensorboard_is_written_on_request(folder):
    run(folder, stage(folder, args={"report_to": "tensorboard"}))
    assert list((folder / "out" / "one").rglob("events.out.tfevents*"))
