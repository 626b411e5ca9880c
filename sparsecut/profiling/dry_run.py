"""What a recipe will train, and what that takes: parameters, memory, steps, FLOPs and hours.

The model consists of fake tensors, so no weight is loaded. Figures that depend on absent data are
unknown, unless the published number of records stands in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..adapters import get_adapted_part
from ..config.recipe import Recipe, Stage
from ..config.shipped import find_deepspeed
from ..hooks import CHECKPOINTING, name_checkpointing
from ..schema import UserError, read_json_file
from ..training.arguments import DEFAULT_BATCH_SIZE, check_arguments, compute_accumulation_steps
from ..training.freezing import check_parts, count_parameters
from .dry_run_data import RecordFacts, RowFacts, RowSize, describe_row, read_record_facts
from .dry_run_model import EstimatedModel, count_trained, estimate_model
from .fake_models import (
    FakeScalarMode,
    build_fake_model,
    count_saved_bytes,
    create_flop_counter,
    get_module_flops,
    run_alike_layers_of_model_once,
    train_only,
)
from .local_processor import make_counter, read_local_processor
from .machine_rate import measure_rate

GIB = 2**30
ADAM_MOMENTS = 2  # in single precision, as weights and gradients are
DEFAULT_EPOCHS = 3  # transformers' default of num_train_epochs


@dataclass
class StageEstimate:
    """What one stage will train, and what that takes.

    Memory is in bytes for one device, at the stage's longest batch. For a base that takes images at
    their own sizes, flops_per_step and hours are None, and memory has no activations.

    Attributes:
        name: The stage's name.
        parameters: Parameters of the model by part.
        trained: Parameters that are trained, by the names in the stage's `train`.
        records: Records of the stage, None where unknown.
        records_said: Where that number comes from, for people.
        tokens_per_record: Mean tokens of a record; of packed records, those of a row divided by
            its records.
        image_tokens_per_record: Mean image tokens of a record, likewise.
        longest: Tokens of the longest row.
        records_per_step: Records of a step over all devices.
        steps: Optimizer steps, None where unknown.
        flops_per_step: FLOPs of a mean step over all devices.
        memory: Bytes by what takes them: weights, gradients, optimizer, activations.
        hours: Hours of the stage, None where unknown.
        notes: What was assumed.
        tflops: TFLOP/s of a device, given or measured.
        measured_on: The device that was measured, None where the rate was given.
    """

    name: str
    parameters: dict[str, int]
    trained: dict[str, int]
    records: int | None
    records_said: str  # the key in the command's JSON
    tokens_per_record: float
    image_tokens_per_record: float
    longest: int
    records_per_step: float
    steps: int | None
    flops_per_step: float | None
    memory: dict[str, float]
    hours: float | None = None
    notes: list[str] = field(default_factory=list)
    tflops: float | None = None
    measured_on: str | None = None

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a step over all devices, without padding."""
        return self.tokens_per_record * self.records_per_step


def dry_run(
    recipe: Recipe, *, devices: int = 1, tflops: float | None = 989.0, mfu: float = 0.4
) -> list[StageEstimate]:
    """Estimate every stage of a recipe.

    Args:
        recipe: The recipe.
        devices: Number of devices.
        tflops: TFLOP/s of a device; 989 is an H100 in bfloat16. None measures this machine.
        mfu: Fraction of them that training reaches.

    Raises:
        UserError: The recipe is impossible. It names an unknown part, has a stage that trains
            nothing or a plan that does not fit, or names a file that cannot be read.
    """
    if devices < 1 or (tflops is not None and not 0 < tflops < math.inf) or not 0 < mfu <= 1:
        raise UserError(
            f"devices is {devices}, tflops is {tflops} and mfu is {mfu}; devices must be at least"
            " 1, tflops above 0, and mfu above 0 and at most 1"
        )
    for stage in recipe.stages:
        check_arguments(stage)
    mode = FakeTensorMode()
    estimated = estimate_model(recipe, mode)
    processor = read_local_processor(recipe)
    models: dict[torch.dtype, nn.Module] = {}
    estimates = []
    for stage in recipe.stages:
        dtype = torch.bfloat16 if _uses_half_precision(stage) else torch.float32
        facts = read_record_facts(stage, make_counter(processor, stage))
        with mode:
            if estimated.config is not None and dtype not in models:
                models[dtype] = build_fake_model(estimated.config, dtype)
                run_alike_layers_of_model_once(models[dtype])
            estimate = _estimate_stage(
                recipe,
                stage,
                estimated,
                models.get(dtype),
                facts,
                devices=devices,
                dtype=dtype,
            )
        estimate.tflops = tflops
        if tflops is None and estimated.config is not None:
            width = estimated.config.text_config.get_text_config().hidden_size
            estimate.tflops, estimate.measured_on = measure_rate(width, dtype)
        if estimate.steps is not None and estimate.flops_per_step is not None:
            flops = estimate.steps * estimate.flops_per_step
            estimate.hours = flops / (devices * estimate.tflops * 1e12 * mfu) / 3600
        estimate.notes = estimated.notes + estimate.notes
        estimates.append(estimate)
    return estimates


def _uses_half_precision(stage: Stage) -> bool:
    return bool(stage.args.get("bf16") or stage.args.get("fp16"))


def _estimate_stage(
    recipe: Recipe,
    stage: Stage,
    estimated: EstimatedModel,
    model: nn.Module | None,
    facts: RecordFacts,
    *,
    devices: int,
    dtype: torch.dtype,
) -> StageEstimate:
    """Estimate one stage.

    Args:
        recipe: The recipe.
        stage: One of its stages.
        estimated: The recipe's model.
        model: The fake model whose FLOPs are counted, None where they cannot be.
        facts: What is known of the stage's records; notes are added.
        devices: Number of devices.
        dtype: The dtype that the stage computes in.
    """
    facts.images *= estimated.views_per_image
    if facts.max_images is not None:
        facts.max_images *= estimated.views_per_image
    row = describe_row(stage, facts, model.config.num_image_tokens if model is not None else 0)
    whole_model = model if estimated.upgraded is None else estimated.upgraded
    parameters, trained = _count_parameters(stage, estimated, whole_model)
    batch_size = stage.args.get("per_device_train_batch_size", DEFAULT_BATCH_SIZE)
    rows_per_step = batch_size * compute_accumulation_steps(stage, devices) * devices
    memory = _estimate_weights(recipe, stage, estimated, parameters, trained, devices)
    flops_per_step = None
    if model is not None:
        parts = _get_counted_parts(model, stage)
        flops_per_step = _count_row_flops(model, stage, row, parts, dtype) * rows_per_step
        memory["activations"] = _count_activations(
            model, stage, batch_size, row.longest, parts, dtype
        )
    notes = facts.notes
    if any(get_adapted_part(name) for name in stage.train):
        notes.append("FLOPs and activations of adapters are not counted; they are small")
    return StageEstimate(
        name=stage.name,
        parameters=parameters,
        trained=trained,
        records=facts.number,
        records_said=facts.origin,
        tokens_per_record=row.tokens / row.records,
        image_tokens_per_record=row.image_tokens / row.records,
        longest=row.longest.tokens,
        records_per_step=rows_per_step * row.records,
        steps=_count_steps(stage, facts.number, rows_per_step * row.records),
        flops_per_step=flops_per_step,
        memory=memory,
        notes=notes,
    )


def _count_parameters(
    stage: Stage, estimated: EstimatedModel, model: nn.Module
) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters by part, and trained parameters by the names in the stage's `train`."""
    check_parts(model, stage.train)
    if estimated.upgraded is not None:
        for name in ("pack", "pad_to"):
            value = getattr(stage, name)
            if value:
                raise UserError(
                    f"{name} is {value}, but an upgraded model's own processor makes its batches;"
                    f" remove {name}"
                )
    groups = model.parameter_groups()
    parameters = {name: count_parameters(group) for name, group in groups.items()}
    trained = {name: count_trained(model, name, stage) for name in stage.train}
    if not any(trained.values()):
        raise UserError(
            f"stage {stage.name} would train nothing: {', '.join(stage.train)} has no parameters in"
            " this model"
        )
    return parameters, trained


def _count_steps(stage: Stage, num_records: int | None, records_per_step: float) -> int | None:
    max_steps = stage.args.get("max_steps", -1)
    if max_steps > 0:
        return max_steps
    if num_records is None:
        return None
    epochs = stage.args.get("num_train_epochs", DEFAULT_EPOCHS)
    return math.ceil(num_records / records_per_step * epochs)


def _get_counted_parts(model: nn.Module, stage: Stage) -> list[str]:
    """Parts of the counted model that are trained.

    In place of a base's own projector it has one of the fusion's.
    """
    names = ["fusion" if name == "projector" else name for name in stage.train]
    parts = model.parameter_groups()
    return [name for name in dict.fromkeys(names) if name in parts]


def _count_row_flops(
    model: nn.Module, stage: Stage, row: RowFacts, parts: Sequence[str], dtype: torch.dtype
) -> float:
    """FLOPs of a mean row, forward and backward."""
    train_only(model, parts)
    flops = 0
    for fraction, size in row.kinds:
        if fraction:
            input_ids, pixels = _make_inputs(model, size, dtype)
            flops += fraction * _count_step_flops(model, input_ids, pixels, stage)
    return flops


def _make_inputs(model: nn.Module, size: RowSize, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (size.images, model.plan.num_views, *model.config.grid.view)
    pixels = torch.zeros(shape, dtype=dtype)
    return torch.zeros(1, max(size.tokens, 2), dtype=torch.long), pixels


def _count_step_flops(model: nn.Module, input_ids: Tensor, pixels: Tensor, stage: Stage) -> int:
    """FLOPs of one row; with checkpointing the decoder's layers run forward twice."""
    with FakeScalarMode(len(pixels) * model.config.num_image_tokens):
        with create_flop_counter() as forward:
            output = model(
                input_ids=input_ids,
                pixel_values=pixels if len(pixels) else None,
                labels=input_ids,
                use_cache=False,
            )
        with create_flop_counter(by_module=False) as backward:
            if output.loss.requires_grad:  # a text alone does not reach the fusion
                output.loss.backward()
    flops = forward.get_total_flops() + backward.get_total_flops()
    if name_checkpointing(stage.args).get(CHECKPOINTING):
        flops += get_module_flops(forward, model, "language_model")
    return flops


def _count_activations(
    model: nn.Module,
    stage: Stage,
    batch_size: int,
    longest: RowSize,
    parts: Sequence[str],
    dtype: torch.dtype,
) -> float:
    """Bytes kept for the backward pass of a micro-batch of the longest rows."""
    input_ids, pixels = _make_inputs(model, longest, dtype)
    length = input_ids.shape[1]
    mask = torch.ones(batch_size, length, dtype=torch.long)
    saved = count_saved_bytes(model, input_ids, pixels, mask, parts)
    if not name_checkpointing(stage.args).get(CHECKPOINTING):
        return float(saved)
    # The logits stay, in the model's dtype and, with their gradient, in single precision. Layers
    # are kept one at a time, with the input of each.
    text_config = model.config.text_config.get_text_config()
    num_layers = model.config.language_depth
    num_tokens = batch_size * length
    logits = num_tokens * text_config.vocab_size * (dtype.itemsize + 8)
    one_layer = max(saved - logits, 0) / num_layers
    layer_inputs = num_tokens * num_layers * text_config.hidden_size * dtype.itemsize
    return logits + one_layer + layer_inputs


def _estimate_weights(
    recipe: Recipe,
    stage: Stage,
    estimated: EstimatedModel,
    parameters: dict[str, int],
    trained: dict[str, int],
    devices: int,
) -> dict[str, float]:
    """Bytes on one device of weights, gradients and optimizer; what is sharded is divided.

    DeepSpeed keeps weights and gradients in half precision, and single precision with the moments
    (Rajbhandari et al. 2020, ZeRO).
    """
    num_trained = sum(trained.values())
    num_frozen = sum(number for name, number in parameters.items() if name != "head")
    if not any(get_adapted_part(name) for name in stage.train):
        num_frozen -= num_trained
    level = _get_sharding_level(stage)
    weight_devices = devices if level >= 3 else 1
    gradient_devices = devices if level >= 2 else 1
    moment_devices = devices if level >= 1 else 1
    if stage.args.get("deepspeed") and _uses_half_precision(stage):
        return {
            "weights": 2 * (num_frozen + num_trained) / weight_devices,
            "gradients": 2 * num_trained / gradient_devices,
            "optimizer": 4 * (1 + ADAM_MOMENTS) * num_trained / moment_devices,
        }
    frozen_size = 2 if _has_half_precision_base(recipe, stage, estimated) else 4
    return {
        "weights": (frozen_size * num_frozen + 4 * num_trained) / weight_devices,
        "gradients": 4 * num_trained / gradient_devices,
        "optimizer": 4 * ADAM_MOMENTS * num_trained / moment_devices,
    }


def _has_half_precision_base(recipe: Recipe, stage: Stage, estimated: EstimatedModel) -> bool:
    """Whether a pretrained VLM is loaded in half precision: it stays frozen in all stages."""
    is_new_upgrade = estimated.upgraded is not None and not estimated.is_saved
    stays_frozen = all(set(other.train) == {"fusion"} for other in recipe.stages)
    return is_new_upgrade and _uses_half_precision(stage) and stays_frozen


def _get_sharding_level(stage: Stage) -> int:
    """What is sharded: 0 nothing, 1 the optimizer's moments, 2 gradients too, 3 weights too."""
    fsdp = stage.args.get("fsdp")
    if fsdp:
        return 2 if "shard_grad_op" in str(fsdp) else 3
    config = stage.args.get("deepspeed") or {}
    if isinstance(config, str):
        config = _read_deepspeed_config(stage, config)
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _read_deepspeed_config(stage: Stage, text: str) -> dict:
    try:
        return read_json_file(find_deepspeed(text))
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def format_estimates(
    estimates: Sequence[StageEstimate], *, devices: int, tflops: float | None, mfu: float
) -> str:
    """Lay out estimates as lines of text, for the machine that `dry_run` was called with."""
    lines = []
    notes = []
    for estimate in estimates:
        lines.append(f"stage {estimate.name}")
        lines += _format_estimate(estimate, _describe_machine(estimate, devices, tflops, mfu))
        notes += [note for note in estimate.notes if note not in notes]
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)


def _describe_machine(
    estimate: StageEstimate, devices: int, tflops: float | None, mfu: float
) -> str:
    rate = tflops or estimate.tflops
    if estimate.hours is None or rate is None:
        return ""
    number = format(rate, ",.0f" if rate >= 100 else ".3g")
    kind = f" (this machine's {estimate.measured_on}, measured)" if tflops is None else ""
    return f" on {devices} x {number} TFLOP/s{kind}, of which training is taken to reach {mfu:.0%}"


def _format_estimate(estimate: StageEstimate, machine: str) -> list[str]:
    parts = {name: number for name, number in estimate.parameters.items() if name != "head"}
    total = sum(parts.values())
    percent = 100 * sum(estimate.trained.values()) / total
    memory = {name: value / GIB for name, value in estimate.memory.items()}
    memory_text = ", ".join(f"{name} {value:,.1f}" for name, value in memory.items())
    flops = estimate.flops_per_step
    rows = {
        "parameters": f"{_format_millions(parts)}; {total / 1e6:,.1f} M in all",
        "trained": f"{_format_millions(estimate.trained)} ({percent:.2f} %)",
        "records": (
            f"{_format_known(estimate.records, ',')} ({estimate.records_said}),"
            f" {estimate.tokens_per_record:,.0f} tokens each,"
            f" {estimate.image_tokens_per_record:,.0f} of them image tokens; the longest"
            f" {estimate.longest:,}"
        ),
        "a step": (
            f"{estimate.records_per_step:,.0f} records, {estimate.tokens_per_step:,.0f} tokens,"
            f" {_format_known(None if flops is None else flops / 1e12, ',.2f')} TFLOP;"
            f" {_format_known(estimate.steps, ',')} steps"
        ),
        "a device": f"{sum(memory.values()):,.1f} GiB: {memory_text}",
        "hours": f"{_format_known(estimate.hours, ',.2f')}{machine}",
    }
    return [f"  {heading:<12} {text}" for heading, text in rows.items()]


def _format_millions(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number / 1e6:,.1f} M" for name, number in numbers.items())


def _format_known(value: float | None, spec: str) -> str:
    return "unknown" if value is None else format(value, spec)


def to_json(estimates: Sequence[StageEstimate]) -> str:
    """The estimates as JSON: memory in bytes, work in FLOPs."""
    plain = [{**asdict(e), "tokens_per_step": e.tokens_per_step} for e in estimates]
    return json.dumps(plain, indent=2)
