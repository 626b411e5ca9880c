"""Plans at CLIP-L/336 + 7B Llama size with random weights, on one GPU: prompts, new tokens, and
steps of both stages.

    # writes bench.json and bench.md; at most nine minutes
    python benchmarks/gpu.py --out runs/gpu/bench
    python benchmarks/gpu.py --plans llava sparsecut --skip-training --compile
    # a smoke test; its figures mean nothing
    python benchmarks/gpu.py --tiny --device cpu --out runs/bench

One process makes both backbones on the device in bfloat16, and all plans share them. The plans take
turns, and every round begins with another one. Ratios are to the first plan in the same round. The
time that is left is divided over the remaining sections; a note lists those that were not reached.
Both files are written after every section, so a run that is killed leaves what it measured.
`make gpu` (gpu_run.py) runs this, and then vLLM.

Prompts have one image and --text-tokens text tokens each. Training has one image and --train-text
tokens per row, all of them targets, without padding, and activation checkpointing in the language
model. Weights, gradients and moments of AdamW are bfloat16, because 7 billion parameters with
float32 masters do not fit one device.

MFU: FLOPs of a step, without the recomputed ones, over the rate that this device reached in a
bfloat16 matrix product in the same run. The backward pass counts as much as the forward pass for
activations, and once more for trained weights (sparsecut.profiling.counting).
"""

import argparse
import datetime
import gc
import resource
import statistics
import time
from pathlib import Path

import torch
from gpu_parts import BenchedPlan, configs, machine, matmul_rate, size_of, step_flops
from gpu_table import markdown, write_result
from transformers import StaticCache

from sparsecut.methods import METHODS
from sparsecut.profiling.counting import count_plan
from sparsecut.profiling.timing import random_models
from sparsecut.training.freezing import freeze

PLANS = ("llava", "hires_tokens", "deepstack", "official_7b_as_run", "sparsecut")
NOT_REACHED = "not reached in time"
STAGES = {"stage 1": ("fusion",), "stage 2": ("fusion", "language")}
TINY = {
    "batches": [1, 2],
    "new_tokens": 3,
    "repeats": 2,
    "warmup": 1,
    "train_batch": 2,
    "train_text": 8,
    "text_tokens": 8,
}


def parse(words=None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu/bench"), help="path without its ending"
    )
    parser.add_argument(
        "--plans",
        nargs="+",
        default=list(PLANS),
        help="methods; the first is what others are compared with",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    for name, default in (
        ("text-tokens", 64),
        ("new-tokens", 64),
        ("repeats", 20),
        ("warmup", 2),
        ("train-batch", 4),
        ("train-text", 192),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budget-seconds", type=float, default=540)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the step that makes a new token; minutes more",
    )
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument(
        "--tiny", action="store_true", help="a few layers' widths and rounds, for a CPU"
    )
    a = parser.parse_args(words)
    for name, value in TINY.items() if a.tiny else ():
        setattr(a, name, value)
    return a


class Bench:
    """All plans, a clock that counts down, and the sections that are measured one after the
    other.
    """

    def __init__(self, a: argparse.Namespace):
        self.a, self.start, self.device, self.notes = (
            a,
            time.monotonic(),
            torch.device(a.device),
            [],
        )
        torch.manual_seed(0)
        unknown = [name for name in a.plans if name not in METHODS]
        self.notes += [f"{name} is no method of this version and was left out." for name in unknown]
        self.names = [name for name in a.plans if name in METHODS]
        if not self.names:
            raise SystemExit(f"none of the plans is known; allowed are {', '.join(METHODS)}")
        self.vision, self.language = configs(a.tiny)
        models = random_models(
            self.vision, self.language, {n: n for n in self.names}, device=self.device
        )
        self.benched = {name: BenchedPlan(model) for name, (model, _) in models.items()}
        sections = [f"{kind} {batch}" for kind in ("prefill", "decode") for batch in a.batches]
        sections += [] if a.skip_training else STAGES
        for plan in self.benched.values():
            plan.missing |= dict.fromkeys(sections, NOT_REACHED)
        self.left = len(sections)
        self.rate = None  # FLOPs per second of a matrix product
        self.shared_optimizer, self.counts = None, {}

    def run(self) -> dict:
        """Every section in turn; returns what the JSON file holds."""
        self.rate = matmul_rate(self.device, self.a.tiny)
        self.write()
        for batch in self.a.batches:
            self.prefill_all(batch)
        for batch in self.a.batches:
            self.decode_all(batch)
        for stage, parts in {} if self.a.skip_training else STAGES.items():
            self.train(stage, parts)
        return self.write()

    def write(self) -> dict:
        """Write both files with what is known by now; returns what the JSON holds."""
        result = self.describe()
        write_result(result, self.a.out)
        return result

    def describe(self) -> dict:
        """What was measured, where and how."""
        first = self.benched[self.names[0]].model
        a = vars(self.a) | {"out": str(self.a.out)}
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "machine": machine(self.device),
            "vision": size_of(self.vision),
            "language": size_of(self.language),
            "dtype": str(first.dtype).removeprefix("torch."),
            "attention": first.language_model.config._attn_implementation,
            "matmul_tflops": self.rate / 1e12,
            "settings": a,
            "seconds": time.monotonic() - self.start,
            "notes": self.notes,
            "plans": {
                name: {
                    "image_tokens": plan.model.config.num_image_tokens,
                    **plan.results,
                    "missing": plan.missing,
                }
                for name, plan in self.benched.items()
            },
        }

    def count(self, name: str, num_text_tokens: int):
        """FLOPs of a plan's prompt, counted once."""
        key = name, num_text_tokens
        if key not in self.counts:
            plan = self.benched[name].model.plan
            self.counts[key] = count_plan(
                self.vision, self.language, plan, num_text_tokens=num_text_tokens
            )
        return self.counts[key]

    def prefill_all(self, batch: int) -> None:
        """Prompts of all plans; a row's rate is of tokens of the prompt."""
        counts = {n: self.count(n, self.a.text_tokens) for n in self.names}
        items = {n: batch * x.num_prompt_tokens for n, x in counts.items()}
        flops = {n: batch * x.prefill_total_flops for n, x in counts.items()}
        work = {n: self.prefill(n, batch) for n in self.names}
        self.section(f"prefill {batch}", work, items, flops)

    def decode_all(self, batch: int) -> None:
        """New tokens of all plans; FLOPs are those of the first one."""
        made = batch * self.a.new_tokens
        counts = {n: self.count(n, self.a.text_tokens) for n in self.names}
        flops = {n: made * x.language_per_new_token_flops for n, x in counts.items()}
        work = {n: self.decode(n, batch) for n in self.names}
        self.section(f"decode {batch}", work, made, flops)

    def section(self, name: str, work: dict, items: int | dict, flops: dict | None = None) -> None:
        """Time work {plan: (prepare, run)} in turns, until --repeats rounds are made or its part of
        the time is spent.

        items: tokens of one run, for a rate per second. flops: of one run.
        """
        spare = self.start + self.a.budget_seconds - time.monotonic()
        until = time.monotonic() + spare / max(1, self.left)
        self.left -= 1
        times, peaks = {n: [] for n in work}, {}
        for turn in range(-self.a.warmup, self.a.repeats):
            if time.monotonic() > until and (turn > 0 or spare <= 0):
                break
            names = [n for n in work if n in times]
            first = turn % max(1, len(names))
            for plan in names[first:] + names[:first]:
                seconds, peak = None, 0
                try:
                    seconds, peak = self.timed(plan, *work[plan])
                except torch.OutOfMemoryError:
                    self.benched[plan].missing[name] = "out of memory"
                if (
                    seconds is None
                ):  # only now does nothing hold the tensors of the pass that failed
                    del times[plan], work[plan]
                    self.free()
                    continue
                peaks[plan] = max(peak, peaks.get(plan, 0))
                if turn >= 0:
                    times[plan].append(seconds)
        base = times.get(self.names[0])
        for plan, seconds in times.items():
            if not seconds:
                continue
            self.benched[plan].missing.pop(name, None)
            middle = statistics.median(seconds)
            low, _, high = (
                statistics.quantiles(seconds, n=4, method="inclusive")
                if len(seconds) > 1
                else (middle, middle, middle)
            )
            row = {
                "ms": 1e3 * middle,
                "spread_ms": 1e3 * (high - low),
                "rounds": len(seconds),
                "peak_gib": peaks[plan] / 2**30,
            }
            row["per_second"] = items[plan] / middle if isinstance(items, dict) else items / middle
            if base:
                row["ratio"] = statistics.median(x / y for x, y in zip(seconds, base, strict=False))
            if flops:
                row |= {"tflop": flops[plan] / 1e12, "mfu": flops[plan] / middle / self.rate}
            self.benched[plan].results[name] = row
        work.clear()
        self.free()
        if self.rate:
            self.write()

    def timed(self, plan: str, prepare, run) -> tuple[float, int]:
        """Seconds of one run, and the most bytes held, without the weights of other plans."""
        if prepare is not None:
            prepare()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        run()
        if not cuda:
            return (
                time.perf_counter() - start,
                1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            )
        torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        others = sum(
            other.exclusive_bytes() for name, other in self.benched.items() if name != plan
        )
        return seconds, torch.cuda.max_memory_allocated(self.device) - others

    def free(self) -> None:
        """Give back what no longer is used, so that a section begins as the first one did."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompt(self, name: str, batch: int, text: int) -> dict:
        """Token ids [batch, length], the image first, and pixels [batch, views, 3, S, S]."""
        model = self.benched[name].model
        config, chance = model.config, torch.Generator().manual_seed(0)
        words = torch.randint(1, config.image_token_id, (batch, text), generator=chance)
        images = torch.full((batch, config.num_image_tokens), config.image_token_id)
        shape = batch, model.plan.num_views, *config.grid.view
        pixels = torch.randn(shape, generator=chance).to(self.device, model.vision_tower.dtype)
        return {
            "input_ids": torch.cat([images, words], 1).to(self.device),
            "pixel_values": pixels,
        }

    def prefill(self, name: str, batch: int) -> tuple:
        """From pixels and token ids on the device to the first token's number."""
        model, prompt = self.benched[name].model, self.prompt(name, batch, self.a.text_tokens)

        @torch.no_grad()
        def run():
            return model(**prompt, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)

        return None, run

    def decode(self, name: str, batch: int) -> tuple:
        """Greedy tokens after a prompt, in a cache of fixed shape; the prompt is not timed. A run
        makes --new-tokens of them.
        """
        model, prompt, held = (
            self.benched[name].model,
            self.prompt(name, batch, self.a.text_tokens),
            {},
        )
        length = prompt["input_ids"].shape[1] + self.a.new_tokens + 1

        def step(token, cache):
            output = model(input_ids=token, past_key_values=cache, use_cache=True, continued=True)
            return output.logits[:, -1:].argmax(-1)

        torch._dynamo.config.recompile_limit = 64  # plans and batch sizes share the code of `step`
        one = torch.compile(step, mode="reduce-overhead", dynamic=False) if self.a.compile else step

        @torch.no_grad()
        def prepare():
            held.setdefault(
                "cache", StaticCache(model.language_model.config, max_cache_len=length)
            ).reset()
            output = model(
                **prompt, past_key_values=held["cache"], use_cache=True, logits_to_keep=1
            )
            held["token"] = output.logits[:, -1:].argmax(-1)

        @torch.no_grad()
        def run():
            token = held["token"]
            for _ in range(self.a.new_tokens):
                if self.a.compile:
                    torch.compiler.cudagraph_mark_step_begin()
                token = one(token, held["cache"]).clone()

        return prepare, run

    def train(self, stage: str, parts: tuple[str, ...]) -> None:
        """Steps of a stage: loss on every word, backward, AdamW."""
        fused = {"lr": 1e-6, "fused": True} if self.device.type == "cuda" else {"lr": 1e-6}
        work, items, flops = {}, {}, {}
        for name, plan in self.benched.items():
            freeze(plan.model, parts)
            plan.optimizer = torch.optim.AdamW(plan.model.fusion.parameters(), **fused)
            plan.model.language_model.train()
            plan.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
            counted = self.count(name, self.a.train_text)
            flops[name] = self.a.train_batch * step_flops(counted, self.language, parts)
            items[name] = self.a.train_batch * counted.num_prompt_tokens
            work[name] = None, self.step(plan)
        language = self.benched[self.names[0]].model.language_model.parameters()
        self.shared_optimizer = (
            torch.optim.AdamW(language, **fused) if "language" in parts else None
        )
        self.section(stage, work, items, flops)
        self.shared_optimizer = None
        for plan in self.benched.values():
            plan.optimizer = None
            plan.model.language_model.eval()

    def step(self, plan: BenchedPlan):
        """A function that makes one training step of a plan."""
        name = next(n for n, other in self.benched.items() if other is plan)
        prompt = self.prompt(name, self.a.train_batch, self.a.train_text)
        ids = prompt["input_ids"]
        labels = ids.masked_fill(ids == plan.model.config.image_token_id, -100)

        def run():
            try:
                plan.model(**prompt, labels=labels, use_cache=False).loss.backward()
                for optimizer in (plan.optimizer, self.shared_optimizer):
                    if optimizer is not None:
                        optimizer.step()
            finally:
                plan.model.zero_grad(set_to_none=True)

        return run


def main(words=None) -> dict:
    """Measure, write both files, print the table, and return what the JSON holds."""
    a = parse(words)
    if torch.device(a.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} finds no GPU here; on a CPU, try --tiny --device cpu"
        )
    result = Bench(a).run()
    print(markdown(result))
    return result


if __name__ == "__main__":
    main()
