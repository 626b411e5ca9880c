"""What a recipe will train, and what that takes, before any weight is loaded: parameters, memory,
steps, operations, hours.

The model is built of pretended tensors, in seconds at any size. Where data is absent, so are the figures that hang on it, or the published
number of records stands in.
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

from ..adapters import get_adapted_part
from ..config.recipe import Recipe, Stage
from ..config.yaml_io import expand_path
from ..schema import UserError
from ..training.arguments import compute_accumulation_steps
from ..training.freezing import check_parts
from .counting import FakeScalarMode, build_fake_model, counter, saved_bytes
from .dry_run_data import Item, item_of, records_of
from .dry_run_model import EstimatedModel, on_paper, trained_number

GIB = 2**30
ADAM = 2  # moments of the optimizer, in single precision as weights and gradients are


@dataclass
class StagePlan:
    """One stage on paper; memory in bytes for one device at its longest batch, operations of a mean
    step over all devices.

    tokens_per_record, image_tokens_per_record: in the mean; of packed records, those of a row
    divided by the records in it. Of a finished model that takes pictures at sizes of their own,
    flops_per_step and hours are None, and memory has no activations.
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
    flops_per_step: float | None
    memory: dict[str, float]
    hours: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a step over all devices, without padding."""
        return self.tokens_per_record * self.records_per_step


def dry_run(
    recipe: Recipe, *, devices: int = 1, tflops: float = 989.0, mfu: float = 0.4
) -> list[StagePlan]:
    """A plan of every stage, for so many devices of so many TFLOP/s of which `mfu` is reached (989:
    an H100 in bf16).

    Raises ValueError for whatever of the recipe cannot be: parts that do not exist, a stage that
    trains nothing, a plan that does not fit.
    """
    if devices < 1 or tflops <= 0 or not 0 < mfu <= 1:
        raise UserError(
            f"devices is {devices}, tflops {tflops} and mfu {mfu}, but needed are at least 1, above"
            " 0, and from 0 to 1"
        )
    mode = FakeTensorMode()
    paper, plans, models = on_paper(recipe, mode), [], {}
    for stage in recipe.stages:
        dtype = (
            torch.bfloat16 if stage.args.get("bf16") or stage.args.get("fp16") else torch.float32
        )
        with mode:
            if paper.config is not None and dtype not in models:
                models[dtype] = build_fake_model(paper.config, dtype)
            plan = _stage_plan(recipe, stage, paper, models.get(dtype), devices, dtype)
        if plan.steps is not None and plan.flops_per_step is not None:
            plan.hours = plan.steps * plan.flops_per_step / (devices * tflops * 1e12 * mfu) / 3600
        plan.notes = paper.notes + plan.notes
        plans.append(plan)
    return plans


def _stage_plan(
    recipe: Recipe, stage: Stage, paper: EstimatedModel, model, devices: int, dtype
) -> StagePlan:
    """The stage on paper; model: the one whose operations are counted, or None."""
    size, found = stage.args.get("per_device_train_batch_size", 8), records_of(stage)
    item, whole = (
        item_of(stage, found, model.config.num_image_tokens if model else 0),
        paper.upgraded or model,
    )
    check_parts(whole, stage.train)
    if paper.upgraded is not None and (
        own := [name for name in ("pack", "pad_to") if getattr(stage, name)]
    ):
        raise UserError(
            f"{own[0]} is {getattr(stage, own[0])}, but a finished model makes its batches in its"
            f" own way; remove {own[0]}"
        )
    parts = {
        name: sum(p.numel() for p in numbers) for name, numbers in whole.parameter_groups().items()
    }
    trained = {name: trained_number(whole, name, stage) for name in stage.train}
    if not any(trained.values()):
        raise UserError(
            f"stage {stage.name} would train nothing: {', '.join(stage.train)} have no parameter in"
            " this model"
        )
    flops = held = None
    if model is not None:
        flops, held = _counted(model, stage, item, size, dtype)
    if any(map(get_adapted_part, stage.train)):
        found.notes.append(
            "adapters' own operations and states between forward and backward are not counted; they"
            " are small"
        )
    rows = size * compute_accumulation_steps(stage, devices) * devices
    steps = stage.args.get("max_steps", -1)
    if steps <= 0:
        epochs = stage.args.get("num_train_epochs", 3)
        steps = (
            None
            if found.number is None
            else math.ceil(found.number / (rows * item.records) * epochs)
        )
    beside = any(get_adapted_part(name) for name in stage.train)
    resting = sum(v for k, v in parts.items() if k != "head") - (
        0 if beside else sum(trained.values())
    )
    fresh = paper.upgraded is not None and not paper.saved and dtype.itemsize == 2
    half = fresh and all(
        set(one.train) == {"fusion"} for one in recipe.stages
    )  # it rests in all stages
    memory = _weights(stage, resting, sum(trained.values()), devices, half=half)
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
        flops_per_step=None if flops is None else flops * rows,
        memory=memory if held is None else {**memory, "activations": held},
        notes=found.notes,
    )


def _counted(model, stage: Stage, item: Item, size: int, dtype) -> tuple[float, float]:
    """Operations of a row, and bytes that a micro-batch keeps for the backward pass."""
    # A finished model's own projector has a projector of the fusion in its place.
    learns = ["fusion" if name == "projector" else name for name in stage.train]
    learns = [name for name in dict.fromkeys(learns) if name in model.parameter_groups()]
    model.requires_grad_(False)
    for parameter in (p for name in learns for p in model.parameter_groups()[name]):
        parameter.requires_grad_(True)
    flops = sum(
        share * _step_flops(model, *_inputs(model, *of, dtype), stage)
        for share, of in item.kinds
        if share
    )
    return flops, _activations(model, stage, size, item.longest, learns, dtype)


def _inputs(model, length: int, pictures: int, dtype) -> tuple:
    pixels = torch.zeros(pictures, model.plan.num_views, *model.config.grid.view, dtype=dtype)
    return torch.zeros(1, max(length, 2), dtype=torch.long), pixels


def _activations(
    model, stage: Stage, size: int, longest: tuple[int, int], learns: list[str], dtype
) -> float:
    """Bytes that wait for the backward pass of a micro-batch of the longest records."""
    ids, pixels = _inputs(model, *longest, dtype)
    length = ids.shape[1]
    held = saved_bytes(model, ids, pixels, torch.ones(size, length, dtype=torch.long), learns)
    if not stage.args.get("activation_checkpointing"):
        return float(held)
    # The logits stay, in the model's format and in single precision for the loss and its gradient;
    # layers are kept one at a time.
    text, layers = model.config.text_config.get_text_config(), model.config.language_depth
    words = size * length * text.vocab_size * (dtype.itemsize + 8)
    return (
        words
        + max(held - words, 0) / layers
        + size * length * layers * text.hidden_size * dtype.itemsize
    )


def _weights(
    stage: Stage, resting: int, trained: int, devices: int, *, half: bool
) -> dict[str, float]:
    """Bytes on one device of weights, gradients and moments; what each engine shares out among
    devices is divided.

    DeepSpeed keeps weights and gradients in half precision, and single precision with the moments
    (Rajbhandari et al. 2020, ZeRO).
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
            raise UserError(
                f"stage {stage.name}: args.deepspeed names {path}, which is not there; correct the"
                " path"
            )
        given = json.loads(path.read_text(encoding="utf-8"))
    return int((given or {}).get("zero_optimization", {}).get("stage", 0))


def _step_flops(model: nn.Module, ids, pixels, stage: Stage) -> int:
    """Operations of one record, forward and backward; with checkpointing the decoder's layers run
    forward twice.
    """
    with FakeScalarMode(len(pixels) * model.config.num_image_tokens):
        inputs = {
            "input_ids": ids,
            "pixel_values": pixels if len(pixels) else None,
            "labels": ids,
            "use_cache": False,
        }
        with counter() as forward:
            loss = model(**inputs).loss
        with counter() as backward:
            if loss.requires_grad:  # a text says nothing to the fusion
                loss.backward()
    language = sum(
        forward.get_flop_counts().get(f"{type(model).__name__}.language_model", {}).values()
    )
    again = language if stage.args.get("activation_checkpointing") else 0
    return forward.get_total_flops() + backward.get_total_flops() + again


def lines(plans: list[StagePlan], *, devices: int, tflops: float, mfu: float) -> list[str]:
    """The plans as lines of text."""
    out = []
    for plan in plans:
        total, trained = (
            sum(v for k, v in plan.parameters.items() if k != "head"),
            sum(plan.trained.values()),
        )
        sizes = ", ".join(
            f"{name} {number / 1e6:,.1f} M"
            for name, number in plan.parameters.items()
            if name != "head"
        )
        learns = ", ".join(f"{name} {number / 1e6:,.1f} M" for name, number in plan.trained.items())
        memory = ", ".join(f"{name} {value / GIB:,.1f}" for name, value in plan.memory.items())
        records = "unknown" if plan.records is None else f"{plan.records:,}"
        steps = "unknown" if plan.steps is None else f"{plan.steps:,}"
        work = "unknown" if plan.flops_per_step is None else f"{plan.flops_per_step / 1e12:,.2f}"
        hours = "unknown, as what they hang on is" if plan.hours is None else f"{plan.hours:,.2f}"
        out += [
            f"stage {plan.name}",
            f"  parameters   {sizes}; {total / 1e6:,.1f} M in all",
            f"  trained      {learns} ({100 * trained / total:.2f} %)",
            (
                f"  records      {records} ({plan.records_said}), {plan.tokens_per_record:,.0f}"
                f" tokens each, {plan.image_tokens_per_record:,.0f} of them of pictures; the"
                f" longest {plan.longest:,}"
            ),
            (
                f"  a step       {plan.records_per_step:,.0f} records, {plan.tokens_per_step:,.0f}"
                f" tokens, {work} TFLOP; {steps} steps"
            ),
            f"  a device     {sum(plan.memory.values()) / GIB:,.1f} GiB: {memory}",
            (
                f"  hours        {hours}, on {devices} x {tflops:,.0f} TFLOP/s of which"
                f" {100 * mfu:.0f} % is reached"
            ),
        ]
    for note in dict.fromkeys(itertools.chain(*(plan.notes for plan in plans))):
        out.append(f"note: {note}")
    return out


def as_json(plans: list[StagePlan]) -> str:
    """The plans as JSON: memory in bytes, operations in FLOPs."""
    return json.dumps(
        [{**asdict(plan), "tokens_per_step": plan.tokens_per_step} for plan in plans], indent=2
    )
