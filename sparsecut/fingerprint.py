"""Short hashes that identify a model, 16 hexadecimal digits each."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

WEIGHTS_SAMPLE = 256  # values of each tensor that `weights_hash` reads
BASE_SAMPLE = 64  # values of each that `base_hash` reads
NUM_DIGITS = 16
BYTES_AT_ONCE = 8  # that `weights_sum` reads as one number


def weights_hash(module: nn.Module) -> str:
    """A hash of a module's weights in the dtype they have.

    It covers every tensor's name, shape and dtype, and up to 256 of its values, evenly spread.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        step = max(1, tensor.numel() // WEIGHTS_SAMPLE)
        values = tensor.detach().flatten()[::step].float().cpu()
        header = f"{name} {tuple(tensor.shape)} {tensor.dtype}"
        total.update(header.encode() + values.numpy().tobytes())
    return total.hexdigest()[:NUM_DIGITS]


def weights_sum(module: nn.Module, without: Collection[Tensor] = ()) -> str:
    """A hash that changes with any value of a module's weights, but for those left out.

    It covers every tensor's name and the sum of its bytes, read as whole numbers. Such sums are
    exact, quick, and the same on every device. They do not see values that change places, which
    `weights_hash` sees.
    """
    total = hashlib.sha256()
    left_out = {tensor.data_ptr() for tensor in without}
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.data_ptr() in left_out:
            continue
        data = tensor.detach().flatten().contiguous().view(torch.uint8)
        end = len(data) // BYTES_AT_ONCE * BYTES_AT_ONCE
        # A part of a larger tensor may begin in the middle of a number.
        words = data[:end].clone() if data.storage_offset() % BYTES_AT_ONCE else data[:end]
        sums = words.view(torch.int64).sum().item(), data[end:].sum().item()
        total.update(f"{name} {sums} ".encode())
    return total.hexdigest()[:NUM_DIGITS]


def base_hash(base: nn.Module) -> str:
    """A hash that recognizes a pretrained VLM in any dtype, quantized or with adapters.

    It covers the model type, and some values (as bfloat16) of norms, biases and input embeddings.
    These are the same in every dtype that a model is loaded in.
    """
    total = hashlib.sha256(base.config.model_type.encode())
    for name, module, attribute in _find_stable_weights(base):
        with align_module_device(module):  # fetches weights that were offloaded to memory or disk
            values = getattr(module, attribute).detach().flatten()
        count = min(BASE_SAMPLE, len(values))
        positions = torch.linspace(0, len(values) - 1, count, device=values.device).long()
        total.update(name.encode() + _to_bytes(values[positions]))
    return total.hexdigest()[:NUM_DIGITS]


def _find_stable_weights(base: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Norms, biases and input embeddings, sorted by name: (name, module, attribute)."""
    embeddings = base.get_input_embeddings()
    weights = {id(embeddings.weight): ("embeddings", embeddings, "weight")}
    for prefix, module in base.named_modules():
        for name, value in module.named_parameters(prefix=prefix, recurse=False):
            if value.dim() != 1 or not value.is_floating_point():
                continue
            if "lora_" in name:
                continue
            # PEFT's name for a layer with an adapter
            base_name = name.replace(".base_layer", "")
            attribute = name.rpartition(".")[2]
            weights.setdefault(id(value), (base_name, module, attribute))
    return sorted(weights.values(), key=lambda entry: entry[0])


def _to_bytes(values: Tensor) -> bytes:
    return values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()
