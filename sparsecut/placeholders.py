"""The placeholder of image tokens, which no answer may hold: in tables, logits and labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a label that does not count in the loss
# Rows times width squared of a table, from which the covariance of its rows takes seconds.
MOST_COVARIANCE = 2**35


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


def add_rows(language: Any, number: int) -> None:
    """Give a language model's tables more rows, which nothing reads: features replace them.

    Transformers draws new rows like the old ones, by their covariance. For large tables that takes
    seconds, so there the new rows are the mean of the old ones.

    Args:
        language: The language model.
        number: Rows that its tables will have.
    """
    rows, width = language.get_input_embeddings().weight.shape
    is_quick = rows * width**2 < MOST_COVARIANCE
    language.resize_token_embeddings(number, mean_resizing=is_quick)
    if is_quick:
        return
    for table in (language.get_input_embeddings(), language.get_output_embeddings()):
        weight = getattr(table, "weight", None)
        if weight is not None and len(weight) >= number and weight.is_floating_point():
            with torch.no_grad():
                weight[rows:] = weight[:rows].mean(0, dtype=torch.float32).to(weight.dtype)
