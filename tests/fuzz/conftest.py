"""Drawn inputs: each ends with the right value or a sentence. `make fuzz` takes five minutes."""

import pytest
from helpers.fuzzing import TOTAL_SECONDS, run_fuzz

COUNTS: dict[str, int] = {}


@pytest.fixture
def fuzz(request):
    """A function of a check and a strategy: one round, or this test's share of FUZZ_SECONDS."""
    targets = [item for item in request.session.items if "fuzz" in item.fixturenames]

    def fuzz(check, strategy):
        count = run_fuzz(check, strategy, TOTAL_SECONDS / len(targets))
        COUNTS[request.node.name] = COUNTS.get(request.node.name, 0) + count

    return fuzz


def pytest_terminal_summary(terminalreporter):
    """Say how many inputs each target was given."""
    for name, count in COUNTS.items():
        terminalreporter.write_line(f"{name}: {count:,} inputs")
