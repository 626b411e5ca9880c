"""Peak memory and CPU time of one prefill: a plan on random weights of a given size.

    # the size of the reference's timing run
    python benchmarks/prompt.py
    # several plans, each in a fresh process
    python benchmarks/prompt.py --plan llava --plan sparsecut
    python benchmarks/prompt.py --vision-width 1024 --language-width 4096 --language-depth 32

Prints the shape and the figures as one JSON line per plan. Memory is the process's own peak,
weights included.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def parse() -> argparse.Namespace:
    """The size of the two models and of the prompt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plan", action="append", help="a method's name; may be repeated (default: official_13b)"
    )
    for name, default in (
        ("vision-depth", 24),
        ("vision-width", 256),
        ("language-depth", 40),
        ("language-width", 512),
        ("vocabulary", 32000),
        ("text-tokens", 48),
        ("repeats", 5),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--last-logits",
        action="store_true",
        help="logits of the last token alone, as generate asks",
    )
    return parser.parse_args()


def measure(plan: str, a: argparse.Namespace) -> dict:
    """Build, warm up once, and time `repeats` passes over one image and `text_tokens` of text."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

    from sparsecut import SparseCutConfig, SparseCutForConditionalGeneration

    torch.set_num_threads(a.threads)
    vision = CLIPVisionConfig(
        hidden_size=a.vision_width,
        intermediate_size=4 * a.vision_width,
        num_attention_heads=a.vision_width // 64,
        num_hidden_layers=a.vision_depth,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=a.language_width,
        intermediate_size=a.language_width * 43 // 16,
        num_attention_heads=a.language_width // 64,
        num_hidden_layers=a.language_depth,
        vocab_size=a.vocabulary,
    )
    config = SparseCutConfig(
        vision_config=vision, text_config=text, plan=plan, image_token_id=a.vocabulary - 1
    )
    parts = {
        "vision_tower": AutoModel.from_config(vision),
        "language_model": AutoModelForCausalLM.from_config(text),
    }
    model = SparseCutForConditionalGeneration(config, **parts).eval()
    pixels = torch.randn(1, model.plan.num_views, 3, 336, 336)
    ids = torch.tensor(
        [[1, *[a.vocabulary - 1] * config.num_image_tokens, *range(2, a.text_tokens + 1)]]
    )
    times = []
    with torch.no_grad():
        for _ in range(a.repeats + 1):
            start = time.process_time()
            model(input_ids=ids, pixel_values=pixels, logits_to_keep=int(a.last_logits))
            times.append(time.process_time() - start)
    return {
        "plan": plan,
        "vision": f"{a.vision_depth}x{a.vision_width}",
        "language": f"{a.language_depth}x{a.language_width}",
        "tokens": ids.shape[1],
        "last_logits": a.last_logits,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds_median": round(statistics.median(times[1:]), 3),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": a.threads,
    }


def main() -> None:
    """One plan here, several in a process each, so that one's memory is not counted as
    another's.
    """
    arguments = parse()
    plans = arguments.plan or ["official_13b"]
    if len(plans) == 1:
        print(json.dumps(measure(plans[0], arguments)), flush=True)
        return
    others = [
        x for i, x in enumerate(sys.argv[1:], 1) if x != "--plan" and sys.argv[i - 1] != "--plan"
    ]
    for plan in plans:
        subprocess.run([sys.executable, __file__, *others, "--plan", plan], check=True)


if __name__ == "__main__":
    main()
