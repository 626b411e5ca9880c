"""What every shortcut does while it is trained: how large its gradient is, and how much it adds to
the states it meets.

Measured on logged steps alone, so that it costs next to nothing. A shortcut whose gradient stays exactly zero is dead, and said to be.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager

import torch
from torch import Tensor

from ..hooks import observe_injections

PATIENCE = 3  # logged steps with pictures and no gradient before a shortcut is called dead
logger = logging.getLogger(__name__)


class ShortcutMonitor:
    """Figures of a fusion's shortcuts, one dict for each: number, layer, grad_norm and, above the
    input, ratio.

    grad_norm: of its own parameters (of its group's where the plan is shared) and its gate, over
    the whole step, before clipping.
    ratio: mean norm of what is added at image tokens over that of the hidden states there, of this
    process's last micro-batch; shortcuts into one layer share it. Either is left out where it
    cannot be known: no picture in the batch, a compiled model, DeepSpeed.
    """

    def __init__(self, fusion, stage: str, *, compiled: bool = False):
        self.fusion, self.stage, self.compiled = fusion, stage, compiled
        self.norms: dict[int, Tensor] = {}
        self.ratios: dict[int, Tensor] = {}
        self.quiet = dict.fromkeys(range(len(fusion.plan.shortcuts)), 0)

    @contextmanager
    def watching(self, wanted: bool):
        """Inside the block, the forward pass of a step that will be logged is looked at."""
        if not wanted or self.compiled:
            yield
            return
        self.ratios = {}
        with observe_injections(self._see):
            yield

    def _see(self, layer: int, hidden: Tensor, features: Tensor) -> None:
        norm = hidden.detach().float().norm(dim=-1).mean()
        self.ratios[layer] = features.detach().float().norm(dim=-1).mean() / norm.clamp(min=1e-12)

    def take_gradients(self, pictures: bool, scale: float = 1.0) -> None:
        """Note the gradients of a whole step; pictures: whether it had any, without which no
        gradient is no news.
        """
        self.norms = {}
        for i in self.quiet:
            learning = [p.grad for p in parameters_of(self.fusion, i) if p.grad is not None]
            squares = [_whole(grad.float().square().sum()) for grad in learning]
            gate = self.fusion.gates.grad
            if i in self.fusion.gated and gate is not None:
                squares.append(_whole(gate.float())[self.fusion.gated.index(i)].square().sum())
            if not squares:
                continue
            self.norms[i] = (sum(squares).sqrt() / scale).item()
            self.quiet[i] = self.quiet[i] + 1 if pictures and self.norms[i] == 0 else 0
            if self.quiet[i] == PATIENCE:
                shortcut = self.fusion.plan.shortcuts[i]
                logger.warning(
                    "stage %s: shortcut %d (taps %s into layer %d) had no gradient in %d logged"
                    " steps with pictures: it is dead; look at its gate and projector (all zero?),"
                    " or leave it out",
                    *(self.stage, i, list(shortcut.taps), shortcut.layer, PATIENCE),
                )

    def figures(self) -> list[dict]:
        """What is known of every shortcut since the last step that was looked at."""
        found = []
        for i, shortcut in enumerate(self.fusion.plan.shortcuts):
            known = {
                "grad_norm": self.norms.get(i),
                "ratio": self.ratios.get(shortcut.layer) if shortcut.layer else None,
            }
            known = {name: float(value) for name, value in known.items() if value is not None}
            if known:
                found.append({"number": i, "layer": shortcut.layer, **known})
        return found


def parameters_of(fusion, i: int) -> list[torch.nn.Parameter]:
    """The learning parameters of shortcut i, without its gate: its path (its group's), its
    correction, its layer's context gate.
    """
    modules = [
        path for path, members in zip(fusion.paths, fusion.groups, strict=True) if i in members
    ]
    layer = str(fusion.plan.shortcuts[i].layer)
    modules += [
        held[name]
        for held, name in ((fusion.corrections, str(i)), (fusion.context, layer))
        if name in held
    ]
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def _whole(value: Tensor) -> Tensor:
    """A value that may be spread over processes, on each of them."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
