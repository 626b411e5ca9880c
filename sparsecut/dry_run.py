"""What a recipe will train, and what that takes, before any weight is loaded: parameters, memory, steps, operations, hours.

The model is built of pretended tensors, in seconds at any size. Models that recipes here name are counted by their published sizes, so
that no hub is asked; where data is absent, so are the figures that hang on it, or the published number of records stands in.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, LlamaConfig, SiglipVisionConfig
from transformers.pytorch_utils import Conv1D

from .adapters import adapted
from .arguments import accumulation
from .cost import REFERENCE, Answers, backbone_config, configuration_of, counter, pretended, saved_bytes
from .dry_data import item_of, records_of
from .parts import check_parts
from .recipe import Recipe, Stage
from .yaml_text import expand_path

GIB = 2**30
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


@dataclass
class StagePlan:
    """One stage on paper; memory in bytes for one device at its longest batch, operations of a mean step over all devices.

    tokens_per_record, image_tokens_per_record: in the mean; of packed records, those of a row divided by the records in it.
    """

    name: str
    parameters: dict[str, int]
    trained: dict[str, int]
    records: int | None
    records_said: str
    tokens_per_record: float
    image_tokens_per_record: float
    longest: int
    records_per_step: float
    steps: int | None
    flops_per_step: float
    memory: dict[str, float]
    hours: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
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
    size, found = stage.args.get("per_device_train_batch_size", 8), records_of(stage)
    item = item_of(stage, found, model.config.num_image_tokens)
    check_parts(model, tuple(p for p in stage.train if p != "projector"))
    parts = {name: sum(p.numel() for p in found) for name, found in model.parts().items()}
    trained = {name: _trained(model, name, stage) for name in stage.train if name != "projector"}
    model.requires_grad_(False)
    for name in stage.train:
        for parameter in model.parts().get(name, ()):
            parameter.requires_grad_(True)
    flops = sum(share * _step_flops(model, *_inputs(model, *of, dtype), stage) for share, of in item.kinds if share)
    if any(map(adapted, stage.train)):
        found.notes.append(
            "adapters' own operations and states between forward and backward are not counted; they are small"
        )
    rows = size * accumulation(stage, devices) * devices
    steps = stage.args.get("max_steps", -1)
    if steps <= 0:
        epochs = stage.args.get("num_train_epochs", 3)
        steps = None if found.number is None else math.ceil(found.number / (rows * item.records) * epochs)
    beside = any(adapted(name) for name in stage.train)
    resting = sum(v for k, v in parts.items() if k != "head") - (0 if beside else sum(trained.values()))
    base = recipe.model.base is not None and dtype.itemsize == 2
    half = base and all(set(one.train) == {"fusion"} for one in recipe.stages)  # it rests in all stages
    return StagePlan(
        name=stage.name,
        parameters=parts,
        trained=trained,
        records=found.number,
        records_said=found.said,
        tokens_per_record=item.tokens / item.records,
        image_tokens_per_record=item.image_tokens / item.records,
        longest=item.longest[0],
        records_per_step=rows * item.records,
        steps=steps,
        flops_per_step=flops * rows,
        memory={
            **_weights(stage, resting, sum(trained.values()), devices, half=half),
            "activations": _activations(model, stage, size, item.longest, dtype),
        },
        notes=found.notes,
    )


def _inputs(model, length: int, pictures: int, dtype) -> tuple:
    pixels = torch.zeros(pictures, model.plan.num_views, *model.config.grid.view, dtype=dtype)
    return torch.zeros(1, max(length, 2), dtype=torch.long), pixels


def _activations(model, stage: Stage, size: int, longest: tuple[int, int], dtype) -> float:
    """Bytes that wait for the backward pass of a micro-batch of the longest records."""
    ids, pixels = _inputs(model, *longest, dtype)
    length = ids.shape[1]
    names = [name for name in stage.train if name in model.parts()]
    held = saved_bytes(model, ids, pixels, torch.ones(size, length, dtype=torch.long), names)
    if not stage.args.get("activation_checkpointing"):
        return float(held)
    # The logits stay, in the model's format and in single precision for the loss and its gradient; layers are kept one at a time.
    text, layers = model.config.text_config.get_text_config(), model.config.language_depth
    words = size * length * text.vocab_size * (dtype.itemsize + 8)
    return words + max(held - words, 0) / layers + size * length * layers * text.hidden_size * dtype.itemsize


def _weights(stage: Stage, resting: int, trained: int, devices: int, *, half: bool) -> dict[str, float]:
    """Bytes on one device of weights, gradients and moments; what each engine shares out among devices is divided.

    DeepSpeed keeps weights and gradients in half precision, and single precision with the moments (Rajbhandari et al. 2020, ZeRO).
    """
    level = _zero_stage(stage)
    weights, gradients, moments = (devices if level >= least else 1 for least in (3, 2, 1))
    if stage.args.get("deepspeed") and (stage.args.get("bf16") or stage.args.get("fp16")):
        return {
            "weights": 2 * (resting + trained) / weights,
            "gradients": 2 * trained / gradients,
            "optimizer": 4 * (1 + ADAM) * trained / moments,
        }
    return {
        "weights": ((2 if half else 4) * resting + 4 * trained) / weights,
        "gradients": 4 * trained / gradients,
        "optimizer": 4 * ADAM * trained / moments,
    }


def _zero_stage(stage: Stage) -> int:
    """What is shared out: 0 nothing, 1 the optimizer's moments, 2 gradients too, 3 weights too."""
    if given := stage.args.get("fsdp"):
        return 2 if "shard_grad_op" in str(given) else 3
    given = stage.args.get("deepspeed")
    if isinstance(given, str):
        path = Path(expand_path(given))
        if not path.is_file():
            raise ValueError(f"stage {stage.name}: args.deepspeed names {path}, which is not there; correct the path")
        given = json.loads(path.read_text(encoding="utf-8"))
    return int((given or {}).get("zero_optimization", {}).get("stage", 0))


def _step_flops(model: nn.Module, ids, pixels, stage: Stage) -> int:
    """Operations of one record, forward and backward; with checkpointing the decoder's layers run forward twice."""
    with Answers(len(pixels) * model.config.num_image_tokens):
        inputs = {"input_ids": ids, "pixel_values": pixels if len(pixels) else None, "labels": ids, "use_cache": False}
        with counter() as forward:
            loss = model(**inputs).loss
        with counter() as backward:
            if loss.requires_grad:  # a text says nothing to the fusion
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
            f"  records      {records} ({plan.records_said}), {plan.tokens_per_record:,.0f} tokens each, "
            f"{plan.image_tokens_per_record:,.0f} of them of pictures; the longest {plan.longest:,}",
            f"  a step       {plan.records_per_step:,.0f} records, {plan.tokens_per_step:,.0f} tokens, "
            f"{plan.flops_per_step / 1e12:,.2f} TFLOP; {steps} steps",
            f"  a device     {sum(plan.memory.values()) / GIB:,.1f} GiB: {memory}",
            f"  hours        {hours}, on {devices} x {tflops:,.0f} TFLOP/s of which {100 * mfu:.0f} % is reached",
        ]
    for note in dict.fromkeys(itertools.chain(*(plan.notes for plan in plans))):
        out.append(f"note: {note}")
    return out


def as_json(plans: list[StagePlan]) -> str:
    """The plans as JSON: memory in bytes, operations in FLOPs."""
    return json.dumps([{**asdict(plan), "tokens_per_step": plan.tokens_per_step} for plan in plans], indent=2)
