"""How the picture world's encoder is made: a CLIP vision transformer that learns to name what
regions show.

Phase 1 reads shape and colour from the top and texture, shade, lines and digit from a shallow block, in coarse and in fine
views; a region is a cell of the layout, which in the small world is the whole of a fine view. Phase 2 freezes the lower
half and trains the upper half further on shape and colour alone, under Gaussian noise on the normalised last two states.
That noise is a deliberate knob: it makes the top spend its variance on what captions say, as large-scale caption training
does, and without it a small encoder keeps fine detail within easy reach of its top, so that several taps have nothing to
add (docs/results.md).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from .questions import split_scene
from .scenes import COLOURS, DIGITS, LINES, SHADES, SHAPES, TEXTURES, draw
from .sizes import SMALL, Size, VisionTraining

MEAN, STD = 0.5, 0.25
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "shade": SHADES,
    "texture": TEXTURES,
    "lines": LINES,
    "digit": DIGITS,
}
TOP, SHALLOW = ("shape", "colour"), ("shade", "texture", "lines", "digit")
HIDDEN_IN_COARSE = ("lines", "digit")  # hardly there at half the resolution, so hardly asked for


class Readout(nn.Module):
    """Scores of some attributes of a region: each pools the region's tokens by attention of its
    own. [R, n, D] -> name: [R, answers].
    """

    def __init__(self, names: tuple[str, ...], dim: int):
        super().__init__()
        self.queries = nn.ParameterDict({n: nn.Parameter(0.02 * torch.randn(dim)) for n in names})
        self.heads = nn.ModuleDict({n: nn.Linear(dim, len(ATTRIBUTES[n])) for n in names})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Normalise, pool, score."""
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        weights = {n: (tokens @ q).softmax(-1) for n, q in self.queries.items()}
        return {
            n: head(torch.einsum("rn,rnd->rd", weights[n], tokens))
            for n, head in self.heads.items()
        }


class Views:
    """Pictures of the pre-training split as uint8 views with the attributes of their cells (-100
    where empty), on one device.
    """

    def __init__(self, count: int, size: Size = SMALL, device: str = "cpu"):
        self.cells, self.device = size.rows // 2, device
        if size.ahead:
            workers = max(1, min(os.cpu_count() or 1, count // 100))
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                drawn = list(
                    pool.map(
                        partial(_views_of, size),
                        range(count),
                        chunksize=max(1, count // (8 * workers)),
                    )
                )
        else:
            drawn = [_views_of(size, i) for i in range(count)]
        coarse, fine, labels = (torch.from_numpy(np.stack(x)) for x in zip(*drawn, strict=True))
        tiled = rearrange(labels, "n (ty y tx x) a -> n (ty tx) (y x) a", ty=2, tx=2, y=self.cells)
        self.coarse, self.fine, self.labels, self.tiled = (
            x.to(device) for x in (coarse, fine, labels, tiled)
        )

    def batch(self, size: int, fine_views: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [size * (1 + fine_views), 3, S, S], coarse ones first, and the labels of cells in
        coarse and in fine views.
        """
        index = torch.randint(len(self.labels), (size,)).to(self.device)
        tiles = torch.randint(4, (size, fine_views)).to(self.device)
        views = torch.cat([self.coarse[index], self.fine[index[:, None], tiles].flatten(0, 1)])
        pixels = (rearrange(views, "v y x c -> v c y x").float() / 255 - MEAN) / STD
        return (
            pixels,
            self.labels[index].flatten(0, 1),
            self.tiled[index[:, None], tiles].flatten(0, 2),
        )


def _views_of(size: Size, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scene = split_scene(f"pretrain/0/{number}", size)
    picture = draw(scene)
    rows = np.full((size.rows**2, len(ATTRIBUTES)), -100)
    for t in scene.things:
        rows[t.place] = t.shape, t.colour, t.shade, t.texture, t.lines, t.digit
    fine = rearrange(np.asarray(picture), "(ty y) (tx x) c -> (ty tx) y x c", ty=2, tx=2)
    return np.asarray(picture.resize((size.coarse, size.coarse), 3)), fine, rows


def pretrain_vision(
    *,
    seed: int = 0,
    noise: float = 3.0,
    size: Size = SMALL,
    training: VisionTraining | None = None,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> tuple[CLIPVisionModel, dict[str, float]]:
    """Train the encoder; returns it with the running share of right readings of every attribute,
    coarse and fine.

    training: pictures, steps and rates; by default the size's own. On a CUDA device it computes in
    bfloat16, on a CPU as in the shipped weights, on as many threads as torch is given.
    """
    torch.manual_seed(seed)
    training = training or size.vision_training
    views, encoder = (
        Views(training.pictures, size, device),
        CLIPVisionModel(CLIPVisionConfig(**size.vision)).to(device),
    )
    dim = size.vision["hidden_size"]
    top, shallow = Readout(TOP, dim).to(device), Readout(SHALLOW, dim).to(device)
    parts = [(top, -1), (shallow, size.shallow_state)]
    with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda"):
        _train(encoder, parts, views, training, 0, 0.0, lambda s: log(f"vision, naming: {s}"))
        shares = _shares(encoder, parts, views, training.checked)
        encoder.requires_grad_(False)
        blocks = next(m for m in encoder.modules() if isinstance(m, nn.ModuleList))
        blocks[len(blocks) // 2 :].requires_grad_(True)
        parts = [(Readout(TOP, dim).to(device), -1), (Readout(TOP, dim).to(device), -2)]
        if noise:
            _train(
                encoder,
                parts,
                views,
                training,
                1,
                noise,
                lambda s: log(f"vision, captions only: {s}"),
            )
    return encoder.requires_grad_(True).eval().cpu(), shares


def _train(encoder, parts, views, training: VisionTraining, phase: int, noise, log) -> None:
    steps, warmup = training.steps[phase], training.warmup
    parameters = [
        p
        for m in (encoder, *(readout for readout, _ in parts))
        for p in m.parameters()
        if p.requires_grad
    ]
    optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    for step in range(steps):
        loss = torch.zeros((), device=views.device)
        for name, scores, goal, coarse in _readings(encoder, parts, views, training.batch, noise):
            weight = 0.1 if coarse and name in HIDDEN_IN_COARSE else 1.0
            loss = loss + weight * F.cross_entropy(scores, goal, ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            log(f"step {step + 1} of {steps}, loss {loss.item():.2f}")


def _readings(encoder, parts, views: Views, batch: int, noise: float):
    """(attribute, scores, right answers, whether coarse) for the cells of a batch's coarse and fine
    views.
    """
    pixels, in_coarse, in_fine = views.batch(batch)
    states = encoder(pixels, output_hidden_states=True).hidden_states
    for readout, which in parts:
        state = states[which][:, 1:]
        if noise:
            state = F.layer_norm(state, state.shape[-1:])
            state = state + noise * torch.randn_like(state)
        for some, labels, cells, coarse in (
            (state[:batch], in_coarse, 2 * views.cells, True),
            (state[batch:], in_fine, views.cells, False),
        ):
            side = math.isqrt(state.shape[1]) // cells
            tokens = rearrange(
                some, "v (cy y cx x) d -> (v cy cx) (y x) d", cy=cells, y=side, cx=cells
            )
            for name, scores in readout(tokens).items():
                yield name, scores, labels[:, list(ATTRIBUTES).index(name)], coarse


@torch.no_grad()
def _shares(encoder, parts, views: Views, number: int) -> dict[str, float]:
    shares = {}
    for name, scores, goal, coarse in _readings(encoder, parts, views, number, 0.0):
        right = (scores.argmax(-1) == goal)[goal >= 0].float().mean().item()
        shares[f"{name}, {'coarse' if coarse else 'fine'} view"] = round(right, 3)
    return shares
