"""What a plan costs on this machine: times and memory of prompts and new tokens, warmed up, as
medians.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from ..modeling import SparseCutForConditionalGeneration
from ..plan import Plan
from ..schema import UserError
from .counting import check_least, configuration_of, lines_of

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TIMES = ("encoder", "fusion", "language_prefill", "first_token", "new_token")


@dataclass(frozen=True)
class Measurement:
    """Medians over `repeats` passes of `batch_size` prompts with one picture each, after warm-up.

    first_token_ms: from pixels and token ids on the device to the first token's number; its spread
    is the distance between quartiles. encoder_ms, fusion_ms and language_prefill_ms are its parts;
    on a GPU each ends with a wait for the device, so that their sum is a little more than without
    looking. tokens_per_second: of the whole batch, greedily, after the first token.
    peak_bytes: the most memory that the first pass held beyond what was held before it (weights are
    held before): of the allocator on CUDA, of the process elsewhere, where memory that an earlier
    pass left to the process hides some of it; None where neither can be asked. *_ratio: median over
    the repeats of this model's time to the first model's in the same round.
    """

    first_token_ms: float
    first_token_spread_ms: float
    encoder_ms: float
    fusion_ms: float
    language_prefill_ms: float
    tokens_per_second: float
    peak_bytes: int | None
    first_token_ratio: float
    language_prefill_ratio: float
    new_token_ratio: float
    num_prompt_tokens: int
    num_new_tokens: int
    batch_size: int
    repeats: int
    device: str
    dtype: str

    def to_dict(self) -> dict:
        """Plain numbers and strings: what JSON holds."""
        return asdict(self)


def measure(model, processor=None, **options) -> Measurement:
    """Time one model; options are those of `measure_all`."""
    return measure_all({"model": (model, processor)}, **options)["model"]


def measure_all(
    models: Mapping[str, tuple],
    *,
    num_new_tokens: int = 32,
    num_text_tokens: int = 64,
    repeats: int = 5,
    warmup: int = 2,
    batch_size: int = 1,
) -> dict[str, Measurement]:
    """Time models {name: (model, processor)} in one process, taking turns, so that a slow minute is
    slow for all of them.

    Pictures and words are random; a processor, which may be None, makes the pixels where there is
    one, and is not timed. Every round begins with another model. At least one warm-up pass is made,
    in which memory is measured. Raises ValueError where a number is below its least.
    """
    given = {"num_new_tokens": num_new_tokens, "repeats": repeats, "batch_size": batch_size}
    check_least(
        {name: (value, 2 if name == "num_new_tokens" else 1) for name, value in given.items()}
    )
    check_least({"num_text_tokens": (num_text_tokens, 1), "warmup": (warmup, 1)})
    if not models:
        raise UserError("there is no model to measure; give at least one")
    arms = {
        name: (m, *_prompt(m, p, num_text_tokens, batch_size)) for name, (m, p) in models.items()
    }
    modes = {name: model.training for name, (model, _) in models.items()}
    names, peaks = list(arms), {}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    try:
        for turn in range(-warmup, repeats):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                model, *prompt = arms[name]
                model.eval()
                peak = _Peak(model.device) if name not in peaks else None
                seconds = _one_pass(model, *prompt, num_new_tokens)
                if peak is not None:
                    peaks[name] = peak.read()
                if turn >= 0:
                    times[name].append(seconds)
    finally:
        for name, (model, _) in models.items():
            model.train(modes[name])
    return {
        name: _summary(arms[name], times[name], times[names[0]], peaks[name], given)
        for name in names
    }


def random_models(
    vision_config,
    text_config,
    plans: Mapping[str, str | dict | Plan],
    *,
    device="cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, tuple]:
    """{name: (model, None)} with random weights, the two backbones shared; by default float32 on a
    CPU, bfloat16 elsewhere.

    Raises ValueError if the weights would not fit the device's memory, before any is made.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    configs = {
        name: configuration_of(vision_config, text_config, plan) for name, plan in plans.items()
    }
    with torch.device("meta"):
        fusions = [SparseCutForConditionalGeneration(config) for config in configs.values()]
    number = sum(p.numel() for p in fusions[0].parameters())
    number += sum(p.numel() for model in fusions[1:] for p in model.fusion.parameters())
    needed = number * dtype.itemsize
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    if needed > 0.9 * free:
        raise UserError(
            f"the weights alone take {needed / 2**30:.1f} GiB in"
            f" {str(dtype).removeprefix('torch.')}, but {device} has {free / 2**30:.1f} GiB free,"
            " of which nine tenths may be used; measure smaller models, fewer plans, or on a"
            " larger machine"
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            first = next(iter(configs.values()))
            vision = AutoModel.from_config(first.vision_config, dtype=dtype)
            language = AutoModelForCausalLM.from_config(first.text_config, dtype=dtype)
            for module in (*vision.modules(), *language.modules()):
                module._is_hf_initialized = True  # drawn once is enough
            return {
                name: (
                    SparseCutForConditionalGeneration(
                        c, vision_tower=vision, language_model=language
                    ).eval(),
                    None,
                )
                for name, c in configs.items()
            }
    finally:
        torch.set_default_dtype(before)


def table(measured: Mapping[str, Measurement]) -> str:
    """Measurements as lines of text; ratios are to the first plan, round by round."""
    columns: dict[str, Callable[[Measurement], str]] = {
        "first token ms": lambda m: f"{m.first_token_ms:.1f}",
        "spread": lambda m: f"{m.first_token_spread_ms:.1f}",
        "encoder": lambda m: f"{m.encoder_ms:.1f}",
        "fusion": lambda m: f"{m.fusion_ms:.1f}",
        "language": lambda m: f"{m.language_prefill_ms:.1f}",
        "relative": lambda m: f"{m.first_token_ratio:.3f}",
        "tokens/s": lambda m: f"{m.tokens_per_second:.1f}",
        "peak MiB": lambda m: "unknown" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.0f}",
    }
    rows = {name: {k: show(m) for k, show in columns.items()} for name, m in measured.items()}
    one = next(iter(measured.values()))
    note = (
        f"measured on {one.device} in {one.dtype}: medians of {one.repeats} passes in turns, batch"
        f" {one.batch_size}; "
    )
    return lines_of(rows) + f"\n{note}peak without weights"


def _prompt(model, processor, num_text_tokens: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Token ids [batch, length], pictures first, and pixels [batch, views, 3, S, S] on the model's
    device.
    """
    config, device = model.config, model.device
    words = model.get_input_embeddings().num_embeddings
    random = torch.Generator().manual_seed(0)
    text = torch.randint(1, words, (batch_size, num_text_tokens), generator=random)
    text[text == config.image_token_id] = 0 if config.image_token_id else 1
    pictures = torch.full((batch_size, config.num_image_tokens), config.image_token_id)
    shape = (batch_size, model.plan.num_views, *config.grid.view)
    if processor is None:
        pixels = torch.randn(shape, generator=random)
    else:
        height, width = config.grid.view[-2:]
        raw = torch.randint(
            0, 256, (batch_size, 2 * height, 2 * width, 3), generator=random, dtype=torch.uint8
        )
        messages = [processor.image_token] * batch_size
        pixels = processor(images=list(raw.numpy()), text=messages, return_tensors="pt")[
            "pixel_values"
        ].view(shape)
    return torch.cat([pictures, text], dim=1).to(device), pixels.to(
        device, model.vision_tower.dtype
    )


@torch.no_grad()
def _one_pass(model, ids: Tensor, pixels: Tensor, num_new_tokens: int) -> dict[str, float]:
    """Seconds by the names of TIMES for a prompt and greedy tokens after it; new_token is one of
    them.
    """
    marks: list[float] = []

    def now(*_) -> None:
        if ids.device.type != "cpu":
            torch.accelerator.synchronize(ids.device)
        marks.append(time.perf_counter())

    hooks = [model.fusion.register_forward_pre_hook(now), model.fusion.register_forward_hook(now)]
    try:
        now()
        images = model.get_image_features(pixels)
        now()
    finally:
        for hook in hooks:
            hook.remove()
    begin, *fusion, fused = marks
    output = model(
        input_ids=ids, mm_encoder_outputs={"image": images}, use_cache=True, logits_to_keep=1
    )
    token = output.logits[:, -1:].argmax(-1)
    now()
    for _ in range(num_new_tokens - 1):
        output = model(
            input_ids=token, past_key_values=output.past_key_values, use_cache=True, continued=True
        )
        token = output.logits[:, -1:].argmax(-1)
    now()
    spent = sum(fusion[1::2]) - sum(fusion[::2])
    first, last = marks[-2:]
    seconds = (
        fused - begin - spent,
        spent,
        first - fused,
        first - begin,
        (last - first) / (num_new_tokens - 1),
    )
    return dict(zip(TIMES, seconds, strict=True))


class _Peak:
    """Most memory held since this was made, beyond what was held then; None where it cannot be
    known.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        try:
            ctypes.CDLL(None).malloc_trim(
                0
            )  # give back what is free, or the pass would seem to need less
            RESET.write_text("5")  # Linux: forget the highest resident size so far
            self.before = _resident("VmRSS")
        except (OSError, AttributeError):
            self.before = None

    def read(self) -> int | None:
        """Bytes."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(0, _resident("VmHWM") - self.before)


def _resident(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def _summary(
    arm: Sequence, own: list[dict], first: list[dict], peak: int | None, given: Mapping
) -> Measurement:
    model, ids, _ = arm
    middle = {name: statistics.median(row[name] for row in own) for name in TIMES}
    ratio = {
        n: statistics.median(a[n] / b[n] for a, b in zip(own, first, strict=True)) for n in TIMES
    }
    low, _, high = (
        statistics.quantiles([row["first_token"] for row in own], n=4)
        if len(own) > 1
        else (0.0, 0.0, 0.0)
    )
    return Measurement(
        **{f"{name}_ms": 1000 * middle[name] for name in TIMES[:4]},
        first_token_spread_ms=1000 * (high - low),
        tokens_per_second=given["batch_size"] / middle["new_token"],
        peak_bytes=peak,
        **{
            f"{name}_ratio": ratio[name]
            for name in ("first_token", "language_prefill", "new_token")
        },
        num_prompt_tokens=ids.shape[1],
        **given,
        device=str(model.device),
        dtype=str(next(model.language_model.parameters()).dtype).removeprefix("torch."),
    )
