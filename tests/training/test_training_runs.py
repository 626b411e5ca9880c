"""A run's folder: what is written, resumed, refused and skipped, and what stops a run."""

import json

import pytest
import torch
from helpers.runs import interrupt, log, read_losses, recipe, run, stage, trainer_for
from helpers.tiny import tiny_model

from sparsecut.building import load
from sparsecut.config.recipe import load_recipe
from sparsecut.data.dataset import TrainingData
from sparsecut.training.freezing import freeze
from sparsecut.training.preparing import prepare_run
from sparsecut.training.reading import read_inputs
from sparsecut.training.stages import run_stages, train


def test_what_is_written_repeats_the_run(folder):
    given = recipe(folder, stage(folder), stage(folder, name="two"), seed=4)
    model, processor = tiny_model()
    train(given, model=model, processor=processor, shown=False)
    out = folder / "out"
    assert load_recipe(out / "config.yaml") == given
    assert load_recipe(out / "final" / "config.yaml") == given
    assert json.loads((out / "one" / "plan.json").read_text()) == model.plan.to_dict()
    versions = json.loads((out / "final" / "versions.json").read_text())
    assert versions["seed"] == 4
    assert versions["torch"]
    assert versions["python"]
    loaded = load(out / "final")[0].state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded[name])
    tokens = [line["tokens"] for line in log(folder)]
    assert tokens == sorted(tokens)
    assert log(folder)[-1]["step"] == 3


def test_a_run_is_read_prepared_and_run(folder):
    inputs = read_inputs(recipe(folder, stage(folder), stage(folder, name="two")))
    assert [len(sources[0].examples) for sources in inputs.sources] == [12, 12]
    prepared = prepare_run(inputs, *tiny_model(), shown=False)
    assert [len(one.examples) for one in prepared.stages] == [12, 12]
    assert not (folder / "out").exists()
    result = run_stages(prepared, shown=False)
    assert [(one.name, one.num_steps) for one in result.stages] == [("one", 3), ("two", 3)]
    assert result.model is prepared.model
    assert result.folder == folder / "out"
    assert (result.folder / "final" / "model.safetensors").is_file()


def test_another_recipe_does_not_overwrite_a_run(folder):
    run(folder)
    with pytest.raises(ValueError, match=r"out .*seed"):
        run(folder, seed=1)
    # What is evaluated afterwards changes no weight.
    run(folder, evaluate={"data": {"path": str(folder / "texts.json")}}, resume=True)


def test_resuming_gives_the_weights_of_an_uninterrupted_run(folder):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    stages = [stage(folder), stage(folder, name="two", train=["fusion", "language"], args=args)]
    whole = run(folder, *stages, output=str(folder / "whole"))[0].state_dict()
    with interrupt("two", step=5):
        run(folder, *stages)
    resumed = run(folder, *stages, resume=True)[0].state_dict()
    assert [line["step"] for line in log(folder, "two")] == [1, 2, 3, 4, 5, 6]
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_resuming_after_the_last_checkpoint_takes_no_step_more(folder):
    """Also where the last step does not end an epoch."""
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(folder, stage(folder, args=args))[0].state_dict()
    losses = read_losses(folder)
    (folder / "out" / "one" / "versions.json").unlink()
    resumed = run(folder, stage(folder, args=args), resume=True)[0].state_dict()
    assert read_losses(folder) == losses
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def check(folder) -> None:
    """Check a recipe, and train nothing."""
    model, processor = tiny_model()
    train(recipe(folder), model=model, processor=processor, check=True, shown=False)


def test_check_reads_everything_and_writes_nothing(folder):
    check(folder)
    assert not (folder / "out").exists()
    (folder / "5.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"data.json record \d+: .*5\.png"):
        check(folder)


def test_bad_records_are_skipped_and_listed_where_the_recipe_says_so(folder):
    (folder / "5.png").write_bytes(b"broken")
    (folder / "6.png").unlink()
    source = {"path": str(folder / "data.json"), "on_error": "skip"}
    run(folder, {**stage(folder, args={"max_steps": 6}), "data": source})
    (before,) = (folder / "out" / "skipped.txt").read_text().splitlines()
    (while_training,) = (folder / "out" / "one" / "skipped.txt").read_text().splitlines()
    assert "6.png" in before
    assert "5.png" in while_training


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"learning_rte": 1}, r"args\.learning_rte .*'learning_rate'"),
        ({"output_dir": "x"}, r"args\.output_dir .*`output`"),
        ({"seed": 3}, r"args\.seed .*`seed`"),
        ({"learning_rate": "fast"}, r"args\.learning_rate .*'fast'"),
        ({"remove_unused_columns": True}, r"args\.remove_unused_columns"),
        ({"eval_strategy": "steps", "eval_steps": 1}, r"args\.eval_strategy .*`evaluate`"),
        ({"label_smoothing_factor": 0.1}, r"args\.label_smoothing_factor"),
        ({"save_strategy": "sometimes"}, "TrainingArguments .*sometimes"),
        ({"learning_rate": 1e30, "max_grad_norm": 0}, "stage one: step [23] "),
    ],
)
def test_arguments_that_cannot_be_trained_with_are_named(folder, args, named):
    with pytest.raises(ValueError, match=named):
        run(folder, stage(folder, args=args))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss_over": "token"}, r"loss_over .*'token'.*'tokens'"),
        ({"max_length": 5}, r"record 0: .*max_length"),
        ({"data": {"path": "nowhere.json"}}, r"nowhere\.json"),
    ],
)
def test_stages_that_cannot_be_trained_are_named(folder, changes, named):
    with pytest.raises(ValueError, match=named):
        run(folder, {**stage(folder), **changes})


def test_a_part_without_parameters_is_an_error(monkeypatch):
    model, _ = tiny_model()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(ValueError, match=r"head.*'head': 0"):
        freeze(model, ("head",))


def test_a_step_without_labels_is_an_error(folder, monkeypatch):
    trainer = trainer_for(*tiny_model(), folder)
    with pytest.raises(ValueError, match="step 1 "):
        trainer.training_step(trainer.model, {}, torch.tensor(0))
    item = {"input_ids": torch.ones(3).int(), "labels": torch.full((3,), -100)}
    monkeypatch.setattr(TrainingData, "_encode", lambda self, index: item)
    with pytest.raises(ValueError, match=r"stage one: .*label"):
        run(folder)


def test_a_model_with_another_plan_is_an_error(folder):
    model, processor = tiny_model()
    with pytest.raises(ValueError, match="fusion"):
        train(recipe(folder, fusion="llava"), model=model, processor=processor, shown=False)
