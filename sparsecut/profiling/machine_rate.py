"""How fast this machine multiplies matrices."""

from __future__ import annotations

import functools
import time

import torch

SECONDS = 0.3  # at least so long it is measured
NUM_TOKENS = 512  # rows of the product, like the tokens of a small batch
WIDTHS = (64, 4096)  # the least and the greatest width that is measured


@functools.cache
def measure_rate(width: int, dtype: torch.dtype) -> tuple[float, str]:
    """Measure products such as a model's feed-forward layers make.

    Args:
        width: Of the model's hidden states.
        dtype: The dtype that is computed in.

    Returns:
        TFLOP/s of one device, and the device.
    """
    device = "cpu"
    if torch.accelerator.is_available():
        device = str(torch.accelerator.current_accelerator())
    width = min(max(width, WIDTHS[0]), WIDTHS[1])
    states = torch.ones(NUM_TOKENS, width, device=device, dtype=dtype)
    weight = torch.ones(width, 4 * width, device=device, dtype=dtype)
    best, start = 0.0, time.perf_counter()
    flops = 2 * NUM_TOKENS * width * 4 * width
    while time.perf_counter() - start < SECONDS or not best:
        _multiply(states, weight)  # the first one warms up
        begin = time.perf_counter()
        _multiply(states, weight)
        best = max(best, flops / (time.perf_counter() - begin))
    return best / 1e12, device


def _multiply(states: torch.Tensor, weight: torch.Tensor) -> None:
    states @ weight
    if states.device.type != "cpu":
        torch.accelerator.synchronize(states.device)
