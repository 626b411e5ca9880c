"""Which model this is, in 16 letters: of its very weights, or whatever number format it is loaded
in.
"""

from __future__ import annotations

import hashlib

import torch
from accelerate.utils import align_module_device
from torch import nn

SPREAD = 256  # values of each tensor that a fingerprint reads
SAMPLED = 64  # values of each that a digest reads


def weights_hash(module: nn.Module) -> str:
    """A hash over up to 256 values of each weight, spread evenly, with names, shapes and number
    formats.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // SPREAD)].float().cpu()
        total.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes()
        )
    return total.hexdigest()[:16]


def base_hash(base: nn.Module) -> str:
    """A hash of some values of a language model's norms, biases and input embeddings, as bfloat16,
    and of its model type.

    These are the same in every number format a model is loaded in, quantised ones included, and
    beside adapters.
    """
    embeddings = base.get_input_embeddings()
    found = {id(embeddings.weight): ("embeddings", embeddings, "weight")}
    for of, module in base.named_modules():
        for last, value in module.named_parameters(prefix=of, recurse=False):
            if value.dim() == 1 and value.is_floating_point() and "lora_" not in last:
                found.setdefault(
                    id(value), (last.replace(".base_layer", ""), module, last.rpartition(".")[2])
                )
    total = hashlib.sha256(base.config.model_type.encode())
    for name, module, last in sorted(found.values(), key=lambda item: item[0]):
        with align_module_device(module):  # weights that were sent to memory or disk are fetched
            flat = getattr(module, last).detach().flatten()
        some = flat[
            torch.linspace(0, len(flat) - 1, min(SAMPLED, len(flat)), device=flat.device).long()
        ]
        total.update(
            name.encode() + some.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()
        )
    return total.hexdigest()[:16]
