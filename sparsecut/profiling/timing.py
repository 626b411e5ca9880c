"""What a plan costs on this machine: times and memory of prompts and new tokens, as medians."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..configuration import SparseCutConfig
from ..encoders import make_encoder
from ..hooks import CACHE, get_cache
from ..modeling import SparseCutForConditionalGeneration
from ..plan import Plan
from ..schema import UserError
from ..training.freezing import count_parameters
from .counting import check_minimum, format_plans
from .fake_models import build_config

# Linux's files about this process.
STATUS_FILE = Path("/proc/self/status")
CLEAR_FILE = Path("/proc/self/clear_refs")
PHASES = ("encoder", "fusion", "language_prefill", "first_token", "new_token")


@dataclass(frozen=True)
class Measurement:
    """Medians over `repeats` passes of `batch_size` prompts with one image each, after warm-up.

    A ratio is the median over the repeats of this model's time divided by the first model's time in
    the same round.

    Attributes:
        first_token_ms: From pixels and token ids on the device to the first token's number.
        first_token_spread_ms: Distance between its quartiles.
        encoder_ms: Its part in the encoder. On a GPU each part ends with a wait for the device, so
            that the sum is a little more than without measuring.
        fusion_ms: Its part in the fusion.
        language_prefill_ms: Its part in the language model.
        tokens_per_second: New tokens of the whole batch after the first one, greedily.
        peak_bytes: The most memory that the first pass holds beyond what was held before, weights
            included there. It is the allocator's on CUDA and the process's elsewhere, where memory
            left over from an earlier pass hides some of it. None where it cannot be known.
        first_token_ratio: Ratio of `first_token_ms`.
        language_prefill_ratio: Ratio of `language_prefill_ms`.
        new_token_ratio: Ratio of the time of one new token.
        num_prompt_tokens: Tokens of the prompt, image tokens included.
        num_new_tokens: New tokens of a pass.
        batch_size: Prompts of a pass.
        repeats: Passes that were measured.
        device: The device's name.
        dtype: The dtype of the language model's weights, such as "bfloat16".
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
        """Plain numbers and strings, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Prompt:
    """A model with the inputs that it is timed on.

    Attributes:
        model: The model.
        input_ids: Token ids on its device, [B, L], those of the image first.
        pixels: Pixels on its device, [B, views, 3, S, S].
    """

    model: nn.Module
    input_ids: Tensor
    pixels: Tensor


def measure(model, processor=None, **options) -> Measurement:
    """Time one model; the options are those of `measure_all`."""
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
    """Time models in one process.

    They take turns, and every round starts with another one, so that a slow minute is slow for all
    of them. Images and text are random.

    Args:
        models: (model, processor) by name. The processor may be None; it makes the pixels where
            there is one, and is not timed.
        num_new_tokens: New tokens of a pass, at least 2.
        num_text_tokens: Text tokens of the prompt.
        repeats: Passes that are measured.
        warmup: Passes before them, at least 1; the first measures memory.
        batch_size: Prompts of a pass.

    Returns:
        Measurements by name.

    Raises:
        UserError: If a number is too small, or there is no model.
    """
    check_minimum("num_new_tokens", num_new_tokens, 2)
    check_minimum("num_text_tokens", num_text_tokens, 1)
    check_minimum("repeats", repeats, 1)
    check_minimum("warmup", warmup, 1)
    check_minimum("batch_size", batch_size, 1)
    if not models:
        raise UserError("there is no model to measure; give at least one")
    prompts = {}
    for name, (model, processor) in models.items():
        prompts[name] = _make_prompt(model, processor, num_text_tokens, batch_size)
    was_training = {name: model.training for name, (model, _) in models.items()}
    try:
        times, peaks = _run_rounds(prompts, num_new_tokens, repeats=repeats, warmup=warmup)
    finally:
        for name, (model, _) in models.items():
            model.train(was_training[name])
    first_times = times[next(iter(times))]
    return {
        name: _summarize(prompt, times[name], first_times, peaks[name], num_new_tokens)
        for name, prompt in prompts.items()
    }


def _run_rounds(
    prompts: Mapping[str, _Prompt], num_new_tokens: int, *, repeats: int, warmup: int
) -> tuple[dict[str, list[dict[str, float]]], dict[str, int | None]]:
    """Seconds by phase of every measured pass, and the peak of memory, both by the model's name."""
    names = list(prompts)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    peaks: dict[str, int | None] = {}
    for turn in range(-warmup, repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            prompt = prompts[name]
            prompt.model.eval()
            memory = PeakMemory(prompt.model.device) if name not in peaks else None
            seconds = _time_pass(prompt, num_new_tokens)
            if memory is not None:
                peaks[name] = memory.read()
            if turn >= 0:
                times[name].append(seconds)
    return times, peaks


def random_models(
    vision_config,
    text_config,
    plans: Mapping[str, str | dict | Plan],
    *,
    device="cpu",
    dtype: torch.dtype | None = None,
    view_size: int | tuple[int, int] | None = None,
) -> dict[str, tuple]:
    """Build models with random weights that share their two backbones.

    Args:
        vision_config: The encoder's configuration.
        text_config: The language model's configuration.
        plans: Plans by name.
        device: The device.
        dtype: The dtype of all weights; by default float32 on a CPU and bfloat16 elsewhere.
        view_size: Pixels of a view, or (height, width); None for the encoder's own.

    Returns:
        (model, None) by name, as `measure_all` takes them.

    Raises:
        UserError: If the weights would not fit the device's memory; none is made before.
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    configs = {}
    for name, plan in plans.items():
        configs[name] = build_config(vision_config, text_config, plan, view_size)
    _check_memory(list(configs.values()), device, dtype)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return _build_models(configs, dtype)
    finally:
        torch.set_default_dtype(default_dtype)


def _build_models(configs: Mapping[str, SparseCutConfig], dtype: torch.dtype) -> dict[str, tuple]:
    first = next(iter(configs.values()))
    vision = make_encoder(first.vision_config, dtype)
    language = AutoModelForCausalLM.from_config(first.text_config, dtype=dtype)
    for module in (*vision.modules(), *language.modules()):
        module._is_hf_initialized = True  # or each model would initialize them again
    models = {}
    for name, config in configs.items():
        model = SparseCutForConditionalGeneration(
            config, vision_tower=vision, language_model=language
        )
        models[name] = (model.eval(), None)
    return models


def _check_memory(
    configs: Sequence[SparseCutConfig], device: torch.device, dtype: torch.dtype
) -> None:
    """Raise UserError unless the weights of models with shared backbones fit the device."""
    with torch.device("meta"):
        models = [SparseCutForConditionalGeneration(config) for config in configs]
    number = count_parameters(models[0].parameters())
    for model in models[1:]:
        number += count_parameters(model.fusion.parameters())
    needed = number * dtype.itemsize
    free = _count_free_bytes(device)
    if needed > 0.9 * free:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"the weights alone take {needed / 2**30:.1f} GiB in {name}, but {device} has"
            f" {free / 2**30:.1f} GiB free, of which nine tenths may be used; measure smaller"
            " models, fewer plans, or on a larger machine"
        )


def _count_free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def format_measurements(measured: Mapping[str, Measurement]) -> str:
    """Lay out measurements as a table, one plan a line; ratios are to the first plan."""
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
    first = next(iter(measured.values()))
    note = (
        f"measured on {first.device} in {first.dtype}: medians of {first.repeats} passes in turns,"
        f" batch {first.batch_size}; peak without weights"
    )
    return f"{format_plans(measured, columns)}\n{note}"


def _make_prompt(model, processor, num_text_tokens: int, batch_size: int) -> _Prompt:
    """Random inputs on the model's device."""
    config = model.config
    vocab_size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, vocab_size, (batch_size, num_text_tokens), generator=generator)
    text[text == config.image_token_id] = 0 if config.image_token_id else 1
    image = torch.full((batch_size, config.num_image_tokens), config.image_token_id)
    input_ids = torch.cat([image, text], dim=1).to(model.device)
    shape = (batch_size, model.plan.num_views, *config.grid.view)
    pixels = _make_pixels(processor, shape, generator)
    return _Prompt(model, input_ids, pixels.to(model.device, model.vision_tower.dtype))


def _make_pixels(processor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random pixels [B, views, 3, height, width], by the processor where there is one."""
    if processor is None:
        return torch.randn(shape, generator=generator)
    batch_size = shape[0]
    raw_shape = (batch_size, 2 * shape[-2], 2 * shape[-1], 3)
    raw = torch.randint(0, 256, raw_shape, generator=generator, dtype=torch.uint8)
    text = [processor.image_token] * batch_size
    inputs = processor(images=list(raw.numpy()), text=text, return_tensors="pt")
    return inputs["pixel_values"].view(shape)


@torch.no_grad()
def _time_pass(prompt: _Prompt, num_new_tokens: int) -> dict[str, float]:
    """Seconds by `PHASES` for a prompt and greedy tokens after it; new_token is one of them."""
    model = prompt.model
    marks: list[float] = []

    def mark(*_) -> None:
        if prompt.input_ids.device.type != "cpu":
            torch.accelerator.synchronize(prompt.input_ids.device)
        marks.append(time.perf_counter())

    hooks = [model.fusion.register_forward_pre_hook(mark), model.fusion.register_forward_hook(mark)]
    try:
        mark()
        ids = {"input_ids": prompt.input_ids}
        features = model.encode_for_prompts(ids, pixel_values=prompt.pixels)
        mark()
    finally:
        for hook in hooks:
            hook.remove()
    start, *fusion_marks, encoded = marks
    output = model(
        input_ids=prompt.input_ids,
        mm_encoder_outputs={"image": features},
        use_cache=True,
        logits_to_keep=1,
    )
    token = output.logits[:, -1:].argmax(-1)
    mark()
    for _ in range(num_new_tokens - 1):
        output = model(
            input_ids=token, **{CACHE: get_cache(output)}, use_cache=True, continued=True
        )
        token = output.logits[:, -1:].argmax(-1)
    mark()
    first_token, last_token = marks[-2:]
    fusion = sum(fusion_marks[1::2]) - sum(fusion_marks[::2])
    return {
        "encoder": encoded - start - fusion,
        "fusion": fusion,
        "language_prefill": first_token - encoded,
        "first_token": first_token - start,
        "new_token": (last_token - first_token) / (num_new_tokens - 1),
    }


class PeakMemory:
    """The most memory held since this was made, beyond what was held then."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        try:
            # Give free memory back, or the pass would seem to need less.
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR_FILE.write_text("5")  # Linux then forgets the highest resident size so far
            self.before = _read_resident_bytes("VmRSS")
        except (OSError, AttributeError):
            self.before = None

    def read(self) -> int | None:
        """Bytes, None where they cannot be known."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(0, _read_resident_bytes("VmHWM") - self.before)


def _read_resident_bytes(key: str) -> int:
    lines = STATUS_FILE.read_text().splitlines()
    line = next(line for line in lines if line.startswith(key))
    return 1024 * int(line.split()[1])


def _summarize(
    prompt: _Prompt,
    times: Sequence[Mapping[str, float]],
    first_times: Sequence[Mapping[str, float]],
    peak: int | None,
    num_new_tokens: int,
) -> Measurement:
    """Medians of a model's passes, and of the ratios to the first model's."""
    medians = {}
    ratios = {}
    for phase in PHASES:
        medians[phase] = statistics.median(seconds[phase] for seconds in times)
        pairs = zip(times, first_times, strict=True)
        ratios[phase] = statistics.median(seconds[phase] / first[phase] for seconds, first in pairs)
    spread = 0.0
    if len(times) > 1:
        quartiles = statistics.quantiles([seconds["first_token"] for seconds in times], n=4)
        spread = quartiles[2] - quartiles[0]
    batch_size, num_prompt_tokens = prompt.input_ids.shape
    dtype = next(prompt.model.language_model.parameters()).dtype
    return Measurement(
        first_token_ms=1000 * medians["first_token"],
        first_token_spread_ms=1000 * spread,
        encoder_ms=1000 * medians["encoder"],
        fusion_ms=1000 * medians["fusion"],
        language_prefill_ms=1000 * medians["language_prefill"],
        tokens_per_second=batch_size / medians["new_token"],
        peak_bytes=peak,
        first_token_ratio=ratios["first_token"],
        language_prefill_ratio=ratios["language_prefill"],
        new_token_ratio=ratios["new_token"],
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=num_new_tokens,
        batch_size=batch_size,
        repeats=len(times),
        device=str(prompt.model.device),
        dtype=str(dtype).removeprefix("torch."),
    )
