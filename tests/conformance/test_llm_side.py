"""benchmarks/llm_side.py compares pairs of passes that take turns."""

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[2] / "benchmarks" / "llm_side.py"


def test_pairs_alternate_after_two_warm_up_passes():
    spec = importlib.util.spec_from_file_location("llm_side", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in ("control", "a", "llava")}
    pairs = module.compare(runs, 3)
    assert {name: len(found) for name, found in pairs.items()} == {"control": 3, "a": 3}
    assert calls[6:10] == ["control", "llava", "a", "llava"]
    assert calls[10:12] == ["llava", "control"]
    figures = module.summary([(1.1, 1.0), (2.2, 2.0), (0.9, 1.0)])
    assert figures["ratio"] == 1.1
    assert figures["interval"][0] <= 1.1 <= figures["interval"][1]
