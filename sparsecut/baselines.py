"""Other papers' ways to feed an encoder to a language model, as plans of the two depths.

Every docstring names the source and what differs from it here. Two things differ in all of them:
images are resized to squares, as our views are, and projectors have two layers. `norm` is off where
the source has none. Comparisons set it alike for all methods.
"""

from __future__ import annotations

from typing import Any

from .plan import Plan, Shortcut
from .schema import check_choice


def llava(vision_depth: int, language_depth: int, *, tap: int = -2, norm: bool = False) -> Plan:
    """LLaVA-1.5 (arXiv 2310.03744): the last block but one into the input, one view.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        tap: The tap that is read.
        norm: See `Plan`.
    """
    return Plan((Shortcut((tap,), 0),), norm=norm)


def hires_tokens(
    vision_depth: int, language_depth: int, *, tiles: int = 2, norm: bool = False
) -> Plan:
    """AnyRes of LLaVA-NeXT with a fixed square grid: fine patches as extra tokens.

    Source: https://llava-vl.github.io/blog/2024-01-30-llava-next/.

    Deviations: the image is resized, not padded, and there are no newline vectors at row ends.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        tiles: Fine views in each row and column.
        norm: See `Plan`.
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
    """SparseCut's multi-grained module at the input only: fine views, but no shortcuts.

    It is a control. With the mixer `channels` it is S2 (arXiv 2403.13043) with two scales.

    Deviation: S2 pools the fine patches under a coarse one to their mean before it stacks scales.
    Here all of them are stacked.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        tiles: Fine views in each row and column.
        mix: The mixer of coarse and fine patches.
        norm: See `Plan`.
    """
    return Plan((Shortcut((-2,), 0, mix),), tiles=tiles, norm=norm)


def dense_connector_sti(vision_depth: int, language_depth: int, *, norm: bool = False) -> Plan:
    """Dense Connector, sparse token integration (arXiv 2405.13800).

    Two shallower states, pooled by 8, are extra tokens. They lie at a third and two thirds of the
    depth, 7 and 15 of 24 as published. (8 and 16 would be the even choice.)

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        norm: See `Plan`.
    """
    low, middle = _get_thirds(vision_depth)
    return Plan((Shortcut((low, middle, -2), 0, "append"),), norm=norm)


def dense_connector_sci(vision_depth: int, language_depth: int, *, norm: bool = False) -> Plan:
    """Dense Connector, sparse channel integration (arXiv 2405.13800).

    Three states of a patch stand side by side.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        norm: See `Plan`.
    """
    low, middle = _get_thirds(vision_depth)
    return Plan((Shortcut((-2, low, middle), 0, "channels"),), norm=norm)


def dense_connector_dci(vision_depth: int, language_depth: int, *, norm: bool = False) -> Plan:
    """Dense Connector, dense channel integration (arXiv 2405.13800).

    The last block but one, and the means of the states of both halves, 0 to V/2 - 1 and V/2 to
    V - 1. With `norm`, states are normalized before the mean.

    Deviation: of 27 blocks the upper mean has 14 states, where the released code takes 13 for each.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        norm: See `Plan`.
    """
    half = max(1, vision_depth // 2)
    lower_half = tuple(range(half))
    upper_half = tuple(range(half, vision_depth))
    return Plan((Shortcut((-2, lower_half, upper_half), 0, "channels"),), norm=norm)


def mmfuser(vision_depth: int, language_depth: int, *, norm: bool = False) -> Plan:
    """MMFuser (arXiv 2410.11829): four shallower states enrich the last block but one.

    States 3, 8, 13 and 18 of 24, scaled to the depth.

    Deviation: dense attention instead of the authors' deformable kernel.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        norm: See `Plan`.
    """
    taps = _scale((3, 8, 13, 18), vision_depth)
    return Plan((Shortcut((*taps, -2), 0, "enrich"),), norm=norm)


def deepstack(
    vision_depth: int,
    language_depth: int,
    *,
    start: int = 1,
    interval: int = 1,
    norm: bool = False,
    dummy: bool = False,
) -> Plan:
    """DeepStack-L (arXiv 2406.04334): stacks of fine patches, each before one of four layers.

    Stack (i, j) holds every second fine patch from row i and column j, which is one grain. All use
    one projector. Where the decoder is too short, the last stacks share its last layer.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        start: The first layer, as in the released code.
        interval: Layers from one stack to the next.
        norm: See `Plan`.
        dummy: The paper's control (section 4.3): the coarse patches again in place of each stack.
    """
    shortcuts = [Shortcut((-2,), 0)]
    for k in range(4):
        layer = min(start + interval * k, language_depth - 1)
        shortcuts.append(Shortcut((-2,), layer, grain=0 if dummy else 1 + k))
    return Plan(tuple(shortcuts), tiles=0 if dummy else 2, shared=True, norm=norm)


def qwen3_vl(vision_depth: int, language_depth: int, *, norm: bool = True) -> Plan:
    """Qwen3-VL's DeepStack, as in transformers: three states before layers 1, 2 and 3.

    States 9, 17 and 25 of 27, else 6, 12 and 18 of 24, scaled to the depth. Each has a projector.

    Deviations: patches are not merged 2 x 2, the norm has no parameters, and the projector's inner
    width is the language model's.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        norm: See `Plan`.
    """
    taps = (9, 17, 25) if vision_depth == 27 else _scale((6, 12, 18), vision_depth)
    layers = [min(layer, language_depth - 1) for layer in (1, 2, 3)]
    return _make_plan(-1, taps, layers, norm=norm)


def granite4(vision_depth: int, language_depth: int, *, norm: bool = True) -> Plan:
    """Granite 4.1 Vision: four depths, the deepest into the input, then four spatial phases.

    They enter before layers 0, 3, ..., 21 of 40, scaled to the depth. The phases are those of the
    last state.

    Deviations: the phases are the fine patches under a coarse one, where Granite takes every second
    patch of one view. A two-layer projector stands for each window Q-Former, so that patches are
    not merged, four into one token. There is one coarse view in place of tiles with newline tokens.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        norm: See `Plan`.
    """
    step = max(1, vision_depth * 6 // 27)
    layers = [round(k * language_depth * 3 / 40) for k in range(8)]
    shortcuts = []
    for k, layer in enumerate(layers[:4]):
        tap = max(-1 - k * step, -vision_depth)
        shortcuts.append(Shortcut((tap,), layer))
    for k, layer in enumerate(layers[4:]):
        shortcuts.append(Shortcut((-1,), layer, grain=1 + k))
    return Plan(tuple(shortcuts), tiles=2, norm=norm)


def lsf_internal_direct(vision_depth: int, language_depth: int, *, norm: bool = False) -> Plan:
    """Layer_Select_Fuse, internal direct fusion (Lin et al., CVPR 2025): states 3, 18, 23 of 24.

    State k of 24 is added before layer int(k L / 24 - 1), which is 3, 23 and 29 of 32. States are
    scaled to the depth. Each has a projector.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        norm: See `Plan`.
    """
    states = (3, 18, 23)
    layers = [max(0, int(state * language_depth / 24 - 1)) for state in states]
    return _make_plan(-2, _scale(states, vision_depth), layers, norm=norm)


LIN_SETS = ("early_middle_late", "former", "latter", "all")


def external_direct(
    vision_depth: int,
    language_depth: int,
    *,
    states: str = "early_middle_late",
    norm: bool = False,
) -> Plan:
    """External direct fusion of Lin et al. (CVPR 2025, arXiv 2503.06063): 3, 18 and 23 of 24.

    The states of a patch stand side by side, and one projector feeds the input. The paper finds
    this the best and the most stable of its four forms. Its released code takes the same three
    states for the sets {3, 18} and {3, 18, 23}. Numbers are scaled to the depth; of 27 blocks they
    are 3, 20 and 25, as published for SigLIP.

    Deviations: none beyond those of all plans here.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        states: "early_middle_late" for those three. "former" and "latter" for the mean of the
            states of one half and the last block but one, "all" for both means and that block.
        norm: See `Plan`.

    Raises:
        UserError: The states have no such name.
    """
    check_choice("states", states, LIN_SETS)
    half = max(1, vision_depth // 2)
    former, latter = tuple(range(1, half + 1)), tuple(range(half + 1, vision_depth + 1))
    taps: tuple[int | tuple[int, ...], ...]
    if states == "early_middle_late":
        taps = _scale((3, 18, 23), vision_depth)
    elif states == "all":
        taps = (former, latter or former, -2)
    else:
        taps = (former if states == "former" else latter or former, -2)
    return Plan((Shortcut(taps, 0, "channels"),), norm=norm)


def molmo(vision_depth: int, language_depth: int, *, norm: bool = False) -> Plan:
    """Molmo (arXiv 2409.17146, section 2): two states, each 2 x 2 patches pooled to one token.

    The third and the tenth block from the last of 24, states 22 and 15, side by side, scaled to the
    depth. Attention whose query is the mean of a window pools it (`mixers.Pool`).

    Deviations: a two-layer projector with a GELU stands for the gated one (SwiGLU). One view of the
    whole image is read, not overlapping crops, and there are no tokens at row ends.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        norm: See `Plan`.
    """
    taps = _scale((22, 15), vision_depth)
    return Plan((Shortcut(taps, 0, "pool"),), norm=norm)


def cli(
    vision_depth: int,
    language_depth: int,
    *,
    count: int | None = None,
    rank: int = 64,
    gate: str | None = "context",
    norm: bool = False,
    pairs: str = "all",
) -> Plan:
    """CLI-like (arXiv 2601.10710): every chosen decoder layer mixes every chosen encoder layer.

    The features of encoder layer k are MLP(V_k) + B_k A_k V_k: one projector, and one correction of
    low rank for each encoder layer (adaptive multi-projection). They are computed once for all
    decoder layers. Each of these has a gate for each encoder layer (adaptive gating fusion), and
    the gated sum is added at the image positions. The projector is meant to be a trained one:
    `replan` puts the plan into a trained `llava`, whose projector it keeps.

    Deviations: both sets of layers are spread evenly, because the authors' lists could not be
    retrieved, nor could the formula of the gate (see `gates.ContextGate`). The hidden states that a
    gate sees are those of the image, so it depends on what stands before the image, and never on an
    answer.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        count: Number of encoder layers, and of decoder layers. By default 8, or half the shallower
            depth.
        rank: Rank of each encoder layer's correction.
        gate: See `Plan`. "context_zero" starts as the model without shortcuts.
        norm: See `Plan`.
        pairs: "all" for every encoder layer into every decoder layer. "one" for one into one, which
            `cli` was before.

    Raises:
        UserError: The pairs have no such name.
    """
    check_choice("pairs", pairs, ("all", "one"))
    if count is None:
        count = min(8, max(1, min(vision_depth, language_depth) // 2))
    taps, layers = spread_evenly(vision_depth, language_depth, count)
    is_tied = pairs == "all"
    if is_tied:
        taps, layers = taps * count, [layer for layer in layers for _ in range(count)]
    settings = {"norm": norm, "gate": gate, "rank": rank, "tied": is_tied}
    return _make_plan(-2, taps, layers, shared=True, **settings)


def spread_evenly(
    vision_depth: int, language_depth: int, count: int
) -> tuple[list[int], list[int]]:
    """Return `count` taps and as many layers, both spread evenly over the depths.

    Tap k is floor(k V / K) + 1 and layer k is floor((k + 1) L / K) - 1, for k = 0 to K - 1. For 24
    and 40 layers this gives the lists of SparseCut's released code.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        count: Number of taps and of layers, K.
    """
    taps = [k * vision_depth // count + 1 for k in range(count)]
    layers = [(k + 1) * language_depth // count - 1 for k in range(count)]
    return taps, layers


def _make_plan(input_tap: int, taps: Any, layers: Any, **settings: Any) -> Plan:
    """One coarse tap into the input, and further ones into layers."""
    shortcuts = [Shortcut((input_tap,), 0)]
    for tap, layer in zip(taps, layers, strict=True):
        shortcuts.append(Shortcut((tap,), layer))
    return Plan(tuple(shortcuts), **settings)


def _scale(states: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """States of a 24-block encoder at the same relative depth of another one."""
    return tuple(max(1, state * depth // 24) for state in states)


def _get_thirds(depth: int) -> tuple[int, ...]:
    """States at a third and two thirds, 7 and 15 of 24."""
    return _scale((7, 15), depth)
