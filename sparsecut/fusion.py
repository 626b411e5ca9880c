"""The trainable part: tapped features of all views in, one feature per image token and target layer out.

Features flow as [B, T, G, N, D]: B pictures, T taps, G grains (1 coarse + tiles^2 fine), N patches, D encoder width.
A mixer takes that to [B, N', D'] and a projector to [B, N', H], with H the width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .plan import Plan, Shortcut


def grid(views: Tensor, tiles: int, rows: int) -> Tensor:
    """Lay fine patches under the coarse patch that shows the same part of the picture.

    views: [B, 1 + tiles^2, N, D], coarse view first, then the tiles row by row; rows: patch rows of one view.
    Returns grains [B, G, N, D]: grain 0 is the coarse patch, the others the tiles x tiles fine patches under it, row by row.
    """
    if tiles == 0:
        return views
    coarse, fine = views[:, :1], views[:, 1:]
    big = rearrange(fine, "b (ty tx) (y x) d -> b (ty y) (tx x) d", ty=tiles, y=rows)
    windows = rearrange(big, "b (y wy) (x wx) d -> b (wy wx) (y x) d", wy=tiles, wx=tiles)
    return torch.cat([coarse, windows], dim=1)


class Pick(nn.Module):
    """One grain of the last tap: [B, T, G, N, D] -> [B, N, D]."""

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int):
        super().__init__()
        self.grain, self.out_dim = shortcut.grain, dim

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1, self.grain]


class Channels(nn.Module):
    """All taps and grains of a patch side by side, coarse first: [B, T, G, N, D] -> [B, N, T*G*D]."""

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int):
        super().__init__()
        self.out_dim = len(shortcut.taps) * plan.num_grains * dim

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t g n d -> b n (t g d)")


class Tokens(nn.Module):
    """Coarse patches, then the fine ones of the whole picture row by row: [B, T, G, N, D] -> [B, G*N, T*D]."""

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int):
        super().__init__()
        self.tiles, self.rows, self.out_dim = plan.tiles, rows, len(shortcut.taps) * dim

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b t g n d -> b g n (t d)")
        if not self.tiles:
            return x[:, 0]
        fine = rearrange(x[:, 1:], "b (wy wx) (y x) d -> b (y wy x wx) d", wy=self.tiles, y=self.rows)
        return torch.cat([x[:, 0], fine], dim=1)


class Attend(nn.Module):
    """Coarse patches of the last tap attend to every other tap and grain, then a feed-forward: -> [B, N, D].

    Post-norm, 4x feed-forward, dense attention without positions, heads of about 64 channels (SparseCut's released
    `cross_attention`, whose keys are the fine patches of the same tap).
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int):
        super().__init__()
        self.num_heads = max(h for h in range(1, max(1, dim // 64) + 1) if dim % h == 0)
        self.out_dim = dim
        self.query, self.key_value, self.output = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        coarse = x[:, -1, 0]
        last = x.shape[1] * x.shape[2] - x.shape[2]  # the query itself is no key
        flat = rearrange(x, "b t g n d -> b (t g) n d")
        others = rearrange(torch.cat([flat[:, :last], flat[:, last + 1 :]], dim=1), "b g n d -> b (g n) d")
        q = rearrange(self.query(coarse), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.key_value(others), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = self.norm1(coarse + self.output(attended))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


MIXERS = {"pick": Pick, "channels": Channels, "tokens": Tokens, "attend": Attend}


class Path(nn.Module):
    """A mixer and its two-layer projector (exact GELU): [B, T, G, N, D] -> [B, N', H]."""

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, language_dim: int, rows: int):
        super().__init__()
        self.mixer = MIXERS[shortcut.mix](shortcut, plan, dim, rows)
        self.linear_1 = nn.Linear(self.mixer.out_dim, language_dim)
        self.linear_2 = nn.Linear(language_dim, language_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(self.mixer(x))))


class Fusion(nn.Module):
    """All shortcuts of a plan: `{tap: views} -> {layer: features}`, with one batched call for those that share weights.

    plan: a plan checked against both depths; vision_depth turns negative taps into absolute ones; rows: patch rows of a view.
    Parameters: one `Path` per shortcut, or per kind where the plan is shared, and the vector `gates` (one factor per
    shortcut but the first into the input). Constant gates are a buffer, so that a stage that trains fusion cannot move them.
    """

    def __init__(self, plan: Plan, *, vision_depth: int, vision_dim: int, language_dim: int, rows: int):
        super().__init__()
        self.plan, self.rows, self.vision_dim = plan, rows, vision_dim
        self.taps = [tuple(t % (vision_depth + 1) for t in s.taps) for s in plan.shortcuts]
        kinds = [(s.mix, s.grain, len(s.taps)) if plan.shared else i for i, s in enumerate(plan.shortcuts)]
        order = list(dict.fromkeys(kinds))
        self.groups = [[i for i, kind in enumerate(kinds) if kind == group] for group in order]
        self.paths = nn.ModuleList(
            Path(plan.shortcuts[members[0]], plan, vision_dim, language_dim, rows) for members in self.groups
        )
        main = next(i for i, s in enumerate(plan.shortcuts) if s.layer == 0)
        self.gated = [i for i in range(len(plan.shortcuts)) if i != main]
        start = torch.full((len(self.gated),), 0.0 if plan.gate == "zero" else 1.0)
        if plan.gate is not None and self.gated:
            self.gates = nn.Parameter(start)
        else:
            self.register_buffer("gates", start)

    def forward(self, features: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """features: tap -> [B, V, N, D]. Returns layer -> [B, N', H], shortcuts of one layer summed."""
        grains = {tap: self._prepare(x) for tap, x in features.items()}
        outputs: dict[int, Tensor] = {}
        for path, members in zip(self.paths, self.groups, strict=True):
            stacked = torch.cat([torch.stack([grains[t] for t in self.taps[i]], dim=1) for i in members])
            for i, z in zip(members, path(stacked).chunk(len(members)), strict=True):
                layer = self.plan.shortcuts[i].layer
                if i in self.gated:
                    z = z * self.gates[self.gated.index(i)]
                outputs[layer] = outputs[layer] + z if layer in outputs else z
        return outputs

    def _prepare(self, views: Tensor) -> Tensor:
        views = views.to(self.paths[0].linear_1.weight.dtype)
        if self.plan.norm:
            views = F.layer_norm(views, (self.vision_dim,))
        return grid(views, self.plan.tiles, self.rows)

    def initial_values(self):
        """(parameter, kind, bound) of everything random, with PyTorch's usual linear start: uniform in +-1/sqrt(inputs)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                yield module.weight, module.bias, 1 / math.sqrt(module.in_features)
