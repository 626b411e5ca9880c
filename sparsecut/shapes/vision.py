"""How the encoder is made: a CLIP vision transformer that learns to name what regions show.

Phase 1 reads shape and colour from the top, and texture, shade, lines and digit from a shallow
block, in coarse and in fine views. A region is a cell of the layout, which in the small size is the
whole of a fine view. Phase 2 freezes the lower half and trains the upper half further on shape and
colour alone, under Gaussian noise on the normalised last two states.

That noise is a deliberate knob. It makes the top spend its variance on what captions say, as
large-scale caption training does. Without it a small encoder keeps fine detail within easy reach of
its top, so several taps have nothing to add (docs/older-results.md).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..waits import ignore_ctrl_c
from .questions import split_scene
from .scenes import COLOURS, DIGITS, LINES, SHADES, SHAPES, TEXTURES, draw
from .sizes import SMALL, Size, VisionTraining

MEAN = 0.5
STD = 0.25
IGNORED = -100  # label of an empty cell
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "shade": SHADES,
    "texture": TEXTURES,
    "lines": LINES,
    "digit": DIGITS,
}
TOP = ("shape", "colour")
SHALLOW = ("shade", "texture", "lines", "digit")
HIDDEN_IN_COARSE = ("lines", "digit")  # hardly visible at half the resolution
WEIGHT_OF_HIDDEN = 0.1
LOG_EVERY = 100  # steps
IMAGES_PER_WORKER = 100  # one process has drawn so many before another has started


class Readout(nn.Module):
    """Classifies some attributes of a region: [R, n, D] -> {name: [R, answers]}.

    Each attribute pools the region's tokens by attention with a query of its own.
    """

    def __init__(self, names: tuple[str, ...], dim: int):
        super().__init__()
        self.queries = nn.ParameterDict(
            {name: nn.Parameter(0.02 * torch.randn(dim)) for name in names}
        )
        self.heads = nn.ModuleDict({name: nn.Linear(dim, len(ATTRIBUTES[name])) for name in names})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Normalise, pool, classify."""
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        weights = {name: (tokens @ query).softmax(-1) for name, query in self.queries.items()}
        scores = {}
        for name, head in self.heads.items():
            scores[name] = head(torch.einsum("rn,rnd->rd", weights[name], tokens))
        return scores


class Views:
    """The pretraining split's images as uint8 views, with the attributes of their cells.

    Attributes:
        coarse: [images, S, S, 3].
        fine: [images, 4, S, S, 3].
        labels: Attributes of the cells, [images, cells, attributes]; `IGNORED` where empty.
        tiled: The same by fine view, [images, 4, cells of a view, attributes].
    """

    def __init__(self, count: int, size: Size = SMALL, device: str = "cpu"):
        self.cells = size.rows // 2  # per side of a fine view
        self.device = device
        drawn = _draw_all(count, size)
        coarse, fine, labels = (torch.from_numpy(np.stack(x)) for x in zip(*drawn, strict=True))
        tiled = rearrange(labels, "n (ty y tx x) a -> n (ty tx) (y x) a", ty=2, tx=2, y=self.cells)
        self.coarse = coarse.to(device)
        self.fine = fine.to(device)
        self.labels = labels.to(device)
        self.tiled = tiled.to(device)

    def batch(self, size: int, fine_views: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a random batch.

        Args:
            size: Number of images.
            fine_views: Fine views of each.

        Returns:
            Pixels [size * (1 + fine_views), 3, S, S], coarse views first; labels of the coarse
            views' cells; labels of the fine views' cells.
        """
        index = torch.randint(len(self.labels), (size,)).to(self.device)
        tiles = torch.randint(4, (size, fine_views)).to(self.device)
        fine = self.fine[index[:, None], tiles].flatten(0, 1)
        views = torch.cat([self.coarse[index], fine])
        pixels = (rearrange(views, "v y x c -> v c y x").float() / 255 - MEAN) / STD
        coarse_labels = self.labels[index].flatten(0, 1)
        fine_labels = self.tiled[index[:, None], tiles].flatten(0, 2)
        return pixels, coarse_labels, fine_labels


def _draw_all(count: int, size: Size) -> list:
    draw_one = partial(_draw, size)
    workers = min(os.cpu_count() or 1, count // IMAGES_PER_WORKER)
    if not size.ahead or workers < 2:
        return [draw_one(number) for number in range(count)]
    chunksize = max(1, count // (8 * workers))
    with ProcessPoolExecutor(workers, get_context("spawn"), ignore_ctrl_c) as pool:
        return list(pool.map(draw_one, range(count), chunksize=chunksize))


def _draw(size: Size, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image's coarse view, fine views and labels."""
    scene = split_scene(f"pretrain/0/{number}", size)
    image = draw(scene)
    labels = np.full((size.rows**2, len(ATTRIBUTES)), IGNORED)
    for thing in scene.things:
        labels[thing.place] = [getattr(thing, name) for name in ATTRIBUTES]
    coarse = image.resize((size.coarse, size.coarse), 3)
    fine = rearrange(np.asarray(image), "(ty y) (tx x) c -> (ty tx) y x c", ty=2, tx=2)
    return np.asarray(coarse), fine, labels


def pretrain_vision(
    *,
    seed: int = 0,
    noise: float = 3.0,
    size: Size = SMALL,
    training: VisionTraining | None = None,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> tuple[CLIPVisionModel, dict[str, float]]:
    """Train the encoder.

    On a CUDA device it computes in bfloat16, on a CPU as for the shipped weights, with as many
    threads as torch has.

    Args:
        seed: Seed of all random choices.
        noise: Standard deviation of phase 2's noise; 0 skips the phase.
        size: The size whose encoder is made.
        training: Images, steps and rates. Default: the size's own.
        device: Where to compute.
        log: Called with a line of progress.

    Returns:
        The encoder, and the accuracy of every attribute in coarse and in fine views.
    """
    torch.manual_seed(seed)
    training = training or size.vision_training
    views = Views(training.images, size, device)
    encoder = CLIPVisionModel(CLIPVisionConfig(**size.vision)).to(device)
    dim = size.vision["hidden_size"]
    top = Readout(TOP, dim).to(device)
    shallow = Readout(SHALLOW, dim).to(device)
    readouts = [(top, -1), (shallow, size.shallow_state)]
    on_cuda = torch.device(device).type == "cuda"
    with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
        _train(
            encoder, readouts, views, training, 0, 0.0, lambda line: log(f"vision, naming: {line}")
        )
        accuracy = _measure_accuracy(encoder, readouts, views, training.checked)
        encoder.requires_grad_(False)
        blocks = next(module for module in encoder.modules() if isinstance(module, nn.ModuleList))
        blocks[len(blocks) // 2 :].requires_grad_(True)
        readouts = [(Readout(TOP, dim).to(device), -1), (Readout(TOP, dim).to(device), -2)]
        if noise:
            _train(
                encoder,
                readouts,
                views,
                training,
                1,
                noise,
                lambda line: log(f"vision, captions only: {line}"),
            )
    return encoder.requires_grad_(True).eval().cpu(), accuracy


def _train(encoder, readouts, views, training: VisionTraining, phase: int, noise, log) -> None:
    steps = training.steps[phase]
    parameters = []
    for module in (encoder, *(readout for readout, _ in readouts)):
        parameters += [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.02)

    def scale_rate(step: int) -> float:
        warm = min(1.0, (step + 1) / training.warmup)
        return warm * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale_rate)
    for step in range(steps):
        loss = torch.zeros((), device=views.device)
        readings = _read(encoder, readouts, views, training.batch, noise)
        for name, scores, labels, is_coarse in readings:
            weight = WEIGHT_OF_HIDDEN if is_coarse and name in HIDDEN_IN_COARSE else 1.0
            loss = loss + weight * F.cross_entropy(scores, labels, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % LOG_EVERY == 0 or step == steps - 1:
            log(f"step {step + 1} of {steps}, loss {loss.item():.2f}")


def _read(
    encoder, readouts, views: Views, batch: int, noise: float
) -> Iterator[tuple[str, Tensor, Tensor, bool]]:
    """Read a batch's cells; yields (attribute, scores, labels, whether from coarse views)."""
    pixels, coarse_labels, fine_labels = views.batch(batch)
    states = encoder(pixels, output_hidden_states=True).hidden_states
    for readout, layer in readouts:
        state = states[layer][:, 1:]
        if noise:
            state = F.layer_norm(state, state.shape[-1:])
            state = state + noise * torch.randn_like(state)
        coarse = _split_into_cells(state[:batch], 2 * views.cells)
        for name, scores in readout(coarse).items():
            yield name, scores, coarse_labels[:, list(ATTRIBUTES).index(name)], True
        fine = _split_into_cells(state[batch:], views.cells)
        for name, scores in readout(fine).items():
            yield name, scores, fine_labels[:, list(ATTRIBUTES).index(name)], False


def _split_into_cells(state: Tensor, cells: int) -> Tensor:
    """Tokens by cell: [views, N, D] -> [views * cells^2, N / cells^2, D]."""
    side = math.isqrt(state.shape[1]) // cells
    return rearrange(state, "v (cy y cx x) d -> (v cy cx) (y x) d", cy=cells, y=side, cx=cells)


@torch.no_grad()
def _measure_accuracy(encoder, readouts, views: Views, number: int) -> dict[str, float]:
    accuracy = {}
    for name, scores, labels, is_coarse in _read(encoder, readouts, views, number, 0.0):
        correct = (scores.argmax(-1) == labels)[labels >= 0].float().mean().item()
        accuracy[f"{name}, {'coarse' if is_coarse else 'fine'} view"] = round(correct, 3)
    return accuracy
