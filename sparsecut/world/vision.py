"""How the picture world's encoder was made: an 8-block CLIP vision transformer that learns to name what regions show.

Phase 1 reads shape and colour from the top and texture, shade, lines and digit from the third block, in coarse views (a
region is a quadrant) and fine ones (the whole view). Phase 2 freezes the lower half and trains the upper half further on
shape and colour alone, under Gaussian noise on the normalised last two states. That noise is a deliberate knob: it makes
the top spend its variance on what captions say, as large-scale caption training does, and without it a small encoder
keeps fine detail within easy reach of its top, so that several taps have nothing to add (docs/results.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from .questions import split_scene
from .scenes import CELL, COLOURS, DIGITS, LINES, SHADES, SHAPES, TEXTURES, draw

MEAN, STD = 0.5, 0.25
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "shade": SHADES, "texture": TEXTURES, "lines": LINES, "digit": DIGITS}
TOP, SHALLOW, SHALLOW_STATE = ("shape", "colour"), ("shade", "texture", "lines", "digit"), 3
HIDDEN_IN_COARSE = ("lines", "digit")  # hardly there at half the resolution, so hardly asked for
CONFIG = {
    "hidden_size": 96,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "image_size": CELL,
    "patch_size": 12,
    "hidden_act": "gelu",
}


class Readout(nn.Module):
    """Scores of some attributes of a region: each pools the region's tokens by attention of its own. [R, n, D] -> name: [R, answers]."""

    def __init__(self, names: tuple[str, ...], dim: int):
        super().__init__()
        self.queries = nn.ParameterDict({n: nn.Parameter(0.02 * torch.randn(dim)) for n in names})
        self.heads = nn.ModuleDict({n: nn.Linear(dim, len(ATTRIBUTES[n])) for n in names})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Normalise, pool, score."""
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        weights = {n: (tokens @ q).softmax(-1) for n, q in self.queries.items()}
        return {n: head(torch.einsum("rn,rnd->rd", weights[n], tokens)) for n, head in self.heads.items()}


class Views:
    """Pictures of the pre-training split as uint8 views with the attributes of their quadrants (-100 where empty)."""

    def __init__(self, count: int):
        coarse, fine, labels = [], [], []
        for i in range(count):
            scene = split_scene(f"pretrain/0/{i}")
            picture = draw(scene)
            coarse.append(np.asarray(picture.resize((CELL, CELL), 3)))
            fine.append(rearrange(np.asarray(picture), "(ty y) (tx x) c -> (ty tx) y x c", ty=2, tx=2))
            rows = np.full((4, len(ATTRIBUTES)), -100)
            for t in scene.things:
                rows[t.place] = t.shape, t.colour, t.shade, t.texture, t.lines, t.digit
            labels.append(rows)
        self.coarse, self.fine, self.labels = (torch.from_numpy(np.stack(x)) for x in (coarse, fine, labels))

    def batch(self, size: int, fine_views: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [size * (1 + fine_views), 3, S, S], coarse ones first, and the labels of coarse quadrants and of fine views."""
        index = torch.randint(len(self.labels), (size,))
        tiles = torch.randint(4, (size, fine_views))
        views = torch.cat([self.coarse[index], self.fine[index[:, None], tiles].flatten(0, 1)])
        pixels = (rearrange(views, "v y x c -> v c y x").float() / 255 - MEAN) / STD
        return pixels, self.labels[index].flatten(0, 1), self.labels[index[:, None], tiles].flatten(0, 1)


def pretrain_vision(
    *,
    seed: int = 0,
    noise: float = 3.0,
    pictures: int = 16000,
    steps: tuple[int, int] = (3000, 500),
    batch: int = 16,
    say: Callable[[str], None] = print,
) -> tuple[CLIPVisionModel, dict[str, float]]:
    """Train the encoder on one thread; returns it with the running share of right readings of every attribute, coarse and fine."""
    torch.manual_seed(seed)
    views, encoder = Views(pictures), CLIPVisionModel(CLIPVisionConfig(**CONFIG))
    dim = CONFIG["hidden_size"]
    top, shallow = Readout(TOP, dim), Readout(SHALLOW, dim)
    parts = [(top, -1), (shallow, SHALLOW_STATE)]
    _train(encoder, parts, views, steps[0], batch, 1.5e-3, 0.0, lambda s: say(f"vision, naming: {s}"))
    shares = _shares(encoder, parts, views)
    encoder.requires_grad_(False)
    blocks = next(m for m in encoder.modules() if isinstance(m, nn.ModuleList))
    blocks[len(blocks) // 2 :].requires_grad_(True)
    parts = [(Readout(TOP, dim), -1), (Readout(TOP, dim), -2)]
    if noise:
        _train(encoder, parts, views, steps[1], batch, 1.5e-3, noise, lambda s: say(f"vision, captions only: {s}"))
    return encoder.requires_grad_(True).eval(), shares


def _train(encoder, parts, views, steps, batch, rate, noise, say) -> None:
    parameters = [p for m in (encoder, *(readout for readout, _ in parts)) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 50) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    for step in range(steps):
        loss = torch.zeros(())
        for name, scores, goal, coarse in _readings(encoder, parts, *views.batch(batch), noise):
            weight = 0.1 if coarse and name in HIDDEN_IN_COARSE else 1.0
            loss = loss + weight * F.cross_entropy(scores, goal, ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            say(f"step {step + 1} of {steps}, loss {loss.item():.2f}")


def _readings(encoder, parts, pixels: Tensor, quadrants: Tensor, fine: Tensor, noise: float):
    """(attribute, scores, right answers, whether coarse) for both kinds of region."""
    states = encoder(pixels, output_hidden_states=True).hidden_states
    num_coarse = len(quadrants) // 4
    for readout, which in parts:
        state = states[which][:, 1:]
        if noise:
            state = F.layer_norm(state, state.shape[-1:])
            state = state + noise * torch.randn_like(state)
        cells = rearrange(state[:num_coarse], "v (cy y cx x) d -> (v cy cx) (y x) d", cy=2, y=2, cx=2)
        for tokens, labels, coarse in ((cells, quadrants, True), (state[num_coarse:], fine, False)):
            for name, scores in readout(tokens).items():
                yield name, scores, labels[:, list(ATTRIBUTES).index(name)], coarse


@torch.no_grad()
def _shares(encoder, parts, views: Views) -> dict[str, float]:
    shares = {}
    for name, scores, goal, coarse in _readings(encoder, parts, *views.batch(512), 0.0):
        right = (scores.argmax(-1) == goal)[goal >= 0].float().mean().item()
        shares[f"{name}, {'coarse' if coarse else 'fine'} view"] = round(right, 3)
    return shares
