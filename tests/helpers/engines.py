"""Runs that a group of processes must do as one process does: a table, and the program that
`torchrun` starts.

torchrun --nproc-per-node 2 tests/engines.py FOLDER ddp|fsdp
"""

import contextlib
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from helpers.runs import recipe, run, stage
from helpers.tiny import SPARSE
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sparsecut import train
from sparsecut.training.trainer import StageTrainer

BOTH = ["fusion", "language"]
ALL = ["vision", "fusion", "language"]
CONTEXT = {**SPARSE, "gate": "context"}
# name -> plan, and changes of the stage; four records a step, text-only records among them.
CASES = {
    "parts": (SPARSE, {"train": ALL}),
    "accumulated, recomputed": (
        SPARSE,
        {
            "train": BOTH,
            "args": {"gradient_accumulation_steps": 2, "activation_checkpointing": True},
        },
    ),
    "context": (CONTEXT, {"train": ["fusion"]}),
    "texts": (SPARSE, {"train": BOTH, "data": "texts.json"}),
    "streamed": (SPARSE, {"train": BOTH, "streaming": True}),
    "packed": (SPARSE, {"train": BOTH, "pack": 30, "group": True}),
}
ZERO = {
    "zero_optimization": {
        "stage3_gather_16bit_weights_on_model_save": True,
        "stage3_param_persistence_threshold": 0,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def stage_of(folder: Path, name: str, processes: int, **args):
    """The case's stage for so many processes; the batch of a step is the same for all."""
    changes = dict(CASES[name][1])
    args = {
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "use_cpu": True,
        **changes.pop("args", {}),
        **args,
    }
    args["per_device_train_batch_size"] = (
        4 // args.get("gradient_accumulation_steps", 1) // processes
    )
    streaming = changes.pop("streaming", False)
    found = stage(folder, **changes, args=args)
    return {**found, "data": {**found["data"], "streaming": streaming}}


def run_case(folder: Path, name: str, output: Path, processes: int, **args) -> None:
    """Two stages: the case's own, and one more of the language model, which goes on from what the
    first has left.
    """
    first = stage_of(folder, name, processes, **args)
    second = {
        **first,
        "name": "two",
        "train": ["language"],
        "args": {**first["args"], "max_steps": 2},
    }
    run(folder, first, second, plan=CASES[name][0], output=str(output / name))


class Interrupted(Exception):
    """Stands for a power cut."""


def run_interrupted(folder: Path, output: Path, **args) -> None:
    """The same six steps twice, with Adam: at a stretch, and cut off in step 4 and resumed."""
    more = {
        "max_steps": 6,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        **args,
    }
    one = stage_of(folder, "parts", 2, **more)
    run(folder, one, output=str(output / "whole"))
    step = StageTrainer.training_step

    def fails(self, *arguments, **named):
        if self.state.global_step == 3:
            raise Interrupted
        return step(self, *arguments, **named)

    StageTrainer.training_step = fails
    with contextlib.suppress(Interrupted):
        run(folder, one, output=str(output / "resumed"))
    StageTrainer.training_step = step
    run(folder, one, output=str(output / "resumed"), resume=True)


def run_upgrade(folder: Path, output: Path, processes: int, **args) -> None:
    """Shortcuts on the base that lies in folder/base, trained alone and then with its language
    model.
    """
    first = stage_of(folder, "parts", processes, **args) | {"train": ["fusion"]}
    second = {**first, "name": "two", "train": BOTH}
    changes = {
        "model": {"base": str(folder / "base")},
        "fusion": {"method": "sparsecut", "count": 2, "rank": 8},
    }
    train(recipe(folder, first, second, **changes, output=str(output / "upgrade")), shown=False)


def engine_arguments(engine: str) -> dict:
    """Arguments of a stage that ask for this engine; engines for accelerators are made to take CPUs
    for such.
    """
    if engine == "ddp":
        return {}
    if engine == "fsdp":
        place = PartialState.set_device

        def set_device(self):
            place(self)
            self.distributed_type = (
                DistributedType.MULTI_GPU
            )  # else accelerate would silently use DDP

        PartialState.set_device = set_device
        return {"fsdp": True, "fsdp_config": {"version": 2}}
    PartialState._prepare_backend = lambda self, *args, **kwargs: (
        "gloo",
        DistributedType.MULTI_GPU,
    )
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    zero = {**ZERO["zero_optimization"], "stage": int(engine[-1])}
    return {"use_cpu": False, "deepspeed": {**ZERO, "zero_optimization": zero}}


if __name__ == "__main__":
    folder, engine = Path(sys.argv[1]), sys.argv[2]
    args = engine_arguments(engine)
    for name in CASES:
        # or the next model would be made in pieces, with other random numbers
        unset_hf_deepspeed_config()
        run_case(folder, name, folder / engine, 2, **args)
    if (
        engine != "zero3"
    ):  # there a model that is built by the recipe starts from other random numbers
        unset_hf_deepspeed_config()
        run_upgrade(folder, folder / engine, 2, **args)
    if engine in ("ddp", "fsdp"):
        run_interrupted(folder, folder / engine, **args)
