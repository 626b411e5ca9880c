"""Mixers: what is made of a shortcut's taps and grains, one feature per image token.

Features flow as [B, T, G, N, D]: B pictures, T taps, G grains (1 coarse + tiles^2 fine), N patches, D encoder width.
A mixer takes that to [B, N', D'].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .plan import POOLED, Plan, Shortcut


def grid(views: Tensor, tiles: int, rows: int) -> Tensor:
    """Lay fine patches under the coarse patch that shows the same part of the picture.

    views: [B, 1 + tiles^2, N, D], coarse view first, then the tiles row by row; rows: patch rows of
    one view. Returns grains [B, G, N, D]: grain 0 is the coarse patch, the others the tiles x tiles
    fine patches under it, row by row.
    """
    if tiles == 0:
        return views
    coarse, fine = views[:, :1], views[:, 1:]
    big = rearrange(fine, "b (ty tx) (y x) d -> b (ty y) (tx x) d", ty=tiles, y=rows)
    windows = rearrange(big, "b (y wy) (x wx) d -> b (wy wx) (y x) d", wy=tiles, wx=tiles)
    return torch.cat([coarse, windows], dim=1)


class Pick(nn.Module):
    """The last tap; `Fusion` hands over the one grain that is picked: [B, T, 1, N, D] -> [B, N,
    D].
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int):
        super().__init__()
        self.out_dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1, 0]


class Channels(nn.Module):
    """All taps and grains of a patch side by side, coarse first: [B, T, G, N, D] -> [B, N,
    T*G*D].
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int):
        super().__init__()
        self.out_dim = len(shortcut.taps) * plan.num_grains * dim

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t g n d -> b n (t g d)")


class Tokens(nn.Module):
    """Coarse patches, then the fine ones of the whole picture row by row: [B, T, G, N, D] -> [B,
    G*N, T*D].
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int):
        super().__init__()
        self.tiles, self.rows, self.out_dim = plan.tiles, rows, len(shortcut.taps) * dim

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b t g n d -> b g n (t d)")
        if not self.tiles:
            return x[:, 0]
        fine = rearrange(
            x[:, 1:], "b (wy wx) (y x) d -> b (y wy x wx) d", wy=self.tiles, y=self.rows
        )
        return torch.cat([x[:, 0], fine], dim=1)


class Append(nn.Module):
    """All coarse patches of the last tap, then every other tap, means of 8 neighbours along the
    raster.

    [B, T, 1, N, D] -> [B, N + (T - 1) * ceil(N / 8), D]; the token integration (STI) of Dense
    Connector (arXiv 2405.13800).
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int):
        super().__init__()
        self.out_dim = dim

    def forward(self, x: Tensor) -> Tensor:
        others = rearrange(x[:, :-1, 0], "b t n d -> (b t) d n")
        pooled = F.avg_pool1d(others, POOLED, ceil_mode=True)
        return torch.cat(
            [x[:, -1, 0], rearrange(pooled, "(b t) d n -> b (t n) d", b=len(x))], dim=1
        )


def heads_of(dim: int) -> int:
    """Attention heads of about 64 channels that divide the width."""
    return max(h for h in range(1, max(1, dim // 64) + 1) if dim % h == 0)


def attention(query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
    """Dense attention without positions: [B, N, D] over [B, M, 2 D] (keys, then values) -> [B, N,
    D].
    """
    q = rearrange(query, "b n (h d) -> b h n d", h=num_heads)
    k, v = rearrange(key_value, "b n (two h d) -> two b h n d", two=2, h=num_heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def query_and_others(x: Tensor) -> tuple[Tensor, Tensor]:
    """Coarse patches of the last tap, and all the rest as one list: [B, T, G, N, D] -> [B, N, D],
    [B, (T G - 1) N, D].
    """
    last = x.shape[1] * x.shape[2] - x.shape[2]  # the query itself is no key
    flat = rearrange(x, "b t g n d -> b (t g) n d")
    others = torch.cat([flat[:, :last], flat[:, last + 1 :]], dim=1)
    return x[:, -1, 0], rearrange(others, "b g n d -> b (g n) d")


class Attend(nn.Module):
    """Coarse patches of the last tap attend to every other tap and grain, then a feed-forward: ->
    [B, N, D].

    Post-norm, 4x feed-forward, dense attention without positions, heads of about 64 channels
    (SparseCut's released `cross_attention`, whose keys are the fine patches of the same tap).
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int):
        super().__init__()
        self.num_heads, self.out_dim = heads_of(dim), dim
        self.query, self.key_value, self.output = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        coarse, others = query_and_others(x)
        attended = attention(self.query(coarse), self.key_value(others), self.num_heads)
        x = self.norm1(coarse + self.output(attended))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Enrich(nn.Module):
    """v + g1 * A, with A = cross(v) + g2 * self(cross(v)): the coarse patches of the last tap plus
    what the others add.

    Both gates are vectors that start at zero, so it starts as `pick` (MMFuser, arXiv 2410.11829).
    Deviation: dense attention where the authors have a deformable kernel. [B, T, G, N, D] -> [B, N,
    D].
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int):
        super().__init__()
        self.num_heads, self.out_dim = heads_of(dim), dim
        self.norm_query, self.norm_others, self.norm_self = (
            nn.LayerNorm(dim),
            nn.LayerNorm(dim),
            nn.LayerNorm(dim),
        )
        self.query, self.key_value, self.output = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )
        self.self_query, self.self_key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.self_output = nn.Linear(dim, dim)
        self.gate_cross, self.gate_self = (
            nn.Parameter(torch.zeros(dim)),
            nn.Parameter(torch.zeros(dim)),
        )

    def forward(self, x: Tensor) -> Tensor:
        coarse, others = query_and_others(x)
        key_value = self.key_value(self.norm_others(others))
        found = self.output(
            attention(self.query(self.norm_query(coarse)), key_value, self.num_heads)
        )
        again = self.norm_self(found)
        again = attention(self.self_query(again), self.self_key_value(again), self.num_heads)
        return coarse + self.gate_cross * (found + self.gate_self * self.self_output(again))


MIXERS = {
    "pick": Pick,
    "channels": Channels,
    "tokens": Tokens,
    "append": Append,
    "attend": Attend,
    "enrich": Enrich,
}
