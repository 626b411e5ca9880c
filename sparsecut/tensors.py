"""Tensors of torch, told from other values without importing it."""

from __future__ import annotations

import sys
from typing import Any


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of torch, which is not imported for this: it takes seconds."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
