"""Two processes train as one: the same losses and weights, whichever engine shares the work."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.engines import CASES, run_case, run_upgrade
from helpers.example_bases import build_example_base
from helpers.runs import log, trainer_for, write_records
from helpers.tiny import tiny_model
from safetensors.torch import load_file

from sparsecut import load

HERE = Path(__file__).parents[1]
ZERO = (
    ["zero2", "zero3"] if importlib.util.find_spec("deepspeed") else []
)  # it compiles a part of itself: run apart
ENGINES = ["ddp", "fsdp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which every case has run in one process (one/), in two with DDP (ddp/) and in two
    with FSDP2 (fsdp/).
    """
    folder = tmp_path_factory.mktemp("engines")
    write_records(folder)
    base, processor = build_example_base("llava")
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
    }
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    started = {
        engine: subprocess.Popen(
            [*launch, str(HERE / "helpers" / "engines.py"), str(folder), engine],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for engine in ENGINES + ZERO
    }
    try:
        for name in CASES:
            run_case(folder, name, folder / "one", 1)
        run_upgrade(folder, folder / "one", 1)
        for engine, process in started.items():
            said, _ = process.communicate(timeout=240)
            assert process.returncode == 0, f"{engine}: {said[-3000:]}"
    finally:
        for process in started.values():
            process.kill()
    return folder


@pytest.mark.parametrize("name", [*CASES, "upgrade"])
@pytest.mark.parametrize("engine", ENGINES + ZERO)
def test_two_processes_give_the_losses_and_weights_of_one(folder, engine, name):
    if (engine, name) == ("zero3", "upgrade"):
        pytest.skip("a model that is made in pieces starts from other random numbers")
    for one_stage in ("one", "two"):
        alone, together = (log(folder / way, one_stage, name) for way in ("one", engine))
        assert len(alone) == len(together) >= 2
        assert [x["loss"] for x in together] == pytest.approx([x["loss"] for x in alone], abs=2e-5)
        one, two = (weights(folder / way / name / one_stage) for way in ("one", engine))
        assert one.keys() == two.keys()
        for key, values in one.items():
            assert (values - two[key]).abs().max() < 2e-5, key


def weights(stage: Path) -> dict:
    """What a stage has left, under the names it has in memory (DeepSpeed writes others)."""
    alone = stage / "fusion.safetensors"
    return load_file(alone) if alone.is_file() else load(stage)[0].state_dict()


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_go_on_from_a_checkpoint_to_the_bit(folder, engine):
    whole, resumed = (
        [x["loss"] for x in log(folder / engine, "one", name)] for name in ("whole", "resumed")
    )
    assert whole == resumed and len(whole) == 6
    files = [
        (folder / engine / name / "final" / "model.safetensors").read_bytes()
        for name in ("whole", "resumed")
    ]
    assert files[0] == files[1]


def test_shortcuts_alone_are_saved_by_every_engine(folder):
    for way in ("one", *ENGINES, *ZERO[:1]):
        assert not (folder / way / "upgrade" / "one" / "model.safetensors").exists()


def test_sharding_that_would_not_shard_or_train_wrongly_is_refused(folder, monkeypatch):
    trainer = trainer_for(*tiny_model(), folder, args={"use_cpu": True})
    trainer.args.fsdp = True
    with pytest.raises(ValueError, match="the processes compute on CPUs"):
        trainer._check_engine()
    trainer.args.fsdp, trainer.is_deepspeed_enabled = None, True
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match=r"set zero_optimization\.stage3_gather"):
        trainer._check_engine()
    trainer.is_deepspeed_enabled = False
    plugin = SimpleNamespace(activation_checkpointing=True)
    monkeypatch.setattr(
        trainer, "accelerator", SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    )
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"set args\.activation_checkpointing"):
        trainer._check_engine()
