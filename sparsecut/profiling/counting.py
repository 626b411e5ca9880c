"""What a plan costs at a size: parameters, FLOPs and memory, counted without weights.

`fake_models` says how FLOPs are counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..configuration import SparseCutConfig
from ..drawing import text_table
from ..hooks import CACHE, get_cache, read_taps
from ..plan import Plan
from ..schema import UserError
from ..training.freezing import count_parameters
from .fake_models import (
    FakeScalarMode,
    build_config,
    build_fake_model,
    count_saved_bytes,
    create_flop_counter,
    encode_batch,
    get_module_flops,
    run_alike_layers_of_model_once,
)

UNITS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))


@dataclass(frozen=True)
class PlanCost:
    """What one prompt costs, and what one training step keeps in memory, under one plan.

    FLOPs are those of one prompt with all its images and its text, the head at the last position
    only, as `generate` runs it. Gates that look at hidden states run inside the language model and
    count there.

    The training figures are bytes that autograd keeps between forward and backward for `batch_size`
    such prompts, with a loss on every position. Weights, gradients and optimizer states are left
    out. There is no checkpointing, and a mask in every layer, as padded batches have. The step's
    peak is that or little more.

    Attributes:
        num_vision_parameters: Parameters of the vision encoder.
        num_fusion_parameters: Parameters of the shortcuts.
        num_language_parameters: Parameters of the language model, its head included.
        num_total_parameters: Parameters of all three.
        encoder_coarse_flops: FLOPs of reading all the plan's taps from the coarse views.
        encoder_fine_flops: FLOPs of the rest of the encoder.
        fusion_flops: FLOPs of the shortcuts.
        language_prefill_flops: FLOPs of the language model over the prompt.
        prefill_total_flops: FLOPs of the prompt in all.
        language_per_new_token_flops: FLOPs of one token after the prompt, with its cache.
        num_image_tokens: Tokens of all images.
        num_prompt_tokens: Tokens of the prompt, those of images included.
        kv_cache_bytes: Bytes of the key-value cache after the prompt.
        weight_bytes: Bytes of all parameters in `dtype`.
        training_fusion_bytes: Bytes that a step keeps where the fusion alone is trained; None
            where training was not counted.
        training_fusion_language_bytes: Bytes where fusion and language model are trained, likewise.
        batch_size: Prompts of the training step.
        dtype: The dtype of weights and activations, such as "bfloat16".
    """

    num_vision_parameters: int
    num_fusion_parameters: int
    num_language_parameters: int
    num_total_parameters: int
    encoder_coarse_flops: int
    encoder_fine_flops: int
    fusion_flops: int
    language_prefill_flops: int
    prefill_total_flops: int
    language_per_new_token_flops: int
    num_image_tokens: int
    num_prompt_tokens: int
    kv_cache_bytes: int
    weight_bytes: int
    training_fusion_bytes: int | None
    training_fusion_language_bytes: int | None
    batch_size: int
    dtype: str

    def to_dict(self) -> dict:
        """Plain numbers and a string, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping) -> PlanCost:
        """Read what `to_dict` wrote.

        Raises:
            UserError: If a key is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        differing = sorted(names ^ set(plain))
        if differing:
            raise UserError(
                f"a count has {len(names)} keys, but these are missing or unknown:"
                f" {', '.join(differing)}; count again"
            )
        return cls(**plain)


class PlanCounter:
    """Counts plans for one encoder and one language model.

    Both are built once, and a layer that ran under one plan does not run again under another.

    Args:
        vision_config: The encoder's configuration.
        text_config: The language model's configuration. Neither is changed.
        dtype: The dtype of weights and activations.
        view_size: Pixels of a view, or (height, width); None for the encoder's own.
        whole: Run every layer, although layers that are alike count the same. It is slow, and for
            tests.
    """

    def __init__(
        self,
        vision_config,
        text_config,
        *,
        dtype: torch.dtype = torch.bfloat16,
        view_size: int | tuple[int, int] | None = None,
        whole: bool = False,
    ):
        self.configs = vision_config, text_config
        self.dtype = dtype
        self.view_size = view_size
        self.whole = whole
        self._mode = FakeTensorMode()
        self._backbones: tuple[nn.Module, ...] = ()

    def count(
        self,
        plan: str | dict | Plan,
        *,
        num_text_tokens: int = 64,
        num_images: int = 1,
        batch_size: int = 1,
        training: bool = True,
    ) -> PlanCost:
        """Count what a prompt and a training step cost under a plan.

        Args:
            plan: A method's name, a method with options, or a plan.
            num_text_tokens: Text tokens of the prompt, at least 1.
            num_images: Images of the prompt; there may be none.
            batch_size: Prompts of the training step, at least 1.
            training: Also count a training step, which takes as long as all else.

        Raises:
            UserError: If plan and models do not fit, or a number is too small.
        """
        check_minimum("num_text_tokens", num_text_tokens, 1)
        check_minimum("num_images", num_images, 0)
        check_minimum("batch_size", batch_size, 1)
        config = build_config(*self.configs, plan, self.view_size)
        num_image_tokens = num_images * config.num_image_tokens
        num_tokens = num_image_tokens + num_text_tokens
        with self._mode:
            model = self._build_model(config)
            input_ids = torch.zeros(1, num_tokens, dtype=torch.long)
            shape = num_images, model.plan.num_views, *config.grid.view
            pixels = torch.zeros(shape, dtype=self.dtype)
            flops, cache_bytes = _count_prompt(model, input_ids, pixels, num_image_tokens)
            saved = None, None
            if training:
                saved = _count_training_bytes(model, input_ids, pixels, batch_size)
        return PlanCost(
            **_count_weights(model),
            **flops,
            num_image_tokens=num_image_tokens,
            num_prompt_tokens=num_tokens,
            kv_cache_bytes=cache_bytes,
            training_fusion_bytes=saved[0],
            training_fusion_language_bytes=saved[1],
            batch_size=batch_size,
            dtype=str(self.dtype).removeprefix("torch."),
        )

    def _build_model(self, config: SparseCutConfig) -> nn.Module:
        model = build_fake_model(config, self.dtype, *self._backbones)
        if not self._backbones:
            self._backbones = model.vision_tower, model.language_model
            if not self.whole:
                run_alike_layers_of_model_once(model)
        return model


def count_plan(
    vision_config,
    text_config,
    plan: str | dict | Plan,
    *,
    dtype: torch.dtype = torch.bfloat16,
    view_size: int | tuple[int, int] | None = None,
    whole: bool = False,
    **prompt: int,
) -> PlanCost:
    """Count what a prompt and a training step cost under one plan.

    Args:
        vision_config: The arguments are those of `PlanCounter`, which is quicker for several plans.
        text_config: As above.
        plan: A method's name, a method with options, or a plan.
        dtype: As above.
        view_size: As above.
        whole: As above.
        **prompt: As `PlanCounter.count` takes it.

    Raises:
        UserError: If plan and models do not fit, or a number is too small.
    """
    settings = {"dtype": dtype, "view_size": view_size, "whole": whole}
    return PlanCounter(vision_config, text_config, **settings).count(plan, **prompt)


def _count_training_bytes(
    model: nn.Module, input_ids: Tensor, pixels: Tensor, batch_size: int
) -> tuple[int, int]:
    """Bytes that a step keeps, where the fusion alone is trained and with the language model."""
    mask = torch.ones(batch_size, input_ids.shape[1], dtype=torch.long)
    states = encode_batch(model, pixels, batch_size)
    batch = model, input_ids, pixels, mask
    fusion_bytes = count_saved_bytes(*batch, ["fusion"], states)
    return fusion_bytes, count_saved_bytes(*batch, ["fusion", "language"], states)


def _count_weights(model: nn.Module) -> dict[str, int]:
    """Parameters by part, and bytes of all."""
    groups = model.parameter_groups()
    groups = {part: groups[part] for part in ("vision", "fusion", "language")}
    numbers = {f"num_{part}_parameters": count_parameters(groups[part]) for part in groups}
    numbers["num_total_parameters"] = sum(numbers.values())
    weights = itertools.chain(*groups.values())
    return numbers | {"weight_bytes": sum(p.numel() * p.element_size() for p in weights)}


def _count_prompt(
    model: nn.Module, input_ids: Tensor, pixels: Tensor, num_image_tokens: int
) -> tuple[dict[str, int], int]:
    """FLOPs by part, and the bytes of the cache after the prompt."""
    images = pixels if len(pixels) else None
    has_fine_views = model.plan.num_views > 1
    with torch.no_grad(), FakeScalarMode(num_image_tokens):
        with create_flop_counter() as prompt:
            output = model(
                input_ids=input_ids,
                pixel_values=images,
                prompt_mask=torch.ones_like(input_ids),
                use_cache=True,
                logits_to_keep=1,
            )
        cache_bytes = count_cache_bytes(get_cache(output))
        with create_flop_counter(by_module=False) as new_token:
            model(
                input_ids=input_ids[:, :1],
                **{CACHE: get_cache(output)},
                use_cache=True,
                continued=True,
            )
        with create_flop_counter(by_module=False) as coarse:
            if images is not None and has_fine_views:
                taps = model.plan.resolved_taps(model.config.vision_depth)
                read_taps(model.vision_tower, pixels[:, 0], model.config.grid, taps)
    total = prompt.get_total_flops()
    encoder = get_module_flops(prompt, model, "vision_tower")
    language = get_module_flops(prompt, model, "language_model")
    encoder_coarse = coarse.get_total_flops() if has_fine_views else encoder
    flops = {
        "encoder_coarse_flops": encoder_coarse,
        "encoder_fine_flops": encoder - encoder_coarse,
        "fusion_flops": total - encoder - language,
        "language_prefill_flops": language,
        "prefill_total_flops": total,
        "language_per_new_token_flops": new_token.get_total_flops(),
    }
    return flops, cache_bytes


def count_cache_bytes(cache) -> int:
    """Bytes of all tensors of a key-value cache."""
    num_bytes = 0
    for layer in getattr(cache, "layers", None) or [cache]:
        for value in vars(layer).values():
            if isinstance(value, Tensor):
                num_bytes += value.numel() * value.element_size()
    return num_bytes


def check_minimum(name: str, value, minimum: int) -> None:
    """Raise UserError unless a value is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{name} is {value!r}, but must be a whole number of at least {minimum}")


def format_costs(costs: Mapping[str, PlanCost]) -> str:
    """Lay out costs as a table, one plan a line.

    Args:
        costs: Costs by the plan's name. The relative column compares with the first one.

    Raises:
        UserError: If there is none.
    """
    if not costs:
        raise UserError("there is no plan to show the cost of; name at least one")
    first_name, first = next(iter(costs.items()))
    units = (u for u in UNITS if first.prefill_total_flops >= u[1] / 10)
    unit, size = next(units, UNITS[-1])

    def encoder_flops(cost: PlanCost) -> int:
        return cost.encoder_coarse_flops + cost.encoder_fine_flops

    def relative(cost: PlanCost) -> float:
        return cost.prefill_total_flops / first.prefill_total_flops

    columns: dict[str, Callable[[PlanCost], str]] = {
        "image tokens": lambda cost: f"{cost.num_image_tokens}",
        "fusion M": lambda cost: f"{cost.num_fusion_parameters / 1e6:.2f}",
        f"encoder {unit}": lambda cost: f"{encoder_flops(cost) / size:.3f}",
        f"fusion {unit}": lambda cost: f"{cost.fusion_flops / size:.3f}",
        f"language {unit}": lambda cost: f"{cost.language_prefill_flops / size:.3f}",
        f"total {unit}": lambda cost: f"{cost.prefill_total_flops / size:.3f}",
        "relative": lambda cost: f"{relative(cost):.3f}",
        "KV MiB": lambda cost: f"{cost.kv_cache_bytes / 2**20:.1f}",
        "GFLOP a new token": lambda cost: f"{cost.language_per_new_token_flops / 1e9:.3f}",
    }
    num_text_tokens = first.num_prompt_tokens - first.num_image_tokens
    note = (
        f"relative: total prefill FLOPs over those of {first_name}; fusion M: million parameters;"
        f" {num_text_tokens} text tokens, {first.dtype}; attention is counted in full"
    )
    return f"{format_plans(costs, columns)}\n{note}"


def format_plans(plans: Mapping[str, object], columns: Mapping[str, Callable]) -> str:
    """Lay out plans as a table.

    Args:
        plans: What is known of a plan, by the plan's name.
        columns: Functions that make a cell of it, by the column's heading.
    """
    rows = [["plan", *columns]]
    for name, plan in plans.items():
        rows.append([name, *(make_cell(plan) for make_cell in columns.values())])
    return text_table(rows, separator=" | ")
