"""The kinds of mixers and of gates, as plain data: what a plan's names stand for.

`plan` and everything that draws or checks plans read these tables without torch. The modules that
compute are in `mixers.py` and `gates.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

POOL_SIZE = 8  # neighbours that `append` pools into one token, as Dense Connector's STI does
SOME_PATCHES = 64 * POOL_SIZE  # a number of patches for comparing numbers of image tokens


def _count_patches(num_taps: int, num_grains: int, num_patches: int) -> int:
    return num_patches


def _count_grains(num_taps: int, num_grains: int, num_patches: int) -> int:
    return num_grains * num_patches


def _count_pooled(num_taps: int, num_grains: int, num_patches: int) -> int:
    return num_patches + (num_taps - 1) * math.ceil(num_patches / POOL_SIZE)


@dataclass(frozen=True)
class Mixer:
    """One way to make features of a shortcut's taps and grains. docs/add-a-method.md adds one.

    Attributes:
        description: What it does, in a few words, for drawings.
        module: The class that computes it, or its name in `mixers.py`. None has no weights here.
        grains: The grains it reads: "all", "coarse", or "one", which `Shortcut.grain` chooses.
        needs_context: Whether it compares the coarse patches of the last tap with everything else,
            so that a single tap of the coarse view is not enough.
        count_tokens: (taps, grains, patches of a view) -> image tokens of one image. Where there
            are windows, it is given their number in place of that of patches.
        window: Rows, and as many columns, of patches that become one token.
        needs_prompt: Whether it reads a vector of the image's prompt, too: `forward` then takes
            (features, prompts [B, H]), and the class H as its last argument.
    """

    description: str
    module: type | str | None
    grains: str = "all"
    needs_context: bool = False
    count_tokens: Callable[[int, int, int], int] = _count_patches
    window: int = 1
    needs_prompt: bool = False

    def count_windows(self, num_patches: int, rows: int | None = None) -> int:
        """Return how many windows cover a view. Those at its lower and right edge may stand over.

        Args:
            num_patches: Patches of the view.
            rows: Rows that they stand in. By default as many as columns; a number of patches that
                is no square is divided by the patches of a window.
        """
        if rows is None:
            rows = math.isqrt(num_patches)
            if rows**2 != num_patches:
                return math.ceil(num_patches / self.window**2)
        return math.ceil(rows / self.window) * math.ceil(num_patches / rows / self.window)


MIXERS: dict[str, Mixer] = {
    "pick": Mixer("one grain of each patch", "Pick", grains="one"),
    "channels": Mixer("taps and grains of a patch side by side", "Channels"),
    "blend": Mixer("a learned mean of the taps, for each grain of a patch", "Blend"),
    "blend_by_prompt": Mixer(
        "a mean of the taps, weighed by the prompt", "BlendByPrompt", needs_prompt=True
    ),
    "tokens": Mixer(
        "grains of a patch one after the other, a longer prompt",
        "Tokens",
        count_tokens=_count_grains,
    ),
    "append": Mixer(
        "coarse patches, then other taps pooled, a longer prompt",
        "Append",
        grains="coarse",
        count_tokens=_count_pooled,
    ),
    "pool": Mixer(
        "attention over windows of 2 x 2 patches, a shorter prompt",
        "Pool",
        grains="coarse",
        window=2,
    ),
    "attend": Mixer("coarse patches attend to all taps and grains", "Attend", needs_context=True),
    "enrich": Mixer(
        "coarse patches and what attention adds, from zero", "Enrich", needs_context=True
    ),
    "base": Mixer("what the upgraded model feeds to its input itself", None, grains="coarse"),
}


@dataclass(frozen=True)
class Gate:
    """One way to scale what shortcuts add. The first shortcut into the input is never scaled.

    Attributes:
        description: What it does, in a few words, for drawings.
        factor: The trained factor of each shortcut: None, one "number", or one per "channel".
        start: The value that factors start with.
        zero_projector: Whether the last layer of each projector starts at zero instead.
        module: A class, or its name in `gates.py`, whose instances compute the factors of a layer
            above the input in each forward pass. `gates.ContextGate` shows the interface.
    """

    description: str
    factor: str | None = None
    start: float = 1.0
    zero_projector: bool = False
    module: type | str | None = None

    @property
    def starts_without_effect(self) -> bool:
        """Whether an upgrade can begin with it, bit for bit as the model without shortcuts.

        Upgraded models take no gates that are computed in each pass.
        """
        return self.module is None and (self.start == 0 or self.zero_projector)


GATES: dict[str | None, Gate] = {
    None: Gate("no gates"),
    "zero": Gate("gates that start at zero", "number", start=0.0),
    "one": Gate("gates that start at one", "number"),
    "zero_vector": Gate("gates per channel that start at zero", "channel", start=0.0),
    "one_vector": Gate("gates per channel that start at one", "channel"),
    "context": Gate("gates by context", module="ContextGate"),
    "context_zero": Gate("gates by context that start at zero", module="ZeroContextGate"),
    "size": Gate("features normed to a fraction of the hidden states' size", module="SizeGate"),
    "zero_projector": Gate("projectors that start at zero", zero_projector=True),
}
