"""The trainable part: tapped features of all views in, one feature per image token and target layer
out.

Features flow as [B, T, G, N, D] (mixers.py). A mixer takes that to [B, N', D'] and a projector to [B, N', H], with H the
width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .mixers import MIXERS, Enrich, grid
from .plan import Plan
from .schema import UserError


class ShortcutProjector(nn.Module):
    """A mixer and its two-layer projector (exact GELU): [B, T, G, N, D] -> [B, N', H], inner width
    `inner`.
    """

    def __init__(self, mixer: nn.Module, inner: int, language_dim: int):
        super().__init__()
        self.mixer = mixer
        self.linear_1 = nn.Linear(mixer.out_dim, inner)
        self.linear_2 = nn.Linear(inner, language_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.mixer(x))

    def project(self, mixed: Tensor) -> Tensor:
        """[B, N', D'] -> [B, N', H]."""
        return self.linear_2(F.gelu(self.linear_1(mixed)))


class LowRankCorrection(nn.Module):
    """What one shortcut adds to a shared projector: two linear maps through `rank` channels,
    nothing at the start.
    """

    def __init__(self, mixed_dim: int, rank: int, language_dim: int):
        super().__init__()
        self.down, self.up = (
            nn.Linear(mixed_dim, rank, bias=False),
            nn.Linear(rank, language_dim, bias=False),
        )

    def forward(self, mixed: Tensor) -> Tensor:
        return self.up(self.down(mixed))


class ContextGate(nn.Module):
    """Factors for a layer's shortcuts from the picture's features and the hidden states they are
    added to.

    A learned query pools each by attention over the picture's image tokens; a linear map of both
    summaries gives a factor 2 sigmoid(.) per shortcut, which starts at one. Our reading of CLI's
    adaptive gating (arXiv 2601.10710), whose formula could not be retrieved; pooling image
    positions only keeps later words out of earlier positions.
    """

    def __init__(self, num_shortcuts: int, language_dim: int):
        super().__init__()
        self.query_features, self.query_hidden = (
            nn.Parameter(torch.zeros(language_dim)) for _ in range(2)
        )
        self.weight = nn.Parameter(torch.zeros(num_shortcuts, 2 * language_dim))
        self.bias = nn.Parameter(torch.zeros(num_shortcuts))
        self.num_tokens = 0  # of one picture; set by every pass of the fusion

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        """hidden [P * N', H] before the layer, features [P * N', S * H] -> what is added, [P * N',
        H].
        """
        if len(hidden) % self.num_tokens:
            raise UserError(
                f"context gates need whole pictures of {self.num_tokens} image tokens, but a pass"
                f" over a part of a prompt has {len(hidden)}; do not cut prompts into chunks with"
                " gate='context'"
            )
        num = len(self.bias)
        z = rearrange(features, "(p n) (s d) -> p n s d", n=self.num_tokens, s=num)
        h = rearrange(hidden.to(z.dtype), "(p n) d -> p n d", n=self.num_tokens)
        scale = h.shape[-1] ** -0.5
        of_hidden = torch.einsum("pn,pnd->pd", torch.softmax(h @ self.query_hidden * scale, 1), h)
        of_features = torch.einsum(
            "pns,pnsd->psd", torch.softmax(z @ self.query_features * scale, 1), z
        )
        both = torch.cat(
            [F.layer_norm(of_features, of_features.shape[-1:]), _like(of_hidden, num)], dim=-1
        )
        gates = 2 * torch.sigmoid((both * self.weight).sum(-1) + self.bias)
        return rearrange(torch.einsum("ps,pnsd->pnd", gates, z), "p n d -> (p n) d")


def _like(summary: Tensor, num: int) -> Tensor:
    return F.layer_norm(summary, summary.shape[-1:]).unsqueeze(1).expand(-1, num, -1)


class Numbered(int):
    """A layer's number where DeepSpeed shards the model: it takes the keys of what a module returns
    for names.
    """

    def startswith(self, prefix: str) -> bool:
        """As a name would; no number starts with a letter or a dash."""
        return str(self).startswith(prefix)


class Fusion(nn.Module):
    """All shortcuts of a plan: `{tap: views} -> {layer: features}`, with one batched call for those
    that share weights.

    plan: a plan checked against both depths; vision_depth turns negative taps into absolute ones;
    rows: patch rows of a view; num_under: patches under one image token, side by side where they
    are several (models that merge patches). Parameters: one `ShortcutProjector` per shortcut, or
    per kind where the plan is shared, `corrections` and `gates` (of every shortcut but the first
    into the input), and `context` gates. Constant gates are a buffer, so that a stage that trains
    fusion cannot move them.
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
    ):
        super().__init__()
        self.plan, self.rows, self.vision_dim = plan, rows, vision_dim
        taps = [tuple(t if isinstance(t, tuple) else (t,) for t in s.taps) for s in plan.shortcuts]
        self.taps = [
            tuple(tuple(t % (vision_depth + 1) for t in tap) for tap in of_one) for of_one in taps
        ]
        kinds = {
            i: (s.mix, len(s.taps)) if plan.shared else i
            for i, s in enumerate(plan.shortcuts)
            if s.mix != "base"
        }
        self.groups = [
            [i for i in kinds if kinds[i] == group] for group in dict.fromkeys(kinds.values())
        ]
        self.main = next(i for i, s in enumerate(plan.shortcuts) if s.layer == 0)
        self.gated = [i for i in range(len(plan.shortcuts)) if i != self.main]
        self.paths = nn.ModuleList()
        for first, *_ in self.groups:
            mixer = MIXERS[plan.shortcuts[first].mix](
                plan.shortcuts[first], plan, num_under * vision_dim, rows
            )
            narrow = plan.rank is not None and not plan.shared and first != self.main
            self.paths.append(
                ShortcutProjector(mixer, plan.rank if narrow else language_dim, language_dim)
            )
        widths = {
            i: p.mixer.out_dim
            for p, members in zip(self.paths, self.groups, strict=True)
            for i in members
        }
        corrected = self.gated if plan.shared and plan.rank is not None else []
        self.corrections = nn.ModuleDict(
            {str(i): LowRankCorrection(widths[i], plan.rank, language_dim) for i in corrected}
        )
        above = [s.layer for s in plan.shortcuts if s.layer and plan.gate == "context"]
        self.context = nn.ModuleDict(
            {str(d): ContextGate(above.count(d), language_dim) for d in sorted(set(above))}
        )
        vector = (language_dim,) if plan.gate in ("zero_vector", "one_vector") else ()
        start = torch.full((len(self.gated), *vector), self.gate_start)
        if plan.gate in ("zero", "one", "zero_vector", "one_vector") and self.gated:
            self.gates = nn.Parameter(start)
        else:
            self.register_buffer("gates", start)
        self.off: frozenset[int] = frozenset()

    @property
    def gate_start(self) -> float:
        """The value that gates begin with."""
        return 0.0 if self.plan.gate in ("zero", "zero_vector") else 1.0

    @contextmanager
    def switched_off(self, *shortcuts: int) -> Iterator[None]:
        """Inside the block these shortcuts (their numbers in the plan) add zeros; not for several
        threads at once.
        """
        if unknown := [i for i in shortcuts if i not in range(len(self.plan.shortcuts))]:
            raise UserError(
                f"there is no shortcut {unknown[0]}; this plan's are 0 to"
                f" {len(self.plan.shortcuts) - 1}"
            )
        before, self.off = self.off, self.off | set(shortcuts)
        try:
            yield
        finally:
            self.off = before

    def forward(
        self,
        features: Mapping[int, Tensor] | None = None,
        *,
        grains: Mapping[int, Tensor] | None = None,
    ) -> dict[int, Tensor]:
        """features: tap -> [B, V, N, D], V being 1 for taps of the coarse view alone.

        grains: tap -> [B, G, N, D] instead, normed and in their places already, G being 1 for the
        coarse view alone. Returns layer -> [B, N', H], shortcuts of one layer summed; under context
        gates side by side, [B, N', S * H].
        """
        # One way in, because weights that are sharded between devices are whole inside this call
        # alone.
        if grains is None:
            normed = {tap: self.normed(x) for tap, x in features.items()}
            grains = {
                tap: grid(x, self.plan.tiles if x.shape[1] > 1 else 0, self.rows)
                for tap, x in normed.items()
            }
        found: dict[int, Tensor] = {}
        for path, members in zip(self.paths, self.groups, strict=True):
            mixed = path.mixer(torch.cat([self._of_shortcut(grains, i) for i in members]))
            projected = path.project(mixed).unflatten(0, (len(members), -1)).unbind(0)
            for i, m, z in zip(
                members, mixed.unflatten(0, (len(members), -1)).unbind(0), projected, strict=True
            ):
                found[i] = z + self.corrections[str(i)](m) if str(i) in self.corrections else z
        outputs: dict[int, list[Tensor]] = {}
        for i in sorted(found):
            z = found[i]
            z = z * self.gates[self.gated.index(i)] if i in self.gated else z
            z = torch.zeros_like(z) if i in self.off else z
            outputs.setdefault(self.plan.shortcuts[i].layer, []).append(z)
        for layer, gate in self.context.items():
            gate.num_tokens = outputs[int(layer)][0].shape[1]
        number = Numbered if hasattr(self.paths[0].linear_1.weight, "ds_id") else int
        return {
            number(d): torch.cat(zs, -1) if str(d) in self.context else sum(zs[1:], zs[0])
            for d, zs in outputs.items()
        }

    def _of_shortcut(self, grains: Mapping[int, Tensor], i: int) -> Tensor:
        """[B, T, G, N, D] of one shortcut: its taps, means where they are means, and the grains it
        reads.
        """
        shortcut = self.plan.shortcuts[i]
        one = (
            slice(shortcut.grain, shortcut.grain + 1)
            if shortcut.mix in ("pick", "append")
            else slice(None)
        )
        means = [
            grains[t[0]] if len(t) == 1 else torch.stack([grains[u] for u in t]).mean(0)
            for t in self.taps[i]
        ]
        return torch.stack([x[:, one] for x in means], dim=1)

    def normed(self, states: Tensor) -> Tensor:
        """Encoder states [..., D] in the fusion's own number format, normalised where the plan says
        so.
        """
        states = states.to(self.paths[0].linear_1.weight.dtype)
        return F.layer_norm(states, (self.vision_dim,)) if self.plan.norm else states

    def initial_values(self) -> Iterator[tuple[Tensor, float | tuple[float, float]]]:
        """Every parameter with its start: a constant, or bounds of a uniform distribution.

        Linear layers start like PyTorch's, uniform in +-1/sqrt(inputs), but what starts without
        effect is zero there.
        """
        quiet = [m.up for m in self.corrections.values()]
        if self.plan.gate == "zero_projector":
            quiet += [
                p.linear_2
                for p, (i, *_) in zip(self.paths, self.groups, strict=True)
                if i != self.main
            ]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 0.0 if module in quiet else 1 / math.sqrt(module.in_features)
                yield from (
                    (p, (-bound, bound)) for p in (module.weight, module.bias) if p is not None
                )
            elif isinstance(module, Enrich | ContextGate):
                yield from ((p, 0.0) for p in module.parameters(recurse=False))
        yield self.gates, self.gate_start
