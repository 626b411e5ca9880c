"""A global batch is accumulated from micro-batches, or refused with its arithmetic."""

import pytest

from sparsecut.config.recipe import Source, Stage
from sparsecut.training.arguments import compute_accumulation_steps


def make_stage(**args) -> Stage:
    args = {"per_device_train_batch_size": 4, **args}
    source = Source("nowhere.json")
    return Stage(name="one", data=(source,), train=("fusion",), args=args, global_batch=256)


@pytest.mark.parametrize(
    ("processes", "args", "steps"),
    [(1, {}, 64), (8, {}, 8), (8, {"gradient_accumulation_steps": 8}, 8), (64, {}, 1)],
)
def test_a_global_batch_is_accumulated(processes, args, steps):
    assert compute_accumulation_steps(make_stage(**args), processes) == steps


@pytest.mark.parametrize(
    ("processes", "args", "named"),
    [
        (3, {}, r"256.* 4 x 3 processes"),
        (128, {}, r"256.* 4 x 128 processes"),
        (1, {"gradient_accumulation_steps": 2}, r"4 x 1 process .* 2 = 8"),
        (1, {"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        (1, {"gradient_accumulation_steps": -2}, "gradient_accumulation_steps is -2"),
        (1, {"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
)
def test_a_global_batch_that_cannot_be_is_refused_with_its_arithmetic(processes, args, named):
    with pytest.raises(ValueError, match=named):
        compute_accumulation_steps(make_stage(**args), processes)
