"""Runs that several processes must do as one process does, and the program that does them.

    torchrun --nproc-per-node 2 tests/helpers/engines.py FOLDER ENGINE=CASE,CASE,... [ENGINE=...]

Without torchrun, the program starts its two processes itself, after its imports. Engines are ddp,
fsdp, zero2 and zero3. Each runs its cases one after another; a case is a name of CASES, "upgrade"
or "interrupted".
"""

import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers.any_size import LIMITS, write_sized_records
from helpers.example_bases import build_example_base
from helpers.runs import interrupt, log, recipe, run, stage, write_records
from helpers.tiny import SPARSE
from safetensors.torch import load_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sparsecut import load, train

TESTS = Path(__file__).parents[1]
BOTH = ["fusion", "language"]
ALL = ["vision", "fusion", "language"]
CONTEXT = {**SPARSE, "gate": "context"}
RECOMPUTED = {"gradient_accumulation_steps": 2, "activation_checkpointing": True}
# Plan, and changes of the stage. A step has four records, and text-only records are among them.
CASES = {
    "parts": (SPARSE, {"train": ALL}),
    "recomputed": (CONTEXT, {"train": BOTH, "args": RECOMPUTED}),
    "context": (CONTEXT, {"train": ["fusion"]}),
    "texts": (SPARSE, {"train": BOTH, "data": "texts.json"}),
    # Some processes have texts alone in a step in which others have images.
    "few images": (SPARSE, {"train": ALL, "data": "few_images.json"}),
    "streamed": (SPARSE, {"train": BOTH, "streaming": True}),
    "packed": (SPARSE, {"train": BOTH, "pack": 30, "group": True}),
    # Every process has images of other sizes.
    "any size": (SPARSE, {"train": ALL, "data": "sized.json", "fit": LIMITS}),
}
# The case whose records they train on, and the parts of their second stage.
UPGRADES = {
    "upgrade": ("parts", BOTH),
    "projector": ("few images", ["vision", "projector", "fusion"]),
}
ENGINES = ["ddp", "fsdp"]
if importlib.util.find_spec("deepspeed"):
    ENGINES += ["zero2", "zero3"]
ZERO = {
    "stage3_gather_16bit_weights_on_model_save": True,
    "stage3_param_persistence_threshold": 0,
}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def make_stage(folder: Path, name: str, num_processes: int, **args) -> dict:
    """A case's stage for so many processes; the batch of a step is the same for all."""
    changes = {key: value for key, value in CASES[name][1].items() if key != "fit"}
    args = {
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.1,
        "use_cpu": True,
        **changes.pop("args", {}),
        **args,
    }
    num_batches = args.get("gradient_accumulation_steps", 1) * num_processes
    args["per_device_train_batch_size"] = 4 // num_batches
    streaming = changes.pop("streaming", False)
    plain = stage(folder, **changes, args=args)
    plain["data"]["streaming"] = streaming
    return plain


def run_case(folder: Path, name: str, output: Path, num_processes: int, **args) -> None:
    """Run a case: its own stage, and one of the language model that continues its result."""
    if name in UPGRADES:
        run_upgrade(folder, name, output, num_processes, **args)
    elif name == "interrupted":
        run_interrupted(folder, output, num_processes, **args)
    else:
        first = make_stage(folder, name, num_processes, **args)
        second_args = {**first["args"], "max_steps": 2}
        second = {**first, "name": "two", "train": ["language"], "args": second_args}
        plan, changes = CASES[name]
        run(folder, first, second, plan=plan, fit=changes.get("fit"), output=str(output / name))


def run_upgrade(folder: Path, name: str, output: Path, num_processes: int, **args) -> None:
    """Train shortcuts on the base in folder/base, and then other parts with them."""
    case, parts = UPGRADES[name]
    first = {**make_stage(folder, case, num_processes, **args), "train": ["fusion"]}
    second = {**first, "name": "two", "train": parts}
    given = recipe(
        folder,
        first,
        second,
        model={"base": str(folder / "base")},
        fusion={"method": "sparsecut", "count": 2, "rank": 8},
        output=str(output / name),
    )
    train(given, shown=False)


def run_interrupted(folder: Path, output: Path, num_processes: int, **args) -> None:
    """Run four steps with Adam twice: at a stretch, and cut off in the last one and resumed."""
    settings = {
        "max_steps": 4,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        **args,
    }
    plain = make_stage(folder, "parts", num_processes, **settings)
    run(folder, plain, output=str(output / "whole"))
    with interrupt("one", step=3):
        run(folder, plain, output=str(output / "resumed"))
    run(folder, plain, output=str(output / "resumed"), resume=True)


def write_inputs(folder: Path) -> None:
    """Write the records and the base that cases need."""
    write_records(folder)
    write_sized_records(folder)
    records = json.loads((folder / "data.json").read_text())
    few = [record for record in records if not record["image"]] * 3 + records[:3]
    (folder / "few_images.json").write_text(json.dumps(few))
    base, processor = build_example_base("llava")
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")


def run_engines(folder: Path, cases: dict[str, list[str]], *, torchrun: bool = False) -> None:
    """Run cases by engine in two processes, and all of them but "interrupted" in one process.

    Results are in folder/ENGINE/CASE, and in folder/one/CASE. Without torchrun, the two processes
    share their imports, which take most of the time.
    """
    write_inputs(folder)
    path = [str(TESTS), str(TESTS.parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    chosen = [f"{engine}={','.join(names)}" for engine, names in cases.items()]
    program = [str(TESTS / "helpers" / "engines.py"), str(folder), *chosen]
    process = subprocess.Popen(
        [sys.executable, *(launcher if torchrun else []), *program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        names = [name for engine_cases in cases.values() for name in engine_cases]
        for name in dict.fromkeys(names):
            if name != "interrupted":
                run_case(folder, name, folder / "one", 1)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started


def check_equal(folder: Path, engine: str, name: str) -> None:
    """Assert that two processes have given the losses and weights of one."""
    for stage_name in ("one", "two"):
        alone = [line["loss"] for line in log(folder / "one", stage_name, name)]
        together = [line["loss"] for line in log(folder / engine, stage_name, name)]
        assert len(alone) >= 2
        assert together == pytest.approx(alone, abs=2e-5)
        weights = load_weights(folder / "one" / name / stage_name)
        shared_weights = load_weights(folder / engine / name / stage_name)
        assert weights.keys() == shared_weights.keys()
        for key, value in weights.items():
            assert (value - shared_weights[key]).abs().max() < 2e-5, key


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a stage has saved, under the names it has in memory (DeepSpeed writes others)."""
    fusion = folder / "fusion.safetensors"
    if fusion.is_file():
        return load_file(fusion)
    return load(folder)[0].state_dict()


def check_resumed(folder: Path, engine: str) -> None:
    """Assert that the resumed run equals the one at a stretch, to the bit."""
    losses = [line["loss"] for line in log(folder / engine, "one", "whole")]
    assert len(losses) == 4
    assert [line["loss"] for line in log(folder / engine, "one", "resumed")] == losses
    weights = Path("final") / "model.safetensors"
    whole = (folder / engine / "whole" / weights).read_bytes()
    assert (folder / engine / "resumed" / weights).read_bytes() == whole


def use_engine(engine: str) -> dict:
    """Set this process up for an engine; those for accelerators are made to take CPUs for such.

    Returns:
        Arguments of a stage that ask for the engine.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    if engine == "ddp":
        return {}
    if engine == "fsdp":
        set_device = PartialState.set_device

        def set_cpu(self):
            set_device(self)
            # Else accelerate would silently use DDP.
            self.distributed_type = DistributedType.MULTI_GPU

        PartialState.set_device = set_cpu
        return {"fsdp": True, "fsdp_config": {"version": 2}}
    backend = ("gloo", DistributedType.MULTI_GPU)
    PartialState._prepare_backend = lambda self, *args, **kwargs: backend
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    zero = {**ZERO, "stage": int(engine.removeprefix("zero"))}
    return {"use_cpu": False, "deepspeed": {**DEEPSPEED, "zero_optimization": zero}}


def find_free_port() -> int:
    """A port on this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_processes(num_processes: int) -> None:
    """Go on as so many processes, as torchrun would start them; the first one ends here."""
    shared = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_port()),
    }
    children = []
    for rank in range(num_processes):
        child = os.fork()
        if not child:
            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
            return
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:  # they would wait for it
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
    sys.exit(0)


def main() -> None:
    """Run the cases of the command line in this process, as one of several."""
    gc.freeze()  # or every run would look through all that is imported
    if "RANK" not in os.environ:
        start_processes(2)
    folder = Path(sys.argv[1])
    for argument in sys.argv[2:]:
        engine, _, names = argument.partition("=")
        args = use_engine(engine)
        for name in names.split(","):
            # Or the next model would be made in pieces, with other random numbers.
            unset_hf_deepspeed_config()
            run_case(folder, name, folder / engine, 2, **args)


if __name__ == "__main__":
    main()
