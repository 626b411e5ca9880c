"""The placeholder of image tokens, which no answer may hold, in logits and labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a label that does not count in the loss


def mask_placeholder(config: Any, logits: Tensor) -> Tensor:
    """Give the placeholder's logit the lowest value where `config.mask_image_token` is set.

    Logits without a gradient are changed in place: those of a prompt may be the largest tensor.
    """
    if not config.mask_image_token:
        return logits
    placeholder = torch.tensor([config.image_token_id], device=logits.device)
    fill = logits.index_fill if logits.requires_grad else logits.index_fill_
    return fill(-1, placeholder, torch.finfo(logits.dtype).min)


def ignore_placeholder(config: Any, **arguments: Any) -> dict:
    """Arguments of a loss whose labels leave out what `mask_placeholder` makes impossible.

    Args:
        config: The model's configuration.
        **arguments: With `labels` [B, L], and `shift_labels` where the caller has shifted them.
    """
    if not config.mask_image_token:
        return arguments
    for name in ("labels", "shift_labels"):
        labels = arguments.get(name)
        if labels is not None:
            arguments[name] = labels.masked_fill(labels == config.image_token_id, IGNORED)
    return arguments
