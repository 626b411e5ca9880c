"""Training steps of ways of fusion, side by side: tokens per second, use of the machine, memory; or
their estimated FLOPs.

    # measured here, models of one size in one run, taking turns
    python benchmarks/train.py
    # counted at CLIP-L/336 + 7B, both stages of LLaVA-1.5; no weights
    python benchmarks/train.py --count
    python benchmarks/train.py --device cuda --bf16 --vision-width 1024 --language-width 4096 \\
        --language-depth 32

The LLaVA baseline comes first and is what the ratios are to; hires_channels and sparsecut_input
are the controls: finer views, or the same taps, at the input alone. A step is forward, backward
and AdamW on images that have a text each; the encoder is frozen. Utilisation is the FLOPs per
second of a step, by count, over those of a matrix product measured in the same run.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

PLANS = ["llava", "hires_channels", "sparsecut_input", "sparsecut"]
STAGES = {"fusion": ["fusion"], "fusion and language model": ["fusion", "language"]}


def parse() -> argparse.Namespace:
    """Sizes, plans and what to do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", action="store_true", help="estimated FLOPs, at CLIP-L/336 + 7B")
    parser.add_argument(
        "--plan",
        action="append",
        help=f"a method's name; may be repeated (default: {', '.join(PLANS)})",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    sizes = {
        "vision-depth": 12,
        "vision-width": 128,
        "language-depth": 12,
        "language-width": 512,
        "batch": 2,
    }
    for name, default in {
        **sizes,
        "text-tokens": 64,
        "vocabulary": 8000,
        "repeats": 5,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def count(plans: list[str]) -> list[dict]:
    """FLOPs of a training step of one record per plan and stage, by fake tensors, and
    their ratio to the first plan's.
    """
    from sparsecut.config.recipe import parse_recipe
    from sparsecut.profiling.dry_run import dry_run

    rows = []
    for plan in plans:
        sides = {"vision": "openai/clip-vit-large-patch14-336", "language": "lmsys/vicuna-7b-v1.5"}
        args = {"max_steps": 1, "per_device_train_batch_size": 1}
        stages = [
            {"name": f"stage-{i}", "data": {"path": "none.json"}, "train": parts, "args": args}
            for i, parts in enumerate(STAGES.values())
        ]
        recipe = parse_recipe({"model": sides, "fusion": plan, "stages": stages, "output": "none"})
        for name, estimate in zip(STAGES, dry_run(recipe), strict=True):
            rows.append({"plan": plan, "stage": name, "tflop": estimate.flops_per_step / 1e12})
    first = {row["stage"]: row["tflop"] for row in rows if row["plan"] == plans[0]}
    return [{**row, "speed": first[row["stage"]] / row["tflop"]} for row in rows]


def make(plan: str, a: argparse.Namespace):
    """(model, inputs): random weights, `batch` records of a image and a text."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

    from sparsecut import SparseCutConfig, SparseCutForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"num_attention_heads": a.vision_width // 64, "num_hidden_layers": a.vision_depth}
    vision = CLIPVisionConfig(
        hidden_size=a.vision_width,
        intermediate_size=4 * a.vision_width,
        image_size=336,
        patch_size=14,
        **sizes,
    )
    sizes = {"num_attention_heads": a.language_width // 64, "num_hidden_layers": a.language_depth}
    inner = a.language_width * 43 // 16
    text = LlamaConfig(
        hidden_size=a.language_width, intermediate_size=inner, vocab_size=a.vocabulary, **sizes
    )
    config = SparseCutConfig(
        vision_config=vision, text_config=text, plan=plan, image_token_id=a.vocabulary - 1
    )
    parts = {
        "vision_tower": AutoModel.from_config(vision),
        "language_model": AutoModelForCausalLM.from_config(text),
    }
    model = SparseCutForConditionalGeneration(config, **parts).to(a.device).train()
    row = [1, *[a.vocabulary - 1] * config.num_image_tokens, *range(2, a.text_tokens + 1)]
    ids = torch.tensor([row] * a.batch, device=a.device)
    pixels = torch.randn(a.batch, model.plan.num_views, 3, 336, 336, device=a.device)
    labels = ids.clone()
    labels[:, : config.num_image_tokens + 1] = -100
    return model, {"input_ids": ids, "pixel_values": pixels, "labels": labels, "use_cache": False}


def stepper(plan: str, parts: list[str], a: argparse.Namespace):
    """(a function that takes one step, tokens of a step, FLOPs of a step)."""
    import torch

    from sparsecut.profiling.fake_models import create_flop_counter
    from sparsecut.training.freezing import freeze

    model, inputs = make(plan, a)
    freeze(model, tuple(parts))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with torch.autocast(torch.device(a.device).type, torch.bfloat16, enabled=a.bf16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with create_flop_counter() as counted:
        step()
    return step, inputs["input_ids"].numel(), counted.get_total_flops()


def seconds(work, device: str) -> float:
    """How long it takes, the device's queue emptied before and after."""
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def matmul_rate(a: argparse.Namespace) -> float:
    """FLOP/s of a large matrix product here, the best of five."""
    import torch

    size, dtype = (1024 if a.device == "cpu" else 8192), torch.bfloat16 if a.bf16 else torch.float32
    x, y = (torch.randn(size, size, device=a.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: x @ y, a.device) for _ in range(5))


def measure(plans: list[str], a: argparse.Namespace) -> list[dict]:
    """Every plan takes a step in turn, `repeats` times; medians, and the spread of the ratios
    within turns.
    """
    import torch

    torch.set_num_threads(a.threads)
    rows, rate = [], matmul_rate(a)
    for name, parts in STAGES.items():
        steps = {plan: stepper(plan, parts, a) for plan in plans}
        took = {plan: [] for plan in plans}
        for _ in range(a.repeats):
            for plan, (step, _, _) in steps.items():
                took[plan].append(seconds(step, a.device))
        for plan, (_, tokens, flops) in steps.items():
            ratios = sorted(
                first / own for first, own in zip(took[plans[0]], took[plan], strict=True)
            )
            middle = statistics.median(took[plan])
            facts = {
                "plan": plan,
                "stage": name,
                "tokens_per_second": tokens / middle,
                "speed": statistics.median(ratios),
            }
            rows.append(
                {
                    **facts,
                    "least": ratios[0],
                    "most": ratios[-1],
                    "utilisation": flops / middle / rate,
                }
            )
    return rows


def main() -> None:
    """Print one table and, with --json, write it."""
    a = parse()
    plans = a.plan or PLANS
    rows = count(plans) if a.count else measure(plans, a)
    print(
        f"{'stage':26} {'plan':16} "
        + (
            "TFLOP a record   speed"
            if a.count
            else "tokens/s   speed (least to most)   utilisation"
        )
    )
    for row in rows:
        if a.count:
            figures = f"{row['tflop']:14.2f}   {row['speed']:5.3f}"
        else:
            spread = f"{row['speed']:5.3f} ({row['least']:.3f} to {row['most']:.3f})"
            figures = (
                f"{row['tokens_per_second']:8,.0f}   {spread:22}  {100 * row['utilisation']:5.1f} %"
            )
        print(f"{row['stage']:26} {row['plan']:16} {figures}")
    if not a.count:
        import torch

        cuda = torch.cuda.is_available() and a.device != "cpu"
        peak = (
            torch.cuda.max_memory_allocated()
            if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        print(
            f"speed: of {plans[0]} = 1, ratios within turns; memory of the whole run at most"
            f" {peak / 2**20:,.0f} MiB"
        )
    if a.json:
        a.json.write_text(
            json.dumps({"settings": vars(a) | {"json": None}, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
