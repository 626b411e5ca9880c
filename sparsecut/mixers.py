"""Mixers: how a shortcut's taps and grains become one feature for each image token.

Features have the shape [B, T, G, N, D]: B images, T taps, G grains (1 coarse and tiles^2 fine), N
patches of a view, D channels. A mixer is a module that turns them into [B, N', D'], with N' image
tokens and D' = `out_dim` channels. The docstring of its class names the shapes of `forward`. G is 1
where the mixer's entry in `plan.MIXERS` reads one grain; that entry holds everything else about it.

A mixer is made as `Mixer(shortcut, plan, dim, rows)`: `dim` is D and `rows` the number of patch
rows of a view. Images of any size have rows of their own. A mixer that lays patches out takes them
as a second argument of `forward` and says so by `takes_rows = True`. One whose entry has
`needs_prompt` is given H, the language model's width, as well, and `forward` takes [B, H].

Linear layers of a mixer start as PyTorch's do. A mixer with parameters of its own may give their
start values in `initial_values()`, as pairs of a parameter and a number.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from .kinds import POOL_SIZE
from .plan import Plan, Shortcut

CHANNELS_PER_HEAD = 64
ROUTER_WIDTH = 512  # of TGIF's router


def arrange_grains(views: Tensor, tiles: int, rows: int) -> Tensor:
    """Lay fine patches under the coarse patch that shows the same part of the image.

    Args:
        views: Features [B, 1 + tiles^2, N, D]: the coarse view first, then the fine views row by
            row.
        tiles: Fine views in each row and column. With 0 there is only the coarse view.
        rows: Patch rows of one view.

    Returns:
        Grains [B, G, N, D]. Grain 0 is the coarse patch, the others are the tiles x tiles fine
        patches under it, row by row.
    """
    if tiles == 0:
        return views
    coarse = views[:, :1]
    fine = views[:, 1:]
    image = rearrange(fine, "b (ty tx) (y x) d -> b (ty y) (tx x) d", ty=tiles, y=rows)
    windows = rearrange(image, "b (y wy) (x wx) d -> b (wy wx) (y x) d", wy=tiles, wx=tiles)
    return torch.cat([coarse, windows], dim=1)


class Pick(nn.Module):
    """The last tap: [B, T, 1, N, D] -> [B, N, D]."""

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1, 0]


class Channels(nn.Module):
    """All taps and grains of a patch side by side: [B, T, G, N, D] -> [B, N, T * G * D].

    This is the concatenation of SparseCut's released `cross_mlp` (arXiv 2602.00505).
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int) -> None:
        super().__init__()
        self.out_dim = len(shortcut.taps) * plan.num_grains * dim

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t g n d -> b n (t g d)")


class Blend(nn.Module):
    """A convex mean of the taps, its weights learned: [B, T, G, N, D] -> [B, N, G * D].

    sum over t of softmax(a)_t x_t, for every grain; the grains of a patch stand side by side. The
    vector a starts at zero, so the mixer starts as the plain mean. Taps are comparable where the
    plan has `norm`. It is the control of every method that chooses layers by the question, such as
    IGVA (arXiv 2501.08443), whose first stage holds all weights equal, and TGIF (arXiv 2601.03100).
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int) -> None:
        super().__init__()
        self.out_dim = plan.num_grains * dim
        self.scores = nn.Parameter(torch.zeros(len(shortcut.taps)))

    def initial_values(self) -> Iterator[tuple[Tensor, float]]:
        """Yield the parameters of this module alone, with their start values."""
        yield self.scores, 0.0

    def forward(self, x: Tensor) -> Tensor:
        blended = einsum(x, self.scores.softmax(0), "b t g n d, t -> b g n d")
        return rearrange(blended, "b g n d -> b n (g d)")


class BlendByPrompt(nn.Module):
    """A convex mean of the taps, weighed by the prompt: [B, T, G, N, D], [B, H] -> [B, N, G * D].

    The weights are softmax(A relu(W t + b) + a), where t is the mean embedding of the prompt's
    tokens, normed (`prompt_vectors`). A and a start at zero, so the mixer starts as the plain mean.
    The router is that of TGIF (arXiv 2601.03100). IGVA (arXiv 2501.08443) routes by a sentence
    encoder in its place, and by the image's own states.

    Deviations: TGIF starts its router at random, adds the last block but one to the mean, norms the
    sum, and takes no norm of t. Its released code averages all tokens, in training the answer too.
    IGVA weighs the means of four groups of layers, which taps that are lists express, and stands
    the result beside the last block but one. Both may add a loss that balances weights; here is
    none.
    """

    def __init__(
        self, shortcut: Shortcut, plan: Plan, dim: int, rows: int, language_dim: int
    ) -> None:
        super().__init__()
        self.out_dim = plan.num_grains * dim
        self.router = nn.Linear(language_dim, ROUTER_WIDTH)
        self.scores = nn.Parameter(torch.zeros(len(shortcut.taps), ROUTER_WIDTH))
        self.offsets = nn.Parameter(torch.zeros(len(shortcut.taps)))

    def initial_values(self) -> Iterator[tuple[Tensor, float]]:
        """Yield the parameters of this module alone, with their start values."""
        yield self.scores, 0.0
        yield self.offsets, 0.0

    def compute_weights(self, prompts: Tensor) -> Tensor:
        """Return the weight of each tap for prompts [B, H], [B, T]; each row adds up to 1."""
        prompts = prompts.to(self.router.weight)
        inner = F.relu(self.router(F.layer_norm(prompts, prompts.shape[-1:])))
        return (inner @ self.scores.T + self.offsets).softmax(-1)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        blended = einsum(x, self.compute_weights(prompts), "b t g n d, b t -> b g n d")
        return rearrange(blended, "b g n d -> b n (g d)")


class Tokens(nn.Module):
    """Coarse patches, then those of the whole fine image: [B, T, G, N, D] -> [B, G * N, T * D].

    Fine patches follow row by row over the whole image, as in LLaVA-NeXT's AnyRes.
    """

    takes_rows = True

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int) -> None:
        super().__init__()
        self.tiles = plan.tiles
        self.rows = rows
        self.out_dim = len(shortcut.taps) * dim

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        x = rearrange(x, "b t g n d -> b g n (t d)")
        coarse = x[:, 0]
        if not self.tiles:
            return coarse
        pattern = "b (wy wx) (y x) d -> b (y wy x wx) d"
        fine = rearrange(x[:, 1:], pattern, wy=self.tiles, y=rows or self.rows)
        return torch.cat([coarse, fine], dim=1)


class Append(nn.Module):
    """Coarse patches of the last tap, then every other tap pooled, as further tokens.

    [B, T, 1, N, D] -> [B, N + (T - 1) * ceil(N / 8), D]. Eight neighbours along the raster make one
    token: Dense Connector's sparse token integration (arXiv 2405.13800).
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int) -> None:
        super().__init__()
        self.out_dim = dim

    def forward(self, x: Tensor) -> Tensor:
        last = x[:, -1, 0]
        others = rearrange(x[:, :-1, 0], "b t n d -> (b t) d n")
        pooled = F.avg_pool1d(others, POOL_SIZE, ceil_mode=True)
        extra = rearrange(pooled, "(b t) d n -> b (t n) d", b=len(x))
        return torch.cat([last, extra], dim=1)


def get_num_heads(dim: int) -> int:
    """Return the largest number of heads that divides `dim` and leaves at least 64 channels."""
    most = max(1, dim // CHANNELS_PER_HEAD)
    return max(heads for heads in range(1, most + 1) if dim % heads == 0)


def compute_attention(
    query: Tensor, key_value: Tensor, num_heads: int, mask: Tensor | None = None
) -> Tensor:
    """Return dense attention without positions.

    Args:
        query: [B, N, D].
        key_value: [B, M, 2 * D], keys and then values.
        num_heads: A divisor of D.
        mask: Keys that are there, [B, 1, 1, M].

    Returns:
        [B, N, D].
    """
    q = rearrange(query, "b n (h d) -> b h n d", h=num_heads)
    k, v = rearrange(key_value, "b n (two h d) -> two b h n d", two=2, h=num_heads)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return rearrange(attended, "b h n d -> b n (h d)")


def cut_windows(x: Tensor, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Cut patches into windows, row by row. The last of odd rows and columns are filled up.

    Args:
        x: Patches [B, N, D].
        rows: Their rows.
        size: Rows and columns of a window.

    Returns:
        Patches [B, windows, size^2, D] with zeros where there are none, and a mask of those that
        there are, [windows, size^2].
    """
    image = rearrange(x, "b (y x) d -> b y x d", y=rows)
    right, below = -image.shape[2] % size, -rows % size
    image = F.pad(image, (0, 0, 0, right, 0, below))
    there = F.pad(x.new_ones(rows, x.shape[1] // rows, dtype=torch.bool), (0, right, 0, below))
    windows = rearrange(image, "b (y wy) (x wx) d -> b (y x) (wy wx) d", wy=size, wx=size)
    return windows, rearrange(there, "(y wy) (x wx) -> (y x) (wy wx)", wy=size, wx=size)


class Pool(nn.Module):
    """Attention over each 2 x 2 patches, a token of each: [B, T, 1, N, D] -> [B, ceil(N / 4), D].

    The taps of a patch stand side by side. The mean of a window is the query, its patches are keys
    and values: Molmo's connector before its projector (arXiv 2409.17146, section 2;
    `attention_meanq` in github.com/allenai/molmo). At the edge of an odd grid a window has fewer
    patches, as in Molmo2; Molmo takes zeros for those that are missing.
    """

    takes_rows = True

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.window = shortcut.mixer.window
        self.num_heads = get_num_heads(dim)
        self.out_dim = dim
        self.query = nn.Linear(len(shortcut.taps) * dim, dim)
        self.key_value = nn.Linear(len(shortcut.taps) * dim, 2 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        patches = rearrange(x[:, :, 0], "b t n d -> b n (t d)")
        windows, there = cut_windows(patches, rows or self.rows, self.window)
        query = windows.sum(2, keepdim=True) / there.sum(1).view(-1, 1, 1)
        mask = there.repeat(len(x), 1)[:, None, None]
        attended = compute_attention(
            self.query(query).flatten(0, 1),
            self.key_value(windows).flatten(0, 1),
            self.num_heads,
            mask=mask,
        )
        return self.output(rearrange(attended, "(b n) one d -> b (n one) d", b=len(x)))


def split_query(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split [B, T, G, N, D] into the coarse patches of the last tap and everything else.

    Returns:
        [B, N, D], and [B, (T * G - 1) * N, D].
    """
    num_taps, num_grains = x.shape[1:3]
    query = (num_taps - 1) * num_grains
    flat = rearrange(x, "b t g n d -> b (t g) n d")
    others = torch.cat([flat[:, :query], flat[:, query + 1 :]], dim=1)
    return x[:, -1, 0], rearrange(others, "b g n d -> b (g n) d")


class Attend(nn.Module):
    """Coarse patches of the last tap attend to everything else: [B, T, G, N, D] -> [B, N, D].

    One post-norm transformer block with a 4x feed-forward, without positions. With one tap it is
    SparseCut's released `cross_attention` (arXiv 2602.00505), whose keys are the fine patches.
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int) -> None:
        super().__init__()
        self.num_heads = get_num_heads(dim)
        self.out_dim = dim
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        coarse, others = split_query(x)
        attended = compute_attention(self.query(coarse), self.key_value(others), self.num_heads)
        x = self.norm1(coarse + self.output(attended))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Enrich(nn.Module):
    """Coarse patches v of the last tap, plus what attention adds: [B, T, G, N, D] -> [B, N, D].

    v + g1 * (c + g2 * self_attention(c)), where c attends from v to everything else. The vectors g1
    and g2 start at zero, so the mixer starts as `Pick`. This is MMFuser (arXiv 2410.11829) with
    dense attention in place of the authors' deformable kernel.
    """

    def __init__(self, shortcut: Shortcut, plan: Plan, dim: int, rows: int) -> None:
        super().__init__()
        self.num_heads = get_num_heads(dim)
        self.out_dim = dim
        self.norm_query = nn.LayerNorm(dim)
        self.norm_others = nn.LayerNorm(dim)
        self.norm_self = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)
        self.self_query = nn.Linear(dim, dim)
        self.self_key_value = nn.Linear(dim, 2 * dim)
        self.self_output = nn.Linear(dim, dim)
        self.gate_cross = nn.Parameter(torch.zeros(dim))
        self.gate_self = nn.Parameter(torch.zeros(dim))

    def initial_values(self) -> Iterator[tuple[Tensor, float]]:
        """Yield the parameters of this module alone, with their start values."""
        yield self.gate_cross, 0.0
        yield self.gate_self, 0.0

    def forward(self, x: Tensor) -> Tensor:
        coarse, others = split_query(x)
        query = self.query(self.norm_query(coarse))
        key_value = self.key_value(self.norm_others(others))
        cross = self.output(compute_attention(query, key_value, self.num_heads))
        normed = self.norm_self(cross)
        query = self.self_query(normed)
        attended = compute_attention(query, self.self_key_value(normed), self.num_heads)
        return coarse + self.gate_cross * (cross + self.gate_self * self.self_output(attended))


def build_mixer(
    shortcut: Shortcut, plan: Plan, dim: int, rows: int, language_dim: int | None = None
) -> nn.Module:
    """Make the module of a shortcut's mixer.

    Args:
        shortcut: The shortcut.
        plan: The plan that it belongs to.
        dim: D, the encoder's width.
        rows: Patch rows of one view.
        language_dim: H, the language model's width; mixers that read prompts need it.
    """
    mixer_class = shortcut.mixer.module
    if isinstance(mixer_class, str):  # kinds.py imports no torch, so it names classes
        mixer_class = globals()[mixer_class]
    further = (language_dim,) if shortcut.mixer.needs_prompt else ()
    return mixer_class(shortcut, plan, dim, rows, *further)
