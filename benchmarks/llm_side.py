"""What added features cost the language model: the same prompt with and without them, in turns, in
one process.

    python benchmarks/llm_side.py                           # a mid size; some minutes
    python benchmarks/llm_side.py --plan deepstack --layers 24 --width 1024 --repeats 60

The features are made beforehand, so that only the language model runs: LLaVA's prompt as it is,
the plan's with additions before its layers. Both have equally many tokens, and share weights.
Prints JSON lines, by the clock and, on a CPU, by processor time, which other programs disturb
less. The ratio is the median over pairs of passes, its interval from resampling them, and
`control` the same with LLaVA on both sides: what the machine's noise makes.
"""

import argparse
import json
import random
import statistics
import time


def parse() -> argparse.Namespace:
    """Plans, and the size of the language model and of the prompt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plan", action="append", help="a method's name; may be repeated (default: sparsecut)"
    )
    for name, default in (
        ("layers", 16),
        ("width", 512),
        ("vocabulary", 32000),
        ("text-tokens", 64),
        ("repeats", 60),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def passes(a: argparse.Namespace, plans: list[str]) -> dict:
    """{name: function that runs the language model once}, one for LLaVA and one per plan, on shared
    weights.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    from sparsecut.hooks import inject
    from sparsecut.profiling.timing import random_models

    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1}
    vision = CLIPVisionConfig(**small, num_hidden_layers=24, image_size=336, patch_size=14)
    sizes = {
        "hidden_size": a.width,
        "intermediate_size": 11 * a.width // 4,
        "num_attention_heads": max(1, a.width // 64),
    }
    language = LlamaConfig(**sizes, num_hidden_layers=a.layers, vocab_size=a.vocabulary)
    dtype = torch.float32 if a.device == "cpu" else torch.bfloat16
    models = random_models(
        vision, language, {n: n for n in ["llava", *plans]}, device=a.device, dtype=dtype
    )
    llava = models["llava"][0]
    num_image_tokens = llava.config.num_image_tokens
    length = num_image_tokens + a.text_tokens
    embeddings = torch.randn(1, length, a.width, device=a.device, dtype=dtype)
    mask = torch.arange(length, device=a.device).unsqueeze(0) < num_image_tokens
    arguments = {
        "inputs_embeds": embeddings,
        "use_cache": True,
        "logits_to_keep": 1,
        "return_dict": True,
    }

    def side(model):
        if model.config.num_image_tokens != num_image_tokens:
            raise SystemExit(
                f"the plan has {model.config.num_image_tokens} image tokens, LLaVA"
                f" {num_image_tokens}: not comparable"
            )
        if any(model.plan.layers) and model.plan.gate == "context":
            raise SystemExit(
                "gates that look at hidden states are no plain additions; choose another plan"
            )
        rows = {
            d: torch.randn(num_image_tokens, a.width, device=a.device, dtype=dtype)
            for d in model.plan.layers
        }

        def run():
            with torch.no_grad():
                inject(lambda: model.language_model(**arguments), mask, rows)
            if a.device != "cpu":
                torch.accelerator.synchronize()

        return run

    return {
        "control": side(llava),
        **{name: side(models[name][0]) for name in plans},
        "llava": side(llava),
    }


def compare(runs: dict, repeats: int) -> dict[str, list[tuple]]:
    """Pairs (own, LLaVA's beside it), each (seconds by the clock, seconds of processor); which runs
    first alternates.
    """
    pairs: dict[str, list[tuple]] = {name: [] for name in runs if name != "llava"}

    def seconds(name: str) -> tuple[float, float]:
        clock, processor = time.perf_counter(), time.process_time()
        runs[name]()
        return time.perf_counter() - clock, time.process_time() - processor

    for run in runs.values():
        run()
        run()
    for turn in range(repeats):
        for name, measured in pairs.items():
            if turn % 2:
                base = seconds("llava")
                measured.append((seconds(name), base))
            else:
                plan_seconds = seconds(name)
                measured.append((plan_seconds, seconds("llava")))
    return pairs


def summary(pairs: list[tuple[float, float]]) -> dict:
    """Median of the pairs' ratios, its 95 % bootstrap interval, the quartiles of single ratios, and
    both medians in ms.
    """
    ratios = [own / base for own, base in pairs]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(statistics.median(ratios), 4),
        "interval": [round(medians[50], 4), round(medians[1949], 4)],
        "quartiles": [round(low, 4), round(high, 4)],
        "ms": round(1000 * statistics.median(own for own, _ in pairs), 2),
        "llava_ms": round(1000 * statistics.median(base for _, base in pairs), 2),
    }


def main() -> None:
    """Compare the requested plans, and LLaVA with itself."""
    a = parse()
    plans = a.plan or ["sparsecut"]
    size = {
        "layers": a.layers,
        "width": a.width,
        "tokens": 576 + a.text_tokens,
        "threads": a.threads,
        "pairs": a.repeats,
    }
    for name, pairs in compare(passes(a, plans), a.repeats).items():
        for i, clock in enumerate(("clock", "processor") if a.device == "cpu" else ("clock",)):
            figures = summary([(own[i], base[i]) for own, base in pairs])
            print(json.dumps({"plan": name, "time": clock, **figures, **size}), flush=True)


if __name__ == "__main__":
    main()
