"""The trained part of a model: encoder states in, features of every decoder layer out.

Shapes use the letters of mixers.py, and H for the width of the language model:
[B, T, G, N, D] -> mixer -> [B, N', D'] -> projector -> [B, N', H].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .gates import ContextGate, SizeGate, ZeroContextGate
from .mixers import arrange_grains, build_mixer
from .plan import GATES, Plan
from .schema import UserError

CONTEXT_GATES = {gate.__name__: gate for gate in (ContextGate, ZeroContextGate, SizeGate)}
logger = logging.getLogger(__name__)

Start = float | tuple[float, float]  # a constant, or bounds of a uniform distribution


class ShortcutProjector(nn.Module):
    """A mixer and a two-layer projector with an exact GELU: [B, T, G, N, D] -> [B, N', H].

    Args:
        mixer: The mixer's module.
        inner_dim: Width between the two layers.
        language_dim: H.
    """

    def __init__(self, mixer: nn.Module, inner_dim: int, language_dim: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.linear_1 = nn.Linear(mixer.out_dim, inner_dim)
        self.linear_2 = nn.Linear(inner_dim, language_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix and project features: [B, T, G, N, D] -> [B, N', H]."""
        return self.project(self.mixer(x))

    def project(self, mixed: Tensor) -> Tensor:
        """Project mixed features: [B, N', D'] -> [B, N', H]."""
        return self.linear_2(F.gelu(self.linear_1(mixed)))


class LowRankCorrection(nn.Module):
    """What one shortcut adds to a shared projector, through `rank` channels. It starts at zero.

    Args:
        mixed_dim: D', the width of mixed features.
        rank: Number of channels between the two layers.
        language_dim: H.
    """

    def __init__(self, mixed_dim: int, rank: int, language_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(mixed_dim, rank, bias=False)
        self.up = nn.Linear(rank, language_dim, bias=False)

    def forward(self, mixed: Tensor) -> Tensor:
        """Correct mixed features: [B, N', D'] -> [B, N', H]."""
        return self.up(self.down(mixed))


class Fusion(nn.Module):
    """All shortcuts of a plan. Shortcuts that share weights are computed in one batched call.

    Args:
        plan: A plan that was checked against the depths of both models.
        vision_depth: Number of encoder blocks, which turns negative taps into numbers from 0.
        vision_dim: Width of the encoder, D.
        language_dim: Width of the language model, H.
        rows: Patch rows of a view.
        num_under: Patches under one image token, side by side, for models that merge patches.
        tap_widths: Channels of each tap from 0 on, where zeros follow them up to `vision_dim`.

    Attributes:
        main: The number of the first shortcut into the input, which has no gate.
        gated: The numbers of all other shortcuts, in the order of `gates`.
        groups: For each path, the numbers of the shortcuts that use it.
        sources: For each shortcut, the number of the first one with the same features before
            corrections and gates. Without `tied`, its own.
        taps: For each shortcut, its taps as tuples of states whose mean they are, from 0.
        paths: `ShortcutProjector`s, one for each shortcut, or one for each kind of shortcut where
            the plan is shared.
        corrections: `LowRankCorrection`s by the shortcut's number. Where the plan is tied, the
            first gated shortcut of equal taps has it for all of them.
        context: Gate modules by the layer's number.
        gates: A factor for each gated shortcut. It is a buffer where the plan trains none, so that
            no stage can change it.
        off: The numbers of shortcuts that are switched off.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        vision_depth: int,
        vision_dim: int,
        language_dim: int,
        rows: int,
        num_under: int = 1,
        tap_widths: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.plan = plan
        self.rows = rows
        self.vision_dim = vision_dim
        self.tap_widths = tuple(tap_widths)
        self.main = plan.input_number
        self.gated = [i for i in range(len(plan.shortcuts)) if i != self.main]
        self.taps = _resolve_taps(plan, vision_depth)
        everyone = range(len(plan.shortcuts))
        self.sources = _find_sources(plan, self.taps, everyone)
        self._owners = _find_sources(plan, self.taps, self.gated)
        self.groups = _group_by_weights(plan, self.sources)
        self.off: frozenset[int] = frozenset()
        self.paths = self._build_paths(num_under * vision_dim, language_dim)
        self.corrections = self._build_corrections(language_dim)
        self.context = self._build_gate_modules(language_dim)
        gates = self._build_gates(language_dim)
        if GATES[plan.gate].factor and self.gated:
            self.gates = nn.Parameter(gates)
        else:
            self.register_buffer("gates", gates)

    @classmethod
    def from_config(cls, config: Any) -> Fusion:
        """Return the fusion of a built model, its weights not yet drawn.

        Args:
            config: The model's `SparseCutConfig`.
        """
        grid = config.grid
        return cls(
            config.get_plan(),
            vision_depth=config.vision_depth,
            vision_dim=grid.width,
            language_dim=config.text_config.get_text_config().hidden_size,
            rows=grid.rows,
            tap_widths=grid.tap_widths,
        )

    def _build_paths(self, mixed_dim: int, language_dim: int) -> nn.ModuleList:
        plan = self.plan
        paths = nn.ModuleList()
        for members in self.groups:
            first = plan.shortcuts[members[0]]
            mixer = build_mixer(first, plan, mixed_dim, self.rows, language_dim)
            is_narrow = plan.rank is not None and not plan.shared and self.main not in members
            inner_dim = plan.rank if is_narrow else language_dim
            paths.append(ShortcutProjector(mixer, inner_dim, language_dim))
        return paths

    def _build_corrections(self, language_dim: int) -> nn.ModuleDict:
        corrections = nn.ModuleDict()
        if self.plan.rank is None or not self.plan.shared:
            return corrections
        for i in dict.fromkeys(self._owners.values()):
            dim = self.get_path(i).mixer.out_dim
            corrections[str(i)] = LowRankCorrection(dim, self.plan.rank, language_dim)
        return corrections

    def _build_gate_modules(self, language_dim: int) -> nn.ModuleDict:
        modules = nn.ModuleDict()
        gate_class = GATES[self.plan.gate].module
        if gate_class is None:
            return modules
        if isinstance(gate_class, str):  # kinds.py imports no torch, so it names classes
            gate_class = CONTEXT_GATES[gate_class]
        layers = [s.layer for s in self.plan.shortcuts]
        for layer in self.plan.layers:
            modules[str(layer)] = gate_class(layers.count(layer), language_dim)
        return modules

    def _build_gates(self, language_dim: int) -> Tensor:
        gate = GATES[self.plan.gate]
        shape = (language_dim,) if gate.factor == "channel" else ()
        return torch.full((len(self.gated), *shape), gate.start)

    def get_path(self, number: int) -> ShortcutProjector:
        """Return the mixer and projector of a shortcut, which others may share."""
        return next(
            path for path, members in zip(self.paths, self.groups, strict=True) if number in members
        )

    def get_correction(self, number: int) -> LowRankCorrection | None:
        """Return the correction of a shortcut, which those of equal taps share if it is tied."""
        owner = str(self._owners.get(number))
        if owner not in self.corrections:
            return None
        return self.corrections[owner]

    def get_position(self, number: int) -> int:
        """Return where `forward` has the features of the layer that a shortcut adds to."""
        return self.plan.fused_layers.index(self.plan.shortcuts[number].layer)

    @contextmanager
    def switched_off(self, *shortcuts: int) -> Iterator[None]:
        """Inside the block these shortcuts add zeros. One thread at a time may use it.

        Args:
            shortcuts: Numbers of shortcuts in the plan.

        Raises:
            UserError: The plan has no such shortcut.
        """
        for number in shortcuts:
            if number not in range(len(self.plan.shortcuts)):
                raise UserError(
                    f"there is no shortcut {number}; this plan's are 0 to"
                    f" {len(self.plan.shortcuts) - 1}"
                )
        before = self.off
        self.off = before | set(shortcuts)
        try:
            yield
        finally:
            self.off = before

    def forward(
        self,
        features: Mapping[int, Tensor] | None = None,
        *,
        grains: Mapping[int, Tensor] | None = None,
        grids: Sequence[tuple[int, int]] | None = None,
        prompts: Tensor | None = None,
    ) -> tuple[Tensor | list[Tensor], ...]:
        """Compute what is added before each layer.

        Args:
            features: Encoder states by tap, [B, V, N, D]. V is 1 for taps that are read from the
                coarse view only.
            grains: Given instead where states are normed and arranged already: by tap,
                [B, G, N, D]. G is 1 for the coarse view only.
            grids: Rows and columns of every image, where these differ. `features` are then those
                of all patches, one image after another, [patches, G, D].
            prompts: A vector of the prompt of each image, [B, H], where the plan needs it.

        Returns:
            Features [B, N', H] of each layer of `plan.fused_layers`, in that order; with `grids`
            a list of [N', H]. Features of the shortcuts into one layer are added up. Where the
            layer has a gate module, they stand side by side instead, [B, N', S * H].
        """
        # All work is done in this one call: weights that are sharded between devices are whole
        # inside it only.
        if grids is not None:
            return self._fuse_grids(features, grids, prompts)
        if grains is None:
            grains = {tap: self._arrange(states, tap) for tap, states in features.items()}
        return self._fuse_grains(grains, prompts=prompts)

    def _fuse_grids(
        self, features: Mapping[int, Tensor], grids: Sequence, prompts: Tensor | None
    ) -> tuple:
        """The features of images of several grids; those of one grid together."""
        sizes = [rows * columns for rows, columns in grids]
        images = {tap: self.normalize(x, tap).split(sizes) for tap, x in features.items()}
        fused: list[list] = [[None] * len(grids) for _ in self.plan.fused_layers]
        for grid in dict.fromkeys(grids):
            members = [number for number, other in enumerate(grids) if other == grid]
            grains = {tap: _stack(states, members) for tap, states in images.items()}
            own_prompts = None if prompts is None else prompts[members]
            layers = self._fuse_grains(grains, rows=grid[0], prompts=own_prompts)
            for by_image, features_of_members in zip(fused, layers, strict=True):
                for number, values in zip(members, features_of_members, strict=True):
                    by_image[number] = values
        return tuple(fused)

    def _fuse_grains(self, grains: Mapping[int, Tensor], **inputs: Any) -> tuple[Tensor, ...]:
        """Features of every fused layer; arguments are those of `_compute_shortcuts`."""
        outputs = self._compute_shortcuts(grains, **inputs)
        return tuple(self._combine(layer, outputs) for layer in self.plan.fused_layers)

    def _arrange(self, states: Tensor, tap: int) -> Tensor:
        tiles = self.plan.tiles if states.shape[1] > 1 else 0
        return arrange_grains(self.normalize(states, tap), tiles, self.rows)

    def normalize(self, states: Tensor, tap: int | None = None) -> Tensor:
        """Return encoder states [..., D] in the fusion's dtype, normalized if the plan has `norm`.

        Args:
            states: The states.
            tap: Their tap. Where taps have widths of their own, zeros behind them stay zeros.
        """
        states = states.to(self.paths[0].linear_1.weight.dtype)
        if not self.plan.norm:
            return states
        width = self.tap_widths[tap] if self.tap_widths else self.vision_dim
        normed = F.layer_norm(states[..., :width], (width,))
        return F.pad(normed, (0, self.vision_dim - width)) if width < self.vision_dim else normed

    def _compute_shortcuts(
        self,
        grains: Mapping[int, Tensor],
        rows: int | None = None,
        prompts: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Features [B, N', H] of each shortcut by its number, gates applied.

        `rows` are the patch rows of the images where these differ from the views'.
        """
        outputs: dict[int, Tensor] = {}
        for path, members in zip(self.paths, self.groups, strict=True):
            sources = list(dict.fromkeys(self.sources[i] for i in members))
            inputs = torch.cat([self._gather(grains, i) for i in sources])
            further: tuple = ()
            if self.plan.shortcuts[members[0]].mixer.needs_prompt:
                further = (prompts.repeat(len(sources), 1),)
            elif rows is not None and getattr(path.mixer, "takes_rows", False):
                further = (rows,)
            mixed = path.mixer(inputs, *further)
            projected = path.project(mixed)
            mixed = mixed.unflatten(0, (len(sources), -1)).unbind(0)
            projected = projected.unflatten(0, (len(sources), -1)).unbind(0)
            corrected: dict[int, Tensor] = {}
            for i in members:
                place = sources.index(self.sources[i])
                features = projected[place]
                correction = self.get_correction(i)
                if correction is not None:
                    owner = self._owners[i]
                    if owner not in corrected:
                        corrected[owner] = features + correction(mixed[place])
                    features = corrected[owner]
                outputs[i] = self._scale(i, features)
        return outputs

    def _scale(self, number: int, projected: Tensor) -> Tensor:
        """Apply a shortcut's gate."""
        if number in self.gated:
            projected = projected * self.gates[self.gated.index(number)]
        return torch.zeros_like(projected) if number in self.off else projected

    def _gather(self, grains: Mapping[int, Tensor], number: int) -> Tensor:
        """The input [B, T, G, N, D] of a shortcut's mixer: its taps, and the grains it reads."""
        shortcut = self.plan.shortcuts[number]
        chosen = slice(None)
        if shortcut.mixer.grains != "all":
            chosen = slice(shortcut.grain, shortcut.grain + 1)
        taps = []
        for states in self.taps[number]:
            tensors = [grains[state][:, chosen] for state in states]
            taps.append(tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(0))
        return torch.stack(taps, dim=1)

    def _combine(self, layer: int, outputs: Mapping[int, Tensor]) -> Tensor:
        members = [i for i in sorted(outputs) if self.plan.shortcuts[i].layer == layer]
        features = [outputs[i] for i in members]
        if str(layer) in self.context:
            return torch.cat(features, -1)
        return sum(features[1:], features[0])

    def initial_values(self) -> Iterator[tuple[Tensor, Start]]:
        """Yield every parameter with its start: a constant, or bounds of a uniform distribution.

        Linear layers start as PyTorch's do, uniform within 1 / sqrt(inputs). Those that must have
        no effect at the start are zero.
        """
        zero_layers = [correction.up for correction in self.corrections.values()]
        if GATES[self.plan.gate].zero_projector:
            for path, members in zip(self.paths, self.groups, strict=True):
                if self.main not in members:
                    zero_layers.append(path.linear_2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 0.0 if module in zero_layers else 1 / math.sqrt(module.in_features)
                for parameter in module.parameters():
                    yield parameter, (-bound, bound)
            elif module is not self and hasattr(module, "initial_values"):
                yield from module.initial_values()
        yield self.gates, GATES[self.plan.gate].start


def _stack(states: Sequence[Tensor], members: Sequence[int]) -> Tensor:
    """Some images of one grid, [N, G, D] each, as [images, G, N, D]."""
    stacked = torch.stack([states[number] for number in members])
    return rearrange(stacked, "b n g d -> b g n d").contiguous()


def check_adapted_fusion(fusion: Fusion) -> None:
    """Check that shortcuts can learn, or have learned, where PEFT decides what is trained.

    Args:
        fusion: The shortcuts, also inside PEFT's wrapper for modules that are trained in full.

    Raises:
        UserError: Adapters were put inside, behind gates that are zero and stay so.
    """
    is_closed = isinstance(fusion.gates, nn.Parameter) and fusion.gates.numel() > 0
    is_closed = is_closed and not (fusion.gates.requires_grad or fusion.gates.any())
    is_trained = any(parameter.requires_grad for parameter in fusion.parameters())
    remedy = "give modules_to_save=['fusion'] to PEFT, which trains it in full"
    if is_closed and is_trained:
        raise UserError(
            "adapters were put inside the fusion, but its gates are zero and frozen, so its"
            f" shortcuts would never learn; {remedy}"
        )
    ends = [fusion.get_path(number).linear_2.weight for number in fusion.gated]
    is_zero = GATES[fusion.plan.gate].zero_projector and not any(end.any() for end in ends)
    if not is_trained and (is_closed or is_zero):
        logger.warning(
            f"the shortcuts have learned nothing yet and are frozen, so they do nothing; {remedy}"
        )


def _find_sources(plan: Plan, taps: Sequence, numbers: Iterable[int]) -> dict[int, int]:
    """For each of these shortcuts the first among them that reads and mixes the same, if tied."""
    first: dict[object, int] = {}
    sources = {}
    for i in numbers:
        shortcut = plan.shortcuts[i]
        key = (taps[i], shortcut.mix, shortcut.grain) if plan.tied else i
        sources[i] = first.setdefault(key, i)
    return sources


def _group_by_weights(plan: Plan, sources: Mapping[int, int]) -> list[list[int]]:
    """Numbers of the shortcuts that have weights, those that share a path in one list."""
    groups: dict[object, list[int]] = {}
    for i, shortcut in enumerate(plan.shortcuts):
        if shortcut.mix != "base":
            key = (shortcut.mix, len(shortcut.taps)) if plan.shared else sources[i]
            groups.setdefault(key, []).append(i)
    return list(groups.values())


def _resolve_taps(plan: Plan, vision_depth: int) -> list[tuple[tuple[int, ...], ...]]:
    """The taps of each shortcut as tuples of numbers from 0 to `vision_depth`."""
    resolved = []
    for shortcut in plan.shortcuts:
        groups = []
        for group in shortcut.tap_groups:
            groups.append(tuple(tap % (vision_depth + 1) for tap in group))
        resolved.append(tuple(groups))
    return resolved
