"""What a plan costs, counted on paper: the real model run on pretended tensors, without weights, at
any size in seconds.

Conventions. A multiplication with its addition is two floating-point operations; only matrix products, convolutions and
attention are counted (norms, activations and sums are about a hundredth of them). Attention counts every pair of positions, as
kernels without a shortcut for causal masks do; halving it where later positions are masked would take 2 n^2 width layers off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, SiglipVisionConfig
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

from ..building import OLD_SHAPES, SHAPES, resolve
from ..configuration import SparseCutConfig
from ..hooks import read_taps
from ..modeling import SparseCutForConditionalGeneration
from ..plan import Plan
from ..schema import UserError, nearest


def _sizes(width: int, inner: int, depth: int, heads: int) -> dict[str, int]:
    more = {"num_hidden_layers": depth, "num_attention_heads": heads}
    return {"hidden_size": width, "intermediate_size": inner, **more}


REFERENCE = {  # sizes by name, for counting without files; language models as Vicuna's
    "vision": {
        "clip-l-336": CLIPVisionConfig(**_sizes(1024, 4096, 24, 16), image_size=336, patch_size=14),
        # 378 of its 384 pixels: 27 x 27 whole patches, which is what its encoder reads of them
        "siglip-so400m-384": SiglipVisionConfig(
            **_sizes(1152, 4304, 27, 16), image_size=378, patch_size=14
        ),
    },
    "language": {
        "llama-7b": LlamaConfig(**_sizes(4096, 11008, 32, 32)),
        "llama-13b": LlamaConfig(**_sizes(5120, 13824, 40, 40)),
    },
}
UNITS = ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)


@dataclass(frozen=True)
class Count:
    """What one prompt costs, and what one training step keeps; all of it for one plan between two
    models.

    num_*_parameters: language includes the head. *_flops: of one prompt of all its pictures and its
    text, the head at the last position only, as `generate` runs it; encoder_coarse is the reading
    of all the plan's taps from coarse views, encoder_fine the rest of the encoder;
    language_per_new_token is one token after that prompt, with its cache. Gates that look at hidden
    states run inside the language model and count there. kv_cache_bytes: what the cache holds after
    the prompt. weight_bytes: all parameters in `dtype`. training_*_bytes: what autograd keeps
    between forward and backward for `batch_size` such prompts with a loss on every position, each
    storage once, without weights, gradients and optimizer state, without checkpointing, and with a
    mask in every layer as padded batches have; fusion alone is trained, or fusion and language
    model. The step's peak is that or little more.
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
    training_fusion_bytes: int
    training_fusion_language_bytes: int
    batch_size: int
    dtype: str

    def to_dict(self) -> dict:
        """Plain numbers and a string: what JSON holds."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping) -> Count:
        """The count that `to_dict` wrote; raises ValueError where a key is missing or unknown."""
        names = {f.name for f in fields(cls)}
        if names != set(plain):
            differing = ", ".join(sorted(names ^ set(plain)))
            raise UserError(
                f"a count has {len(names)} keys, but these are missing or unknown: {differing};"
                " count again"
            )
        return cls(**plain)


def backbone_config(source: str, part: str):
    """The configuration of one side (part: vision or language): a name of REFERENCE, "shapes", a
    folder or a hub name.

    Raises ValueError where there is none.
    """
    if source in REFERENCE[part]:
        return copy.deepcopy(REFERENCE[part][source])
    names = [*REFERENCE[part], SHAPES]
    sentence = (
        f"the {part} model {source!r} is no known size{nearest(source, names)}, and no folder or"
        f" hub name that can be read; known sizes are {', '.join(names)}"
    )
    meant = nearest(source, names) or any(source in sizes for sizes in REFERENCE.values())
    if meant and source not in (SHAPES, OLD_SHAPES) and not Path(source).is_dir():
        raise UserError(sentence)  # a slip of the hand; the hub need not be asked
    try:
        config = AutoConfig.from_pretrained(resolve(source, part))
    except (OSError, ValueError) as error:
        raise UserError(f"{sentence}. Hugging Face says: {error}") from error
    return getattr(config, f"{part}_config", config)


def count(
    vision_config,
    text_config,
    plan: str | dict | Plan,
    *,
    num_text_tokens: int = 64,
    num_pictures: int = 1,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Count:
    """Count a prompt of `num_pictures` pictures and `num_text_tokens` text tokens under a plan;
    `Count` says what is counted.

    The configurations are not changed; the placeholder is the last word of the vocabulary, so none
    is added. batch_size is that of the training step only. Raises ValueError where plan and models
    do not fit, or a number is below its least.
    """
    least = {"num_text_tokens": (num_text_tokens, 1), "num_pictures": (num_pictures, 0)}
    check_least({**least, "batch_size": (batch_size, 1)})
    config = configuration_of(vision_config, text_config, plan)
    tokens = num_pictures * config.num_image_tokens
    with FakeTensorMode():
        model = build_fake_model(config, dtype)
        ids = torch.zeros(1, tokens + num_text_tokens, dtype=torch.long)
        pixels = torch.zeros(num_pictures, model.plan.num_views, *config.grid.view, dtype=dtype)
        flops, cache = _prompt_flops(model, ids, pixels, tokens)
        mask = torch.ones(batch_size, ids.shape[1], dtype=torch.long)
        held = [
            saved_bytes(model, ids, pixels, mask, parts)
            for parts in (["fusion"], ["fusion", "language"])
        ]
    numbers = {
        part: sum(p.numel() for p in values)
        for part, values in model.parameter_groups().items()
        if part != "head"
    }
    return Count(
        **{f"num_{part}_parameters": number for part, number in numbers.items()},
        num_total_parameters=sum(numbers.values()),
        **flops,
        num_image_tokens=tokens,
        num_prompt_tokens=ids.shape[1],
        kv_cache_bytes=cache,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        training_fusion_bytes=held[0],
        training_fusion_language_bytes=held[1],
        batch_size=batch_size,
        dtype=str(dtype).removeprefix("torch."),
    )


def check_least(numbers: Mapping[str, tuple]) -> None:
    """Raise ValueError unless every number {name: (given, least)} is whole and at least its
    least.
    """
    for name, (given, least) in numbers.items():
        if isinstance(given, bool) or not isinstance(given, int) or given < least:
            raise UserError(f"{name} is {given!r}, but must be a whole number of at least {least}")


def table(counts: Mapping[str, Count]) -> str:
    """Counts as lines of text, one plan a line; the relative column is total prefill FLOPs over
    those of the first plan.
    """
    if not counts:
        raise UserError("there is no plan to show the cost of; name at least one")
    first = next(iter(counts.values()))
    unit, size = next((u for u in UNITS if first.prefill_total_flops >= u[1] / 10), UNITS[-1])
    columns: dict[str, Callable[[Count], str]] = {
        "image tokens": lambda c: f"{c.num_image_tokens}",
        "fusion M": lambda c: f"{c.num_fusion_parameters / 1e6:.2f}",
        f"encoder {unit}": lambda c: (
            f"{(c.encoder_coarse_flops + c.encoder_fine_flops) / size:.3f}"
        ),
        f"fusion {unit}": lambda c: f"{c.fusion_flops / size:.3f}",
        f"language {unit}": lambda c: f"{c.language_prefill_flops / size:.3f}",
        f"total {unit}": lambda c: f"{c.prefill_total_flops / size:.3f}",
        "relative": lambda c: f"{c.prefill_total_flops / first.prefill_total_flops:.3f}",
        "KV MiB": lambda c: f"{c.kv_cache_bytes / 2**20:.1f}",
        "GFLOP a new token": lambda c: f"{c.language_per_new_token_flops / 1e9:.3f}",
    }
    note = (
        f"relative: total prefill FLOPs over those of {next(iter(counts))}; fusion M: million"
        " parameters; "
    )
    note += (
        f"{first.num_prompt_tokens - first.num_image_tokens} text tokens, {first.dtype}; attention"
        " is counted in full"
    )
    return (
        lines_of({name: {k: show(c) for k, show in columns.items()} for name, c in counts.items()})
        + f"\n{note}"
    )


def lines_of(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Rows of named cells as aligned lines of text, the columns of the first row as their head."""
    cells = [
        ["plan", *next(iter(rows.values()))],
        *([name, *row.values()] for name, row in rows.items()),
    ]
    left, *widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    right = [
        [f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True)] for row in cells
    ]
    return "\n".join(
        " | ".join([f"{row[0]:{left}}", *rest]) for row, rest in zip(cells, right, strict=True)
    )


class FakeScalarMode(TorchDispatchMode):
    """Answers the questions about values that a forward asks of pretended tensors: the number and
    the rows of image tokens.
    """

    def __init__(self, answer: int):
        super().__init__()
        self.answer = answer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.long:
            return self.answer
        if func is torch.ops.aten.index.Tensor and (index := args[1][0]).dtype == torch.bool:
            return args[0].new_empty(self.answer, *args[0].shape[index.dim() :])
        return func(*args, **(kwargs or {}))


def _attention_flops(query, key, value, *args, out_val=None, **kwargs) -> int:
    """Both products of attention on a CPU, a kernel that torch's own counter does not know: every
    query with every key.
    """
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


_attention_flops._get_raw = (
    True  # torch's sign for a formula that is given tensors instead of their shapes
)


def counter() -> FlopCounterMode:
    """Counts the operations of what runs inside a `with` block."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops})


def configuration_of(vision_config, text_config, plan: str | dict | Plan) -> SparseCutConfig:
    """The configuration of a model of these sizes with this plan, made from copies; the placeholder
    is the last word.
    """
    vision, text = (
        copy.deepcopy(getattr(vision_config, "vision_config", vision_config)),
        copy.deepcopy(text_config),
    )
    spec = plan.to_dict() if isinstance(plan, Plan) else plan
    last = text.get_text_config().vocab_size - 1
    return SparseCutConfig(vision_config=vision, text_config=text, plan=spec, image_token_id=last)


def build_fake_model(
    config: SparseCutConfig, dtype: torch.dtype
) -> SparseCutForConditionalGeneration:
    """The model in evaluation mode with all parameters in `dtype`, which pretended ones must be
    born with.
    """
    for part in (config.vision_config, config.text_config, config.text_config.get_text_config()):
        part.dtype = dtype
    with (
        local_torch_dtype(dtype),
        no_init_weights(),
    ):  # nothing is drawn: some ways of drawing look at values
        model = SparseCutForConditionalGeneration(config).eval()
    model.language_model.tie_weights()  # which transformers does after it has drawn them
    return model


def _prompt_flops(
    model: nn.Module, ids: Tensor, pixels: Tensor, tokens: int
) -> tuple[dict[str, int], int]:
    """FLOPs by part, and the bytes of the cache after the prompt."""
    pictures = pixels if len(pixels) else None
    with torch.no_grad(), FakeScalarMode(tokens):
        with counter() as whole:
            output = model(input_ids=ids, pixel_values=pictures, use_cache=True, logits_to_keep=1)
        held = _cache_bytes(output.past_key_values)
        with counter() as step:
            model(
                input_ids=ids[:, :1],
                past_key_values=output.past_key_values,
                use_cache=True,
                continued=True,
            )
        with counter() as coarse:
            if len(pixels):
                taps = model.plan.resolved_taps(model.config.vision_depth)
                read_taps(model.vision_tower, pixels[:, 0], model.config.grid, taps)
    name, parts = type(model).__name__, whole.get_flop_counts()
    encoder = sum(parts.get(f"{name}.vision_tower", {}).values())
    language = sum(parts.get(f"{name}.language_model", {}).values())
    total = whole.get_total_flops()
    return {
        "encoder_coarse_flops": coarse.get_total_flops(),
        "encoder_fine_flops": encoder - coarse.get_total_flops(),
        "fusion_flops": total - encoder - language,
        "language_prefill_flops": language,
        "prefill_total_flops": total,
        "language_per_new_token_flops": step.get_total_flops(),
    }, held


def _cache_bytes(cache) -> int:
    holders = getattr(cache, "layers", None) or [cache]
    tensors = [
        value for holder in holders for value in vars(holder).values() if isinstance(value, Tensor)
    ]
    return sum(t.numel() * t.element_size() for t in tensors)


def saved_bytes(
    model: nn.Module, ids: Tensor, pixels: Tensor, mask: Tensor, parts: list[str]
) -> int:
    """Bytes of the storages autograd saves in a forward with a loss, weights left out; mask [batch,
    length].
    """
    model.requires_grad_(False)
    for part in parts:
        for parameter in model.parameter_groups()[part]:
            parameter.requires_grad_(True)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, Tensor] = {}  # by storage; held, so that no number is used twice

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in weights:
            saved[storage] = tensor
        return tensor

    ids, pixels = ids.repeat(len(mask), 1), pixels.repeat(len(mask), 1, 1, 1, 1)
    pictures, tokens = pixels if len(pixels) else None, len(pixels) * model.config.num_image_tokens
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        FakeScalarMode(tokens),
    ):
        model(
            input_ids=ids, pixel_values=pictures, attention_mask=mask, labels=ids, use_cache=False
        )
    return sum(t.untyped_storage().nbytes() for t in saved.values())
