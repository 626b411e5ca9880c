"""Statistics of each shortcut while it is trained: its gradient, and how much it adds.

They are measured on logged steps alone, so that they cost next to nothing. A shortcut whose
gradient stays exactly zero is dead, and a warning names it. Another warning comes where shortcuts
add much and learn nothing: the language model has come to ignore them, and the image with them.
"""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager

import torch
from torch import Tensor

from ..hooks import observe_injections

PATIENCE = 3  # logged steps with images and no gradient before a shortcut is called dead
# A model on DINOv2 that a tenfold rate had made blind had ratios of 0.8 to 1.8, and its shortcuts
# had 0.2 to 1.2 % of the whole gradient, those into the input at most 2.7 %. At a suitable rate the
# ratio stayed below 0.2.
LARGE_RATIO = 0.5
SMALL_SHARE = 0.02
LEARNING_SHARE = 0.05  # of the whole gradient: less in all shortcuts means that none learns
BLIND_PATIENCE = 5  # logged steps in a row
LOWER = 10  # times lower is the rate that a warning names
logger = logging.getLogger(__name__)


class ShortcutMonitor:
    """Measures a fusion's shortcuts.

    `get_statistics` gives one dict per shortcut, with these keys:

    - number, layer: which shortcut, and the decoder layer it adds to.
    - grad_norm: norm of the gradient of its own parameters (its group's, where the plan shares
      them) and of its gate, over the whole step, before clipping.
    - ratio: mean norm of what is added at image tokens, divided by the mean norm of the hidden
      states there, in this process's last micro-batch. Shortcuts into one layer share it, and the
      model's input has none.

    A figure is left out where it cannot be known: in a batch without images, a compiled model, or
    with DeepSpeed.

    Args:
        fusion: The fusion.
        stage: The stage's name, for warnings.
        compiled: Whether the model is compiled, so that nothing can be observed in its forward.
        rate: The stage's learning rate of the fusion, for warnings; None where it is not known.
    """

    def __init__(self, fusion, stage: str, *, compiled: bool = False, rate: float | None = None):
        self.fusion = fusion
        self.stage = stage
        self.compiled = compiled
        self.rate = rate
        self._grad_norms: dict[int, float] = {}
        self._ratios: dict[int, Tensor] = {}
        self._is_warned = False
        self._blind_steps = 0  # logged steps in a row, since one of them was not blind
        # Logged steps in a row without any gradient, by shortcut.
        self._zero_steps = dict.fromkeys(range(len(fusion.plan.shortcuts)), 0)

    @contextmanager
    def observe(self, enabled: bool):
        """Observe the forward pass inside the block, where it belongs to a logged step."""
        if not enabled or self.compiled:
            yield
            return
        self._ratios = {}
        with observe_injections(self._record_ratio):
            yield

    def _record_ratio(self, layer: int, hidden: Tensor, features: Tensor) -> None:
        hidden_norm = hidden.detach().float().norm(dim=-1).mean()
        feature_norm = features.detach().float().norm(dim=-1).mean()
        self._ratios[layer] = feature_norm / hidden_norm.clamp(min=1e-12)

    def record_gradients(self, has_images: bool, scale: float = 1.0) -> None:
        """Record the gradients of a whole step, and warn of a dead shortcut.

        Args:
            has_images: Whether the step has images. Without any, no gradient is expected.
            scale: The loss scale that the gradients still contain.
        """
        self._grad_norms = {}
        for number in self._zero_steps:
            squares = self._squared_gradients(number)
            if not squares:
                continue
            norm = (sum(squares).sqrt() / scale).item()
            self._grad_norms[number] = norm
            is_zero = has_images and norm == 0
            self._zero_steps[number] = self._zero_steps[number] + 1 if is_zero else 0
            if self._zero_steps[number] == PATIENCE:
                self._warn_dead(number)

    def _squared_gradients(self, number: int) -> list[Tensor]:
        """Sums of squared gradients of a shortcut's parameters and gate; empty without any."""
        squares = []
        for parameter in get_shortcut_parameters(self.fusion, number):
            if parameter.grad is not None:
                squares.append(_gather(parameter.grad.float().square().sum()))
        gate_gradient = self.fusion.gates.grad
        if number in self.fusion.gated and gate_gradient is not None:
            position = self.fusion.gated.index(number)
            squares.append(_gather(gate_gradient.float())[position].square().sum())
        return squares

    def _warn_dead(self, number: int) -> None:
        shortcut = self.fusion.plan.shortcuts[number]
        logger.warning(
            "stage %s: shortcut %d (taps %s into layer %d) had no gradient in %d logged steps with"
            " images, so it is dead; check whether its gate and projector are all zero, or leave it"
            " out",
            self.stage,
            number,
            list(shortcut.taps),
            shortcut.layer,
            PATIENCE,
        )

    def watch(self, whole_norm: float | None) -> None:
        """Warn once where shortcuts drown the hidden states, but learn next to nothing.

        Args:
            whole_norm: The norm of all gradients of the recorded step; None where it is not known.
        """
        blind = self._find_blind(whole_norm) if whole_norm else []
        self._blind_steps = self._blind_steps + 1 if blind else 0
        if self._blind_steps == BLIND_PATIENCE and not self._is_warned:
            self._is_warned = True
            self._warn_blind(blind, whole_norm)

    def _find_blind(self, whole_norm: float) -> list[dict]:
        """Statistics of the shortcuts that add much while their gradients vanish."""
        blind = []
        for figures in self.get_statistics():
            is_large = figures.get("ratio", 0.0) > LARGE_RATIO
            share = figures.get("grad_norm", math.inf) / whole_norm
            if is_large and share < SMALL_SHARE:
                blind.append(figures)
        return blind

    def _warn_blind(self, blind: list[dict], whole_norm: float) -> None:
        largest = max(blind, key=lambda figures: figures["ratio"])
        remedy = "set a lower learning rate of fusion (lr.fusion)"
        if self.rate:
            remedy = (
                f"lower the learning rate of fusion, which is {self.rate:g}, for example"
                f" lr.fusion: {self.rate / LOWER:g}"
            )
        logger.warning(
            "stage %s: what shortcut %d adds before layer %d is %.1f times as large as the hidden"
            " states there, but its gradient is %.1f %% of the whole: the language model has come"
            " to ignore it, %s; stop, and %s, or raise warmup_steps",
            self.stage,
            largest["number"],
            largest["layer"],
            largest["ratio"],
            100 * largest["grad_norm"] / whole_norm,
            self._describe_others(whole_norm),
            remedy,
        )

    def _describe_others(self, whole_norm: float) -> str:
        """Whether any shortcut still learns, those into the input included."""
        norms = [figures.get("grad_norm", 0.0) for figures in self.get_statistics()]
        share = max(norms) / whole_norm
        if share < LEARNING_SHARE:
            return f"and is blind to the image, as no shortcut has over {100 * share:.1f} %"
        return f"though not the image, as another one has {100 * share:.1f} %"

    def get_statistics(self) -> list[dict]:
        """Statistics of every shortcut as of the last recorded step, as `log.jsonl` holds them."""
        statistics = []
        for number, shortcut in enumerate(self.fusion.plan.shortcuts):
            figures = {}
            if number in self._grad_norms:
                figures["grad_norm"] = float(self._grad_norms[number])
            if shortcut.layer and shortcut.layer in self._ratios:
                figures["ratio"] = float(self._ratios[shortcut.layer])
            if figures:
                statistics.append({"number": number, "layer": shortcut.layer, **figures})
        return statistics


def get_shortcut_parameters(fusion, number: int) -> list[torch.nn.Parameter]:
    """Trained parameters of one shortcut, without its gate.

    These are its projector (its group's), its correction, and the context gate of its layer.
    """
    modules = [
        projector
        for projector, members in zip(fusion.paths, fusion.groups, strict=True)
        if number in members
    ]
    if (correction := fusion.get_correction(number)) is not None:
        modules.append(correction)
    layer = str(fusion.plan.shortcuts[number].layer)
    if layer in fusion.context:
        modules.append(fusion.context[layer])
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return [parameter for parameter in parameters if parameter.requires_grad]


def _gather(value: Tensor) -> Tensor:
    """A value that may be sharded over processes, whole."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
