"""The GPU benchmark runs at a tiny size on a CPU, reports every plan with finite figures, and ends
when its time is spent.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from sparsecut.profiling.counting import count_plan

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
SECTIONS = ("prefill 1", "prefill 2", "decode 1", "decode 2", "stage 1", "stage 2")


@pytest.fixture
def gpu(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    yield gpu
    for name in ("gpu", "gpu_parts", "gpu_python", "gpu_run", "gpu_table"):
        sys.modules.pop(name, None)


def test_every_plan_has_every_figure(gpu, tmp_path):
    some = ("llava", "hires_tokens", "sparsecut")  # of its plans, to be quick
    result = gpu.main(["--tiny", "--device=cpu", f"--out={tmp_path / 'bench'}", "--plans", *some])
    assert (
        set(some) <= set(gpu.PLANS)
        and tuple(result["plans"]) == some
        and result["attention"] == "sdpa"
    )
    for plan in result["plans"].values():
        assert not plan["missing"]
        for section in SECTIONS:
            assert all(math.isfinite(x) and x >= 0 for x in plan[section].values()), section
            assert (
                plan[section]["ms"] > 0
                and plan[section]["peak_gib"] > 0
                and plan[section]["ratio"] > 0
            )
        assert 0 < plan["stage 1"]["tflop"] < plan["stage 2"]["tflop"]
        assert all(plan[section]["mfu"] > 0 for section in SECTIONS)
        prefill = plan["prefill 2"]  # tokens a second, of both prompts
        tokens = 2 * (plan["image_tokens"] + 8)
        assert prefill["per_second"] == pytest.approx(1000 * tokens / prefill["ms"])
    assert result["plans"]["llava"]["prefill 1"]["ratio"] == 1
    assert (
        result["plans"]["hires_tokens"]["image_tokens"]
        == 5 * result["plans"]["llava"]["image_tokens"]
    )

    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(result))
    page = (tmp_path / "bench.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    assert (
        {len(row) for row in rows} == {11, 18}
        and "nan" not in page
        and "these figures mean nothing" in page
    )
    assert [row[1].strip() for row in rows].count("sparsecut") == 2
    assert result["date"] in page and result["machine"]["device"] in page


def test_it_stops_when_the_time_is_spent_and_says_what_is_missing(gpu, tmp_path):
    words = [
        "--plans",
        "llava",
        "nonsense",
        "--tiny",
        "--device=cpu",
        "--skip-training",
        "--budget-seconds=0",
    ]
    result = gpu.main([*words, f"--out={tmp_path / 'bench'}"])
    assert list(result["plans"]) == ["llava"] and "nonsense is no method" in result["notes"][0]
    assert set(result["plans"]["llava"]["missing"].values()) == {"not reached in time"}
    page = (tmp_path / "bench.md").read_text()
    assert "not reached" in page and "Training" not in page


def test_a_plan_that_runs_out_of_memory_does_not_end_the_others(gpu, tmp_path):
    bench = gpu.Bench(
        gpu.parse(["--tiny", "--device=cpu", "--skip-training", "--plans", "llava", "sparsecut"])
    )

    def fails():
        raise torch.OutOfMemoryError("no memory left")

    bench.section("prefill 1", {"llava": bench.prefill("llava", 1), "sparsecut": (None, fails)}, 1)
    assert bench.benched["sparsecut"].missing["prefill 1"] == "out of memory"
    assert "prefill 1" not in bench.benched["llava"].missing
    assert bench.benched["llava"].results["prefill 1"]["rounds"] == 2


def test_tokens_after_the_prompt_are_those_of_generate(gpu):
    """The timed loop, with its cache of fixed shape, makes the tokens that one pass over everything
    would.
    """
    bench = gpu.Bench(
        gpu.parse(["--tiny", "--device=cpu", "--skip-training", "--plans", "sparsecut"])
    )
    model, made = bench.benched["sparsecut"].model, []
    forward = model.forward
    model.forward = lambda *args, **kwargs: made.append(out := forward(*args, **kwargs)) or out
    prepare, run = bench.decode("sparsecut", 2)
    prepare()
    run()
    tokens = torch.cat([out.logits[:, -1:].argmax(-1) for out in made], 1)
    assert tokens.shape == (2, 4)
    prompt = bench.prompt("sparsecut", 2, bench.a.text_tokens)
    ids = torch.cat([prompt["input_ids"], tokens[:, :-1]], 1)
    with torch.no_grad():
        logits = forward(input_ids=ids, pixel_values=prompt["pixel_values"]).logits
    torch.testing.assert_close(logits[:, -1], made[-1].logits[:, -1], rtol=1e-3, atol=1e-4)


def test_flops_of_a_step_follow_six_per_weight_and_token(gpu):
    """Of a decoder much larger than the rest: 2 FLOPs per weight forward, 2 for activations, 2
    for weights.
    """
    from gpu_parts import configs, step_flops

    vision, _ = configs(tiny=True)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_hidden_layers": 32,
    }
    language = LlamaConfig(**sizes, vocab_size=512)
    counted = count_plan(vision, language, "llava", num_text_tokens=12)
    weights = counted.num_language_parameters - 512 * 256  # embeddings multiply nothing
    for parts, factor in ((("fusion",), 4), (("fusion", "language"), 6)):
        expected = factor * weights * counted.num_prompt_tokens
        assert abs(step_flops(counted, language, parts) / expected - 1) < 0.02


def test_a_run_that_dies_leaves_what_it_measured(gpu, tmp_path, monkeypatch):
    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Bench, "decode_all", dies)
    words = ["--tiny", "--device=cpu", "--plans", "llava", "sparsecut", "--batches", "1"]
    with pytest.raises(KeyboardInterrupt):
        gpu.main([*words, f"--out={tmp_path / 'bench'}"])
    left = json.loads((tmp_path / "bench.json").read_text())
    for plan in left["plans"].values():
        assert plan["prefill 1"]["ms"] > 0
        # Of the smoke test's sections, these were not reached.
        assert plan["missing"].keys() == set(SECTIONS) - {"prefill 1", "prefill 2"}
        assert set(plan["missing"].values()) == {gpu.NOT_REACHED}
    page = (tmp_path / "bench.md").read_text()
    assert "llava, stage 1: not reached in time" in page
    assert sorted(x.name for x in tmp_path.iterdir()) == ["bench.json", "bench.md"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_sentence_says_so(gpu, tmp_path):
    with pytest.raises(SystemExit, match="no GPU"):
        gpu.main([f"--out={tmp_path / 'bench'}"])
    import gpu_run

    with pytest.raises(SystemExit, match="finds no GPU here"):
        gpu_run.main([f"--out={tmp_path / 'bench'}"])
    assert not list(tmp_path.iterdir())
