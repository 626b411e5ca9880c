"""Every argument of transformers is obeyed or refused before a model is loaded."""

from dataclasses import fields

import pytest
from helpers.runs import recipe, run, stage, write_records
from helpers.tiny import tiny_model
from transformers import TrainingArguments

from sparsecut.profiling.dry_run import dry_run
from sparsecut.schema import UserError
from sparsecut.training.arguments import build_arguments
from sparsecut.training.run_dir import INPUTS

NAMES = [field.name for field in fields(TrainingArguments) if field.init]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
REFUSED = [
    ({"metric_for_best_model": "accuracy", **EVALUATED}, "accuracy.*loss"),
    ({"metric_for_best_model": "eval_los", **EVALUATED}, "did you mean 'loss'"),
    ({"metric_for_best_model": 3, **EVALUATED}, "metric_for_best_model is 3"),
    ({"load_best_model_at_end": True, "greater_is_better": True, **EVALUATED}, "greater_is"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end.*eval_strategy"),
    ({"save_strategy": "best", "metric_for_best_model": "loss"}, "best.*eval_strategy"),
    ({"save_strategy": "best", "eval_strategy": "steps"}, "metric_for_best_model"),
    ({"eval_on_start": True}, "eval_on_start.*eval_strategy"),
    ({"lr_scheduler_type": "greedy", **EVALUATED, "metric_for_best_model": "x"}, "metric_for"),
    ({"resume_from_checkpoint": "out/one/checkpoint-2"}, "--resume"),
    ({"resume_from_checkpoint": True}, "resume_from_checkpoint"),
    ({"optim_args": 1}, "optim_args is 1"),
    ({"optim_args": "zzz"}, "optim_args.*momentum=0.9"),
    ({"optim_args": "a=b=c"}, "optim_args"),
    ({"optim": "sgd", "optim_args": "momentum=fast"}, "momentum=fast"),
    ({"optim": "sgd", "optim_args": "momentum=-1"}, "momentum=-1"),
    ({"adam_beta1": 1.0}, "beta"),
    ({"adam_beta2": -0.1}, "adam_beta2"),
    ({"learning_rate": -1e-3}, "learning_rate"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
    ({"lr_scheduler_kwargs": {"num_cycle": 2}}, "num_cycle"),
    ({"lr_scheduler_kwargs": "some.json"}, "some.json"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers"),
    ({"dataloader_num_workers": 1.5}, "whole number"),
    ({"dataloader_num_workers": True}, "whole number"),
    ({"dataloader_multiprocessing_context": "thread"}, "spawn"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size"),
    ({"max_steps": 0}, "max_steps is 0"),
    ({"max_steps": "5"}, "without quotes"),
    ({"max_steps": "four"}, "max_steps: 100"),
    ({"learning_rate": "small"}, "learning_rate: 0.1"),
    ({"bf16": "false"}, "bf16 is 'false'.*without quotes"),
    ({"save_steps": -2, "save_strategy": "steps"}, "save_steps"),
    ({"log_level": "loud"}, "log_level is 'loud'.*debug"),
    ({"accelerator_config": 2147483648}, "accelerator_config"),
    ({"deepspeed": 3}, "deepspeed"),
    ({"fsdp_config": 0}, "fsdp_config"),
    ({"learning_rate": float("nan")}, "finite"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"))


def make(folder, **args) -> TrainingArguments:
    return build_arguments(recipe(folder, stage(folder, args=args)).stages[0], 0, folder / "out")


@pytest.mark.parametrize(("args", "named"), REFUSED, ids=str)
def test_arguments_that_cannot_be_obeyed_are_refused(folder, args, named):
    with pytest.raises(UserError, match=rf"(?s)stage( one|s\.0).*{named}"):
        make(folder, **args)


@pytest.mark.parametrize("value", ["5", None, [5]])
def test_they_are_refused_by_a_dry_run_and_for_a_stream_too(folder, value):
    given = stage(folder, args={"max_steps": value})
    with pytest.raises(UserError, match="max_steps is"):
        dry_run(recipe(folder, given))
    given["data"]["streaming"] = True
    with pytest.raises(UserError, match="max_steps is"):
        build_arguments(recipe(folder, given).stages[0], 0, folder / "out")


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_taken_or_refused_in_a_sentence(folder, name):
    """Also a number for a path, which Python would take for an open file."""
    for value in (None, True, -1, 2**31, 0.5, "", "zzz", [], ["zzz"], [3], {}, {"zzz": 1}, {3: {}}):
        try:
            make(folder, **{name: value})
        except UserError as error:
            assert name in str(error) or "args" in str(error)


@pytest.mark.parametrize(
    ("args", "held"),
    [
        ({"max_steps": 1e3}, 1000),
        ({"max_steps": -1}, -1),
        ({"num_train_epochs": 2}, 2),
        ({"save_steps": 0}, 0),
        ({"warmup_steps": 0.1}, 0.1),
        ({"report_to": ["none"]}, []),
        ({"optim_args": "momentum=0.9, nesterov=true", "optim": "sgd"}, None),
        (
            {
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "lr_scheduler_type": "cosine_with_min_lr",
            },
            0,
        ),
        ({"lr_scheduler_kwargs": '{"num_cycles": 2}', "lr_scheduler_type": "cosine"}, None),
        ({"metric_for_best_model": "eval_loss", **EVALUATED}, "eval_loss"),
        (
            {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps"},
            "best",
        ),
        ({"resume_from_checkpoint": None}, None),
    ],
    ids=str,
)
def test_what_can_be_obeyed_is(folder, args, held):
    name = next(iter(args))
    value = getattr(make(folder, **args), name)
    assert not held or value == held or value == []


@pytest.mark.parametrize("targets", ["(", "no_layer", "norm", ["q_proj2"], [], [3], ""])
def test_targets_that_match_nothing_are_told_before_anything_is_written(folder, tmp_path, targets):
    given = [stage(folder), stage(folder, name="two", train=["language:lora"])]
    given[1]["lora"] = {"targets": targets}
    with pytest.raises(UserError, match="targets"):
        run(folder, *given, output=str(tmp_path / "out"))
    assert not (tmp_path / "out" / INPUTS).exists()


def test_a_check_of_targets_changes_no_number(folder, tmp_path, monkeypatch):
    """A run with an adapter is the same as without that check."""
    given = stage(folder, train=["fusion", "language:lora"], lora={"targets": ".*q_proj", "r": 2})
    checked, _ = run(folder, given, output=str(tmp_path / "checked"))
    monkeypatch.setattr("sparsecut.training.preparing.check_targets", lambda *args: None)
    plain, _ = run(folder, given, output=str(tmp_path / "plain"))
    assert list(checked.state_dict()) == list(tiny_model()[0].state_dict())
    for name, value in plain.state_dict().items():
        assert (value == checked.state_dict()[name]).all(), name
