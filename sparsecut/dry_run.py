"""What a recipe will train, and what that takes, before any weight is loaded: parameters, memory, steps, operations, hours.

The model is built of pretended tensors, in seconds at any size. Models that recipes here name are counted by their published sizes, so
that no hub is asked; where data is absent, so are the figures that hang on it, or the published number of records stands in.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, LlamaConfig, SiglipVisionConfig
from transformers.pytorch_utils import Conv1D

from .adapters import adapted
from .cost import REFERENCE, Answers, backbone_config, configuration_of, counter, pretended, saved_bytes
from .parts import check_parts
from .recipe import Recipe, Stage
from .records import read_examples
from .yaml_text import expand_path

GIB = 2**30
TEXT_TOKENS = 64  # of a record beside its picture, where no data says otherwise
SAMPLE = 64  # records that are read to find out how long they are
ADAM = 2  # moments of the optimizer, in single precision as weights and gradients are
KNOWN = {  # sizes of models that recipes here name
    "openai/clip-vit-large-patch14-336": REFERENCE["vision"]["clip-l-336"],
    "lmsys/vicuna-7b-v1.5": REFERENCE["language"]["llama-7b"],
    "lmsys/vicuna-13b-v1.5": REFERENCE["language"]["llama-13b"],
    "google/siglip-base-patch16-256": SiglipVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=256,
        patch_size=16,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
}
BASES = {"llava-hf/llava-1.5-7b-hf": ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5")}
PUBLISHED = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298}  # records of LLaVA-1.5's files


@dataclass
class StagePlan:
    """One stage on paper; memory in bytes for one device, operations of one step over all devices."""

    name: str
    parameters: dict[str, int]
    trained: dict[str, int]
    records: int | None
    records_said: str
    tokens_per_record: int
    image_tokens_per_record: int
    records_per_step: int
    steps: int | None
    flops_per_step: int
    memory: dict[str, float]
    hours: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step over all devices, without padding."""
        return self.tokens_per_record * self.records_per_step


def dry_run(recipe: Recipe, *, devices: int = 1, tflops: float = 989.0, mfu: float = 0.4) -> list[StagePlan]:
    """A plan of every stage, for so many devices of so many TFLOP/s of which `mfu` is reached (989: an H100 in bf16).

    Raises ValueError for whatever of the recipe cannot be: parts that do not exist, a stage that trains nothing, a plan that does not fit.
    """
    if devices < 1 or tflops <= 0 or not 0 < mfu <= 1:
        raise ValueError(
            f"devices is {devices}, tflops {tflops} and mfu {mfu}, but needed are at least 1, above 0, and from 0 to 1"
        )
    notes: list[str] = []
    vision, language = _configurations(recipe, notes)
    plans, models, mode = [], {}, FakeTensorMode()
    config = configuration_of(vision, language, recipe.fusion if recipe.fusion is not None else "sparsecut")
    for stage in recipe.stages:
        dtype = torch.bfloat16 if stage.args.get("bf16") or stage.args.get("fp16") else torch.float32
        with mode:
            models[dtype] = models.get(dtype) or pretended(config, dtype)
            plan = _stage_plan(recipe, stage, models[dtype], devices, dtype)
        if plan.steps is not None:
            plan.hours = plan.steps * plan.flops_per_step / (devices * tflops * 1e12 * mfu) / 3600
        plan.notes = notes + plan.notes
        plans.append(plan)
    return plans


def _stage_plan(recipe: Recipe, stage: Stage, model, devices: int, dtype) -> StagePlan:
    config, notes, size = model.config, [], stage.args.get("per_device_train_batch_size", 8)
    num, said, length, pictures = _records(stage, config.num_image_tokens, notes)
    check_parts(model, tuple(p for p in stage.train if p != "projector"))
    parts = {name: sum(p.numel() for p in found) for name, found in model.parts().items()}
    trained = {name: _trained(model, name, stage) for name in stage.train if name != "projector"}
    model.requires_grad_(False)
    for name in stage.train:
        for parameter in model.parts().get(name, ()):
            parameter.requires_grad_(True)
    ids = torch.zeros(1, length, dtype=torch.long)
    pixels = torch.zeros(pictures, model.plan.num_views, *config.grid.view, dtype=dtype)
    flops = _step_flops(model, ids, pixels, stage)
    mask = torch.ones(size, length, dtype=torch.long)
    held = saved_bytes(model, ids, pixels, mask, [name for name in stage.train if name in parts])
    if any(map(adapted, stage.train)):
        notes.append("adapters' own operations and states between forward and backward are not counted; they are small")
    step = size * stage.args.get("gradient_accumulation_steps", 1) * devices
    steps = stage.args.get("max_steps", -1)
    if steps <= 0:
        steps = None if num is None else math.ceil(num / step * stage.args.get("num_train_epochs", 3))
    beside = any(adapted(name) for name in stage.train)
    resting = sum(v for k, v in parts.items() if k != "head") - (0 if beside else sum(trained.values()))
    half = (
        recipe.model.base is not None and dtype.itemsize == 2 and all(set(s.train) == {"fusion"} for s in recipe.stages)
    )
    frozen = resting * (2 if half else 4)  # an upgraded base that rests in all stages is loaded in half precision
    width, layers = config.text_config.get_text_config().hidden_size, config.language_depth
    if stage.args.get("activation_checkpointing"):
        # The logits stay, in the model's format and in single precision for the loss and its gradient; layers are kept one at a time.
        words = size * length * config.text_config.get_text_config().vocab_size * (dtype.itemsize + 8)
        held = words + max(held - words, 0) / layers + size * length * layers * width * dtype.itemsize
    return StagePlan(
        name=stage.name,
        parameters=parts,
        trained=trained,
        records=num,
        records_said=said,
        tokens_per_record=length,
        image_tokens_per_record=pictures * config.num_image_tokens,
        records_per_step=step,
        steps=steps,
        flops_per_step=flops * step,
        memory=_memory(stage, frozen, sum(trained.values()), held, devices),
        notes=notes,
    )


def _memory(stage: Stage, frozen: int, trained: int, held: float, devices: int) -> dict[str, float]:
    """Bytes on one device: weights (frozen: bytes of those that rest), gradients, moments, and what waits for the backward pass."""
    shared = devices if stage.args.get("fsdp") or stage.args.get("deepspeed") else 1
    learned = {"gradients": 4 * trained / shared, "optimizer": 4 * ADAM * trained / shared}
    return {"weights": (frozen + 4 * trained) / shared, **learned, "activations": float(held)}


def _step_flops(model: nn.Module, ids, pixels, stage: Stage) -> int:
    """Operations of one record, forward and backward; with checkpointing the decoder's layers run forward twice."""
    with Answers(len(pixels) * model.config.num_image_tokens):
        inputs = {"input_ids": ids, "pixel_values": pixels if len(pixels) else None, "labels": ids, "use_cache": False}
        with counter() as forward:
            loss = model(**inputs).loss
        with counter() as backward:
            loss.backward()
    language = sum(forward.get_flop_counts().get(f"{type(model).__name__}.language_model", {}).values())
    again = language if stage.args.get("activation_checkpointing") else 0
    return forward.get_total_flops() + backward.get_total_flops() + again


def _trained(model: nn.Module, name: str, stage: Stage) -> int:
    if (part := adapted(name)) is None:
        return sum(p.numel() for p in model.parts()[name])
    module, head = {"vision": model.vision_tower, "language": model.language_model}[part], model.get_output_embeddings()
    targets = stage.lora.targets
    linear = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    chosen = [m for n, m in linear.items() if targets == "all-linear" or n.rpartition(".")[2] in targets]
    return sum(stage.lora.r * sum(m.weight.shape) for m in chosen)


def _records(stage: Stage, num_image_tokens: int, notes: list[str]) -> tuple[int | None, str, int, int]:
    """(records, where that is known from, tokens and pictures of a record)."""
    total, said, seen = 0, [], []
    for source in stage.data:
        try:
            path = Path(expand_path(source.path))
            examples = read_examples(path, expand_path(source.images) if source.images else None, problems=[])
            seen += list(itertools.islice(examples, SAMPLE))
            total, said = total + len(examples), [*said, "read"]
        except ValueError as error:
            name = Path(source.path).name
            if name not in PUBLISHED:
                notes.append(f"no records of {source.path}: {error}")
                return None, "absent", num_image_tokens + TEXT_TOKENS, 1
            total, said = total + PUBLISHED[name], [*said, f"as published, {name} is not here"]
    words = [sum(len(m["content"].split()) for m in e.messages) for e in seen]
    text = round(1.5 * sum(words) / len(words)) if words else TEXT_TOKENS
    pictures = max(1, round(sum(len(e.images) for e in seen) / len(seen))) if seen else 1
    if words:
        notes.append(f"{text} text tokens a record: 1.5 for a word, of the first {len(seen)} records")
    length = min(text + pictures * num_image_tokens, stage.max_length or math.inf)
    return total, ", ".join(dict.fromkeys(said)), length, pictures


def _configurations(recipe: Recipe, notes: list[str]):
    """The configurations of encoder and language model, or sizes that are known of them."""
    if recipe.model.base is None:
        names = expand_path(recipe.model.vision), expand_path(recipe.model.language)
    elif (base := expand_path(recipe.model.base)) in BASES and not Path(base).is_dir():
        names = BASES[base]
        notes.append(f"{base} is counted as {' and '.join(names)}, joined by the recipe's plan")
    else:
        config = AutoConfig.from_pretrained(base)
        notes.append("a finished model is counted as its encoder and language model, joined by the recipe's plan")
        inner = getattr(config, "base_config", config)
        return inner.vision_config, inner.get_text_config()
    found = []
    for name, part in zip(names, ("vision", "language"), strict=True):
        if name in KNOWN and not Path(name).is_dir():
            notes.append(f"{name} is counted by its published sizes")
        found.append(KNOWN[name] if name in KNOWN and not Path(name).is_dir() else backbone_config(name, part))
    return found


def lines(plans: list[StagePlan], *, devices: int, tflops: float, mfu: float) -> list[str]:
    """The plans as lines of text."""
    out = []
    for plan in plans:
        total, trained = sum(v for k, v in plan.parameters.items() if k != "head"), sum(plan.trained.values())
        sizes = ", ".join(f"{name} {number / 1e6:,.1f} M" for name, number in plan.parameters.items() if name != "head")
        learns = ", ".join(f"{name} {number / 1e6:,.1f} M" for name, number in plan.trained.items())
        memory = ", ".join(f"{name} {value / GIB:,.1f}" for name, value in plan.memory.items())
        records = "unknown" if plan.records is None else f"{plan.records:,}"
        steps = "unknown" if plan.steps is None else f"{plan.steps:,}"
        hours = "unknown, as the number of records is" if plan.hours is None else f"{plan.hours:,.2f}"
        out += [
            f"stage {plan.name}",
            f"  parameters   {sizes}; {total / 1e6:,.1f} M in all",
            f"  trained      {learns} ({100 * trained / total:.2f} %)",
            f"  records      {records} ({plan.records_said}), {plan.tokens_per_record:,} tokens each, "
            f"{plan.image_tokens_per_record:,} of them of pictures",
            f"  a step       {plan.records_per_step:,} records, {plan.tokens_per_step:,} tokens, "
            f"{plan.flops_per_step / 1e12:,.2f} TFLOP; {steps} steps",
            f"  a device     {sum(plan.memory.values()) / GIB:,.1f} GiB: {memory}",
            f"  hours        {hours}, on {devices} x {tflops:,.0f} TFLOP/s of which {100 * mfu:.0f} % is reached",
        ]
    for note in dict.fromkeys(itertools.chain(*(plan.notes for plan in plans))):
        out.append(f"note: {note}")
    return out
