"""Other papers' ways to feed an encoder to a language model, as plans: each a function of the two
depths.

Every docstring names the source and what differs from it here. All of them squash the picture as our views do, and all have
the two-layer projector. `norm` is off where the source has none; comparisons set it alike for every arm.
"""

from __future__ import annotations

from .plan import Plan, Shortcut


def llava(vision_depth: int, language_depth: int, *, tap: int = -2, norm: bool = False) -> Plan:
    """LLaVA-1.5 (arXiv 2310.03744): the last block but one into the input, one view."""
    return Plan((Shortcut((tap,), 0, "pick"),), tiles=0, norm=norm)


def hires_tokens(
    vision_depth: int, language_depth: int, *, tiles: int = 2, norm: bool = False
) -> Plan:
    """AnyRes of LLaVA-NeXT with a fixed square grid: fine patches as extra tokens.

    Deviations: the picture is squashed, not padded, and there are no newline vectors at row ends.
    """
    return Plan((Shortcut((-2,), 0, "tokens"),), tiles=tiles, norm=norm)


def hires_channels(
    vision_depth: int,
    language_depth: int,
    *,
    tiles: int = 2,
    mix: str = "channels",
    norm: bool = True,
) -> Plan:
    """SparseCut's own multi-grained module at the input only: the control that has the fine views
    but no shortcuts.

    With the channels mixer it is what S2 (arXiv 2403.13043) does with two scales. Deviation: S2
    pools the fine patches under a coarse one to their mean before stacking scales; here all of them
    are stacked.
    """
    return Plan((Shortcut((-2,), 0, mix),), tiles=tiles, norm=norm)


def dense_connector_sti(vision_depth: int, language_depth: int, *, norm: bool = False) -> Plan:
    """Dense Connector, sparse token integration (arXiv 2405.13800): two shallower states, pooled by
    8, as extra tokens.

    States at a third and two thirds of the depth, 7 and 15 of 24 (8 and 16 would be the even
    choice).
    """
    low, middle = _thirds(vision_depth)
    return Plan((Shortcut((low, middle, -2), 0, "append"),), norm=norm)


def dense_connector_sci(vision_depth: int, language_depth: int, *, norm: bool = False) -> Plan:
    """Dense Connector, sparse channel integration (arXiv 2405.13800): three states of a patch side
    by side.
    """
    low, middle = _thirds(vision_depth)
    return Plan((Shortcut((-2, low, middle), 0, "channels"),), norm=norm)


def dense_connector_dci(vision_depth: int, language_depth: int, *, norm: bool = False) -> Plan:
    """Dense Connector, dense channel integration (arXiv 2405.13800): the last block but one and the
    means of both halves.

    The means run over states 0 to V/2 - 1 and V/2 to V - 1. With norm, states are normalised before
    the mean is taken.
    """
    half = max(1, vision_depth // 2)
    return Plan(
        (Shortcut((-2, tuple(range(half)), tuple(range(half, vision_depth))), 0, "channels"),),
        norm=norm,
    )


def mmfuser(vision_depth: int, language_depth: int, *, norm: bool = False) -> Plan:
    """MMFuser (arXiv 2410.11829): four shallower states enrich the last block but one, through
    gates that start at zero.

    States 3, 8, 13 and 18 of 24, scaled to the depth. Deviation: dense attention instead of the
    authors' deformable kernel.
    """
    return Plan((Shortcut((*_scaled((3, 8, 13, 18), vision_depth), -2), 0, "enrich"),), norm=norm)


def deepstack(
    vision_depth: int, language_depth: int, *, start: int = 1, interval: int = 1, norm: bool = False
) -> Plan:
    """DeepStack-L (arXiv 2406.04334): the fine views' dilated stacks, one each before four
    successive layers, one projector.

    Stack (i, j) holds every second fine patch from row i and column j, which is one grain. start,
    interval: the first layer and the steps between, as the released code names them; where the
    decoder is too short, the last stacks share its last layer.
    """
    layers = [min(start + interval * k, language_depth - 1) for k in range(4)]
    shortcuts = [Shortcut((-2,), layer, "pick", 1 + k) for k, layer in enumerate(layers)]
    return Plan((Shortcut((-2,), 0, "pick"), *shortcuts), tiles=2, shared=True, norm=norm)


def qwen3_vl(vision_depth: int, language_depth: int, *, norm: bool = True) -> Plan:
    """Qwen3-VL's DeepStack, as in transformers: three states, shallow to deep, before layers 1, 2
    and 3, a projector each.

    States 9, 17 and 25 of 27, else 6, 12 and 18 of 24, scaled. Deviations: patches are not merged 2
    x 2, the norm has no parameters, and the projector's inner width is the language model's.
    """
    taps = (9, 17, 25) if vision_depth == 27 else _scaled((6, 12, 18), vision_depth)
    layers = [min(k, language_depth - 1) for k in (1, 2, 3)]
    pairs = zip(taps, layers, strict=True)
    return Plan(
        (Shortcut((-1,), 0, "pick"), *(Shortcut((t,), d, "pick") for t, d in pairs)), norm=norm
    )


def granite4(vision_depth: int, language_depth: int, *, norm: bool = True) -> Plan:
    """Granite 4.1 Vision: four depths in reversed order, the deepest into the input, then four
    spatial phases of the last.

    Before layers 0, 3, ..., 21 of 40, scaled. Deviations: the phases are the fine patches under a
    coarse one, where Granite takes every second patch of one view; a two-layer projector stands for
    each window Q-Former.
    """
    step = max(1, vision_depth * 6 // 27)
    layers = [round(k * language_depth * 3 / 40) for k in range(8)]
    depths = [Shortcut((max(-1 - k * step, -vision_depth),), layers[k], "pick") for k in range(4)]
    phases = [Shortcut((-1,), layers[4 + k], "pick", 1 + k) for k in range(4)]
    return Plan((*depths, *phases), tiles=2, norm=norm)


def lsf_internal_direct(vision_depth: int, language_depth: int, *, norm: bool = False) -> Plan:
    """Layer_Select_Fuse, internal direct (Lin et al., CVPR 2025): states 3, 18 and 23 of 24, a
    projector each.

    State k of 24 is added before layer int(k L / 24 - 1), which is 3, 23 and 29 of 32; scaled to
    other depths.
    """
    numbers = (3, 18, 23)
    layers = [max(0, int(k * language_depth / 24 - 1)) for k in numbers]
    pairs = zip(_scaled(numbers, vision_depth), layers, strict=True)
    return Plan(
        (Shortcut((-2,), 0, "pick"), *(Shortcut((t,), d, "pick") for t, d in pairs)), norm=norm
    )


def cli(
    vision_depth: int,
    language_depth: int,
    *,
    count: int | None = None,
    rank: int = 64,
    gate: str | None = "context",
    norm: bool = False,
) -> Plan:
    """CLI (arXiv 2601.10710): one projector with a low-rank correction per state, gated by picture
    and hidden state.

    Deviations: layers are spread evenly, as the authors' lists and exact gate could not be
    retrieved (see `fusion.ContextGate`); it starts from new weights, not from a finished model.
    """
    count = min(8, max(1, min(vision_depth, language_depth) // 2)) if count is None else count
    taps = [k * vision_depth // count + 1 for k in range(count)]
    layers = [(k + 1) * language_depth // count - 1 for k in range(count)]
    shortcuts = [Shortcut((t,), d, "pick") for t, d in zip(taps, layers, strict=True)]
    return Plan(
        (Shortcut((-2,), 0, "pick"), *shortcuts), shared=True, norm=norm, gate=gate, rank=rank
    )


def _scaled(numbers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """States of a 24-block encoder at the same relative depth of another one."""
    return tuple(max(1, k * depth // 24) for k in numbers)


def _thirds(depth: int) -> tuple[int, int]:
    """7 and 15 of 24."""
    return max(1, 7 * depth // 24), max(1, 15 * depth // 24)
