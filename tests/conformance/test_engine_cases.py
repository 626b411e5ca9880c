"""Every engine trains every case as one process does, started by torchrun.

DeepSpeed takes part where it is installed; it compiles a part of itself.
"""

import pytest
from helpers.engines import CASES, ENGINES, UPGRADES, check_equal, run_engines


def list_cases(engine: str) -> list[str]:
    """Cases of an engine. A model that ZeRO-3 makes in pieces starts from other random numbers."""
    return [*CASES] if engine == "zero3" else [*CASES, *UPGRADES]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_give_the_losses_and_weights_of_one(engine, tmp_path):
    run_engines(tmp_path, {engine: list_cases(engine)}, torchrun=True)
    for name in list_cases(engine):
        check_equal(tmp_path, engine, name)
