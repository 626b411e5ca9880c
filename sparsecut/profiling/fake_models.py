"""Models of fake tensors: the real code runs, but no weight is made and nothing is computed.

So a model of any size is counted in seconds. One multiplication with its addition counts as two
FLOPs. Only matrix products, convolutions and attention count; norms, activations and sums are about
a hundredth of them. Attention counts every pair of positions, as kernels without a shortcut for
causal masks compute them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights
from transformers.modeling_utils import local_torch_dtype

from ..configuration import SparseCutConfig
from ..encoders import prepare_to_load
from ..layers import find_blocks, find_layers
from ..modeling import SparseCutForConditionalGeneration
from ..plan import Plan
from .repeated_layers import KeptBytes, LayerCounter, NoModules, find_storage, run_alike_layers_once


class FakeScalarMode(TorchDispatchMode):
    """Answers what a forward asks about the values of fake tensors.

    The model asks for the number of image tokens, and selects their rows by a mask. While it is
    made, encoders ask how often blocks are skipped in training: never.

    Args:
        num_image_tokens: The answer to questions for whole numbers.
    """

    def __init__(self, num_image_tokens: int):
        super().__init__()
        self.num_image_tokens = num_image_tokens

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.num_image_tokens if args[0].dtype == torch.long else 0.0
        if func is torch.ops.aten.index.Tensor:
            values = args[0]
            mask = args[1][0]
            if mask is not None and mask.dtype == torch.bool:
                rest = values.shape[mask.dim() :]
                return values.new_empty(self.num_image_tokens, *rest)
        return func(*args, **(kwargs or {}))


def _attention_flops(query, key, value, *args, out_val=None, **kwargs) -> int:
    """FLOPs of both products of attention, every query with every key.

    It is for the CPU's kernel, which torch's own counter does not know.
    """
    num_queries = query.shape[:-1].numel()
    return 2 * num_queries * key.shape[-2] * (query.shape[-1] + value.shape[-1])


_attention_flops._get_raw = True  # torch then passes tensors to the formula instead of shapes


def create_flop_counter(*, by_module: bool = True) -> FlopCounterMode:
    """A counter of the FLOPs of what runs inside its `with` block.

    Args:
        by_module: Also count by module, which takes time.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = LayerCounter(display=False, custom_mapping={kernel: _attention_flops})
    if not by_module:
        counter.mod_tracker = NoModules()
    return counter


def get_module_flops(counter: FlopCounterMode, model: nn.Module, name: str) -> int:
    """FLOPs that a counter has seen inside a direct child of the model."""
    counts = counter.get_flop_counts()
    return sum(counts.get(f"{type(model).__name__}.{name}", {}).values())


def build_config(
    vision_config, text_config, plan: str | dict | Plan, view_size=None
) -> SparseCutConfig:
    """Build the configuration of a model of these sizes with this plan.

    Args:
        vision_config: The encoder's configuration, or that of a model which holds one.
        text_config: The language model's configuration. Neither is changed.
        plan: A method's name, a method with options, or a plan.
        view_size: Pixels of a view, or (height, width); None for the encoder's own.

    Returns:
        The configuration. Its image token is the vocabulary's last one, so that none is added.
    """
    vision = copy.deepcopy(getattr(vision_config, "vision_config", vision_config))
    prepare_to_load(vision, view_size)
    text = copy.deepcopy(text_config)
    return SparseCutConfig(
        vision_config=vision,
        text_config=text,
        plan=plan.to_dict() if isinstance(plan, Plan) else plan,
        view_size=view_size,
        image_token_id=text.get_text_config().vocab_size - 1,
    )


def build_fake_model(
    config: SparseCutConfig, dtype: torch.dtype, *backbones: nn.Module
) -> SparseCutForConditionalGeneration:
    """Build a model of a configuration; call it inside `FakeTensorMode`.

    Args:
        config: The configuration; its dtype is set.
        dtype: The dtype of all parameters. Fake ones must be created with it.
        *backbones: The encoder and the language model of another such model, to share them.

    Returns:
        The model, in evaluation mode.
    """
    for part in (config.vision_config, config.text_config, config.text_config.get_text_config()):
        part.dtype = dtype
    # Nothing is initialized: some ways of initializing look at values.
    with local_torch_dtype(dtype), no_init_weights(), FakeScalarMode(0):
        model = SparseCutForConditionalGeneration(config, *backbones).eval()
    model.language_model.tie_weights()  # transformers does so after it has initialized them
    return model


def run_alike_layers_of_model_once(model: nn.Module) -> None:
    """Let every block of the encoder and layer of the decoder that is like another run once."""
    run_alike_layers_once(find_blocks(model.vision_tower, model.vision_depth, model.grid.blocks))
    depth = model.config.language_depth
    run_alike_layers_once(find_layers(model.language_model, depth, "the language model"))


def train_only(model: nn.Module, parts: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """Let only these of the model's parts require gradients; all parts are returned."""
    groups = model.parameter_groups()
    for group in groups.values():
        for parameter in group:
            parameter.requires_grad = False
    for part in parts:
        for parameter in groups[part]:
            parameter.requires_grad = True
    return groups


def count_saved_bytes(
    model: nn.Module,
    input_ids: Tensor,
    pixels: Tensor,
    mask: Tensor,
    parts: Sequence[str],
    states: dict[int, Tensor] | None = None,
) -> int:
    """Count the bytes that autograd keeps between a forward pass with a loss and its backward pass.

    Each storage counts once; weights, gradients and optimizer states do not.

    Args:
        model: The model; afterwards only `parts` require gradients.
        input_ids: Token ids of one record, [1, L].
        pixels: Views of its images, [images, views, 3, S, S]; there may be none.
        mask: Attention mask of a batch of such records, [B, L].
        parts: The parts that are trained.
        states: What `encode_batch` returned, where the encoder is not trained.
    """
    groups = train_only(model, parts)
    weights = {find_storage(parameter) for group in groups.values() for parameter in group}
    saved = KeptBytes(weights)
    batch_size = len(mask)
    input_ids = input_ids.repeat(batch_size, 1)
    num_images = batch_size * len(pixels)
    images = {"vision_states": states}
    if states is None and num_images:
        images = {"pixel_values": pixels.repeat(batch_size, 1, 1, 1, 1)}
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor)
    with hooks, saved, FakeScalarMode(num_images * model.config.num_image_tokens):
        model(input_ids=input_ids, attention_mask=mask, labels=input_ids, use_cache=False, **images)
    return saved.count()


def encode_batch(model: nn.Module, pixels: Tensor, batch_size: int) -> dict[int, Tensor] | None:
    """Features of a batch of records for training without the encoder; None without images."""
    if not len(pixels):
        return None
    model.vision_tower.requires_grad_(False)
    with FakeScalarMode(batch_size * len(pixels) * model.config.num_image_tokens):
        return model.encode(pixels.repeat(batch_size, 1, 1, 1, 1))
