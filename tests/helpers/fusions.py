"""Small fusions with random weights, and random features for them."""

import torch

from sparsecut import Plan
from sparsecut.fusion import Fusion

DIM, HIDDEN, DEPTH = 6, 8, 5


def fusion(*shortcuts, rows=2, **settings) -> Fusion:
    """A fusion of the given shortcuts with weights of seed 0."""
    torch.manual_seed(0)
    plan = Plan(shortcuts, **{"tiles": 2, "norm": False} | settings)
    return Fusion(plan, vision_depth=DEPTH, vision_dim=DIM, language_dim=HIDDEN, rows=rows)


def features(taps, *, images=2, tiles=2, rows=2) -> dict:
    """Random features of every tap: [B, V, N, D]."""
    torch.manual_seed(1)
    return {tap: torch.randn(images, 1 + tiles**2, rows**2, DIM) for tap in taps}


def fuse(module: Fusion, states) -> dict[int, torch.Tensor]:
    """What a fusion makes of encoder states, by layer."""
    return dict(zip(module.plan.fused_layers, module(states), strict=True))
