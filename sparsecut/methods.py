"""The methods: each a function of the two depths that returns a plan. Adding one is a function here
and a YAML.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

from .baselines import (
    cli,
    deepstack,
    dense_connector_dci,
    dense_connector_sci,
    dense_connector_sti,
    granite4,
    hires_channels,
    hires_tokens,
    llava,
    lsf_internal_direct,
    mmfuser,
    qwen3_vl,
)
from .plan import Plan, Shortcut
from .schema import UserError, nearest

PATTERNS = (
    "sparse",
    "dense",
    "bottom",
    "top",
    "reversed",
    "reversed_dense",
    "early",
)  # the paper's six, and ours


def make_plan(spec: str | dict | Plan, vision_depth: int, language_depth: int) -> Plan:
    """Turn a method's name, `{"method": name, **options}` or a plan in full into a plan checked
    against both depths.
    """
    if isinstance(spec, Plan):
        return spec.check(vision_depth, language_depth)
    if isinstance(spec, dict) and "method" not in spec:
        return Plan.from_dict(spec).check(vision_depth, language_depth)
    options = {"method": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("method")
    if name not in METHODS:
        raise UserError(
            f"method {name!r} is not known{nearest(name, METHODS)}; allowed are"
            f" {', '.join(METHODS)}"
        )
    allowed = [p for p in inspect.signature(METHODS[name]).parameters if not p.endswith("_depth")]
    for key in options:
        if key not in allowed:
            raise UserError(
                f"method {name} has no option {key!r}{nearest(key, allowed)}; allowed are"
                f" {', '.join(allowed) or 'none'}"
            )
    return METHODS[name](vision_depth, language_depth, **options).check(
        vision_depth, language_depth
    )


def sparsecut(
    vision_depth: int,
    language_depth: int,
    *,
    count: int | None = None,
    pattern: str = "early",
    mix: str = "channels",
    tiles: int = 2,
    shared: bool = False,
    norm: bool = True,
    gate: str | None = "default",
    rank: int | None = None,
    fine: float | None = None,
) -> Plan:
    """SparseCut (arXiv 2602.00505): several encoder layers, each into its own decoder layer, coarse
    and fine.

    count, pattern: see `shortcut_positions`. fine: share of the encoder's depth that fine views run
    through; deeper taps are read from the coarse view alone. By default all taps are read from
    both, but under "early" the last block but one is coarse, so that fine views stop after three
    eighths of the encoder. gate: by default projectors of "early" start at zero, unless they are
    shared, and other patterns have no gates. With `pattern="sparse", shared=True, norm=False` and
    24 and 40 layers this is the released form, `official_13b`; what is different here did better
    (docs/results.md).
    """
    taps, layers = shortcut_positions(vision_depth, language_depth, count, pattern)
    if fine is not None and (
        isinstance(fine, bool) or not isinstance(fine, int | float) or not 0 <= fine <= 1
    ):
        raise UserError(
            f"fine is {fine!r}, but is a share of the encoder's depth, from 0 to 1; use for example"
            " fine=0.4"
        )
    deepest = (
        (max(taps) if pattern == "early" else vision_depth) if fine is None else fine * vision_depth
    )
    if gate == "default":
        gate = "zero_projector" if pattern == "early" and not shared else None
    mixes = [mix if tap <= deepest else "pick" for tap in (vision_depth - 1, *taps)]
    pairs = zip((-2, *taps), (0, *layers), mixes, strict=True)
    tiles = tiles if any(m != "pick" for m in mixes) else 0
    return Plan(tuple(Shortcut((t,), d, m) for t, d, m in pairs), tiles, shared, norm, gate, rank)


def sparsecut_input(vision_depth: int, language_depth: int, **options) -> Plan:
    """The control for depth: `sparsecut` with the same taps and parameters, all added to the input
    instead.
    """
    plan = sparsecut(vision_depth, language_depth, **options)
    return replace(plan, shortcuts=tuple(replace(s, layer=0) for s in plan.shortcuts))


def official_13b(vision_depth: int, language_depth: int, *, mix: str = "channels") -> Plan:
    """The released code on its 40-layer decoder: eight shortcuts, one shared path, no norm and no
    gate.
    """
    return _official(
        zip((1, 4, 7, 10, 13, 16, 19, 22), (4, 9, 14, 19, 24, 29, 34, 39), strict=True), mix
    )


def official_7b_as_run(vision_depth: int, language_depth: int, *, mix: str = "channels") -> Plan:
    """The released code as its scripts run it on 32 layers: the last two of eight shortcuts never
    fire, so six are listed.
    """
    return _official(zip((1, 4, 7, 10, 13, 16), (4, 9, 14, 19, 24, 29), strict=True), mix)


def _official(pairs, mix):
    shortcuts = [Shortcut((-2,), 0, mix)] + [Shortcut((tap,), layer, mix) for tap, layer in pairs]
    return Plan(tuple(shortcuts), tiles=2, shared=True, norm=False)


sparsecut_input.__signature__ = inspect.signature(sparsecut)
METHODS: dict[str, Callable[..., Plan]] = {
    method.__name__: method
    for method in (
        llava,
        hires_tokens,
        hires_channels,
        dense_connector_sti,
        dense_connector_sci,
        dense_connector_dci,
        mmfuser,
        deepstack,
        qwen3_vl,
        granite4,
        lsf_internal_direct,
        cli,
        sparsecut,
        sparsecut_input,
        official_13b,
        official_7b_as_run,
    )
}


def shortcut_positions(
    vision_depth: int, language_depth: int, count: int | None = None, pattern: str = "sparse"
) -> tuple[list[int], list[int]]:
    """Taps and decoder layers of `count` shortcuts under a pattern, both `count` long.

    "sparse" spreads them evenly, "dense" adds to every decoder layer (as far as there are encoder
    layers), "bottom" and "top" crowd the low or the high layers on both sides, "reversed" sends the
    deepest encoder layer to the lowest decoder layer, and "reversed_dense" does both; these are the
    paper's. "early" is ours: taps of the encoder's first three eighths, the deepest of them first,
    into the first half of the decoder from the input on. By default count is 8 (4 for "early"), or
    half the shallower depth if that is less.

    The even spread floor(k V / K) + 1 and floor((k + 1) L / K) - 1 gives the released lists for 24
    and 40 layers. The skews follow the alternatives left in the released code's comments, which
    begin with layer 0: the power 1.6 gives its encoder list exactly and its decoder lists to within
    two layers.
    """
    if pattern not in PATTERNS:
        raise UserError(
            f"pattern {pattern!r} is not known{nearest(pattern, PATTERNS)}; allowed are"
            f" {', '.join(PATTERNS)}"
        )
    most = min(vision_depth, language_depth)
    if count is None:
        count = (
            most
            if pattern.endswith("dense")
            else min(4 if pattern == "early" else 8, max(1, most // 2))
        )
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise UserError(
            f"count is {count!r}, but {vision_depth} encoder and {language_depth} decoder layers"
            f" allow 1 to {most} shortcuts with a layer each; choose a count in that range"
        )
    if pattern.endswith("dense") and count != most:
        raise UserError(
            f"pattern {pattern!r} uses all {most} shortcuts these depths allow; leave count out or"
            " use 'sparse'"
        )
    if pattern == "early":
        reach = max(count, 3 * vision_depth // 8)
        depth = max(count, language_depth // 2)
        return [reach - k * reach // count for k in range(count)], [
            k * depth // count for k in range(count)
        ]
    if pattern in ("bottom", "top"):
        return [b + 1 for b in _skewed(vision_depth, count, pattern)], _skewed(
            language_depth, count, pattern
        )
    taps = [k * vision_depth // count + 1 for k in range(count)]
    layers = [(k + 1) * language_depth // count - 1 for k in range(count)]
    return (taps[::-1] if pattern.startswith("reversed") else taps), layers


def _skewed(depth: int, count: int, pattern: str) -> list[int]:
    power, steps = 1.6, max(count - 1, 1)
    low = [round((depth - 1) * (k / steps) ** power) for k in range(count)]
    for k in range(1, count):  # crowded ends of shallow models would collide
        low[k] = max(low[k], low[k - 1] + 1)
    for k in range(count - 1, -1, -1):
        low[k] = min(low[k], depth - count + k)
    return low if pattern == "bottom" else [depth - 1 - b for b in reversed(low)]
