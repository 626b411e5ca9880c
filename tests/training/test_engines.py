"""Two processes train as one: the same losses and weights, whichever engine shards the work.

All cases with every engine run in tests/conformance/test_engine_cases.py, by torchrun.
"""

from types import SimpleNamespace

import pytest
from helpers.any_size import LIMITS, make_naflex
from helpers.engines import check_equal, check_resumed, run_engines
from helpers.runs import trainer_for, write_records
from helpers.tiny import tiny_model

RUNS = {
    "ddp": [
        "parts",
        "recomputed",
        "texts",
        "few images",
        "streamed",
        "packed",
        "any size",
        "upgrade",
        "projector",
        "interrupted",
    ],
    "fsdp": ["parts", "any size", "upgrade", "interrupted"],
}
EQUAL = [(engine, name) for engine in RUNS for name in RUNS[engine] if name != "interrupted"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which every run is done in one process, and in two by its engine."""
    folder = tmp_path_factory.mktemp("engines")
    run_engines(folder, RUNS)
    return folder


@pytest.mark.parametrize(("engine", "name"), EQUAL)
def test_two_processes_give_the_losses_and_weights_of_one(folder, engine, name):
    check_equal(folder, engine, name)


@pytest.mark.parametrize("engine", RUNS)
def test_two_processes_continue_a_checkpoint_to_the_bit(folder, engine):
    check_resumed(folder, engine)


@pytest.mark.parametrize("engine", ["one", *RUNS])
def test_shortcuts_alone_are_saved_by_every_engine(folder, engine):
    assert not (folder / engine / "upgrade" / "one" / "model.safetensors").exists()


@pytest.fixture
def trainer(tmp_path):
    """A trainer that has not started."""
    write_records(tmp_path)
    return trainer_for(*tiny_model(), tmp_path, args={"use_cpu": True})


def test_fsdp_on_cpus_is_refused(trainer):
    trainer.args.fsdp = True
    with pytest.raises(ValueError, match="CPUs"):
        trainer._check_engine()


def test_deepspeed_that_could_not_save_is_refused(trainer, monkeypatch):
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save"):
        trainer._check_engine()


def test_checkpointing_by_fsdp_is_refused(trainer, monkeypatch):
    trainer.is_fsdp_enabled = True
    plugin = SimpleNamespace(activation_checkpointing=True)
    state = SimpleNamespace(fsdp_plugin=plugin)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=state))
    with pytest.raises(ValueError, match=r"args\.activation_checkpointing"):
        trainer._check_engine()


@pytest.mark.parametrize("stage", [None, 2, 3], ids=["fsdp", "zero2", "zero3"])
@pytest.mark.parametrize("reads", ["whole", "views", "features"])
def test_sharded_encoders_that_run_once_for_every_size_are_refused(
    tmp_path, monkeypatch, stage, reads
):
    """Processes would wait for each other for ever."""
    write_records(tmp_path)
    vision = None if reads == "views" else make_naflex()
    model, processor = tiny_model(vision=vision, **LIMITS)
    trainer = trainer_for(model, processor, tmp_path, args={"use_cpu": True})
    trainer._check_passes()
    if stage is None:
        trainer.is_fsdp_enabled = True
    else:
        trainer.is_deepspeed_enabled = True
        plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
        monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(deepspeed_plugin=plugin))
    if reads == "features":
        trainer.train_dataset.feature_cache = object()
    if reads == "whole" and stage != 2:
        with pytest.raises(ValueError, match="native"):
            trainer._check_passes()
    else:
        trainer._check_passes()
