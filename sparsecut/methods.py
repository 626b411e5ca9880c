"""The methods by name: each is a function of the two depths that returns a plan.

`sparsecut` and its controls stand here, other papers' methods in baselines.py. docs/add-a-method.md
adds one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from .baselines import (
    cli,
    deepstack,
    dense_connector_dci,
    dense_connector_sci,
    dense_connector_sti,
    external_direct,
    granite4,
    hires_channels,
    hires_tokens,
    llava,
    lsf_internal_direct,
    mmfuser,
    molmo,
    qwen3_vl,
    spread_evenly,
)
from .plan import Plan, Shortcut
from .schema import UserError, check_choice, check_type, is_whole_number, nearest

SKEW = 1.6  # power that crowds positions at one end
Positions = tuple[list[int], list[int]]  # taps, and the layers they are added to


def make_plan(spec: str | dict | Plan, vision_depth: int, language_depth: int) -> Plan:
    """Make a plan and check it against both depths.

    Args:
        spec: A method's name, `{"method": name, **options}`, or a plan, also as keys and values.
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.

    Raises:
        UserError: The method or an option is not known, or the plan does not fit the depths.
    """
    if isinstance(spec, str):
        spec = {"method": spec}
    if isinstance(spec, Plan):
        plan = spec
    elif isinstance(spec, dict) and "method" in spec:
        options = {key: value for key, value in spec.items() if key != "method"}
        plan = _call_method(spec["method"], options, vision_depth, language_depth)
    else:
        plan = Plan.from_dict(spec)
    return plan.check(vision_depth, language_depth)


def check_method(spec: str | dict | Plan) -> None:
    """Check a method's name and its options, as far as that needs no depths.

    Args:
        spec: As `make_plan` takes it; a plan is left for later.

    Raises:
        UserError: The method or an option is not known, or an option has another type.
    """
    if isinstance(spec, str):
        spec = {"method": spec}
    if isinstance(spec, dict) and "method" in spec:
        options = {key: value for key, value in spec.items() if key != "method"}
        _check_options(spec["method"], options)


def _check_options(name: str, options: dict) -> None:
    check_choice("method", name, METHODS)
    method = METHODS[name]
    parameters = inspect.signature(method, eval_str=True).parameters
    allowed = [key for key in parameters if not key.endswith("_depth")]
    for key, value in options.items():
        if key not in allowed:
            raise UserError(
                f"method {name} has no option {key!r}{nearest(key, allowed)}; allowed are"
                f" {', '.join(allowed) or 'none'}"
            )
        hint = parameters[key].annotation
        if hint is not inspect.Parameter.empty:
            check_type(f"method {name}: {key}", value, hint)


def _call_method(name: str, options: dict, vision_depth: int, language_depth: int) -> Plan:
    _check_options(name, options)
    return METHODS[name](vision_depth, language_depth, **options)


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
    """SparseCut (arXiv 2602.00505): several encoder layers, each into a decoder layer of its own.

    With `pattern="sparse", shared=True, norm=False`, 24 and 40 layers, this is the released form,
    `official_13b`. What is different here did better (docs/older-results.md).

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        count: Number of shortcuts besides the input. See `place_shortcuts`.
        pattern: Where they are, a key of `PATTERNS`.
        mix: The mixer of taps that are read from fine views.
        tiles: Fine views in each row and column.
        shared: See `Plan`.
        norm: See `Plan`.
        gate: See `Plan`. By default projectors of "early" and "middle" start at zero, unless they
            are shared, and other patterns have no gates.
        rank: See `Plan`.
        fine: Fraction of the encoder's depth that fine views run through. Deeper taps are read from
            the coarse view only. By default all taps are read from both views, but "early" and
            "middle" read their input from the coarse view, so that fine views stop after three
            eighths or three quarters.
    """
    taps, layers = place_shortcuts(vision_depth, language_depth, count, pattern)
    if fine is not None:
        if not 0 <= fine <= 1:
            raise UserError(
                f"fine is {fine!r}, but is a fraction of the encoder's depth, from 0 to 1; use for"
                " example fine=0.4"
            )
        deepest = fine * vision_depth
    else:
        deepest = max(taps) if pattern in OURS else vision_depth
    if gate == "default":
        gate = "zero_projector" if pattern in OURS and not shared else None
    shortcuts = [Shortcut((-2,), 0, mix if vision_depth - 1 <= deepest else "pick")]
    for tap, layer in zip(taps, layers, strict=True):
        shortcuts.append(Shortcut((tap,), layer, mix if tap <= deepest else "pick"))
    if all(s.mix == "pick" for s in shortcuts):
        tiles = 0
    return Plan(tuple(shortcuts), tiles, shared, norm, gate, rank)


def sparsecut_input(vision_depth: int, language_depth: int, **options: Any) -> Plan:
    """The control for depth: the taps and parameters of `sparsecut`, all added to the input."""
    plan = sparsecut(vision_depth, language_depth, **options)
    return replace(plan, shortcuts=tuple(replace(s, layer=0) for s in plan.shortcuts))


sparsecut_input.__signature__ = inspect.signature(sparsecut, eval_str=True)


def official_13b(vision_depth: int, language_depth: int, *, mix: str = "channels") -> Plan:
    """The released code on its 40-layer decoder: eight shortcuts, one shared path, no norm.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        mix: The mixer of every shortcut.
    """
    taps = (1, 4, 7, 10, 13, 16, 19, 22)
    layers = (4, 9, 14, 19, 24, 29, 34, 39)
    return _make_official(taps, layers, mix)


def official_7b_as_run(vision_depth: int, language_depth: int, *, mix: str = "channels") -> Plan:
    """The released code as its scripts run it on 32 layers.

    The last two of its eight shortcuts never fire there, so six are listed.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        mix: The mixer of every shortcut.
    """
    taps = (1, 4, 7, 10, 13, 16)
    layers = (4, 9, 14, 19, 24, 29)
    return _make_official(taps, layers, mix)


def _make_official(taps: Iterable[int], layers: Iterable[int], mix: str) -> Plan:
    shortcuts = [Shortcut((-2,), 0, mix)]
    for tap, layer in zip(taps, layers, strict=True):
        shortcuts.append(Shortcut((tap,), layer, mix))
    return Plan(tuple(shortcuts), tiles=2, shared=True, norm=False)


METHODS: dict[str, Callable[..., Plan]] = {
    method.__name__: method
    for method in (
        llava,
        hires_tokens,
        hires_channels,
        dense_connector_sti,
        dense_connector_sci,
        dense_connector_dci,
        external_direct,
        mmfuser,
        molmo,
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


def _spread_reversed(vision_depth: int, language_depth: int, count: int) -> Positions:
    taps, layers = spread_evenly(vision_depth, language_depth, count)
    return taps[::-1], layers


def _crowd_low(vision_depth: int, language_depth: int, count: int) -> Positions:
    blocks = _skew(vision_depth, count)
    return [block + 1 for block in blocks], _skew(language_depth, count)


def _crowd_high(vision_depth: int, language_depth: int, count: int) -> Positions:
    blocks = _skew(vision_depth, count)
    layers = _skew(language_depth, count)
    taps = [vision_depth - block for block in reversed(blocks)]
    return taps, [language_depth - 1 - layer for layer in reversed(layers)]


def _skew(depth: int, count: int) -> list[int]:
    """`count` different numbers from 0 to `depth` - 1, more of them low."""
    steps = max(count - 1, 1)
    numbers = [round((depth - 1) * (k / steps) ** SKEW) for k in range(count)]
    for k in range(1, count):  # crowded ends of shallow models would collide
        numbers[k] = max(numbers[k], numbers[k - 1] + 1)
    for k in reversed(range(count)):
        numbers[k] = min(numbers[k], depth - count + k)
    return numbers


def _start_early(vision_depth: int, language_depth: int, count: int) -> Positions:
    vision_reach = max(count, 3 * vision_depth // 8)
    language_reach = max(count, language_depth // 2)
    taps = [vision_reach - k * vision_reach // count for k in range(count)]
    layers = [k * language_reach // count for k in range(count)]
    return taps, layers


def _start_in_the_middle(vision_depth: int, language_depth: int, count: int) -> Positions:
    deepest = max(count, 3 * vision_depth // 4)
    shallowest = min(vision_depth // 2, deepest - count + 1)
    steps = max(count - 1, 1)
    taps = [deepest - k * (deepest - shallowest) // steps for k in range(count)]
    return taps, _start_early(vision_depth, language_depth, count)[1]


PATTERNS: dict[str, Callable[[int, int, int], Positions]] = {
    "sparse": spread_evenly,
    "dense": spread_evenly,
    "bottom": _crowd_low,
    "top": _crowd_high,
    "reversed": _spread_reversed,
    "reversed_dense": _spread_reversed,
    "early": _start_early,
    "middle": _start_in_the_middle,
}
OURS = ("early", "middle")  # from the input on, with projectors that start at zero


def place_shortcuts(
    vision_depth: int, language_depth: int, count: int | None = None, pattern: str = "sparse"
) -> Positions:
    """Return the taps of `count` shortcuts, and the decoder layers they are added to.

    The first six patterns are the paper's. "sparse" spreads shortcuts evenly, and "dense" takes as
    many as there are layers. "bottom" and "top" crowd the low or the high layers on both sides.
    "reversed" sends the deepest encoder layer to the lowest decoder layer, and "reversed_dense"
    does both. "early" is ours: taps of the encoder's first three eighths, the deepest of them
    first, into the first half of the decoder from the input on. "middle" is its control, with taps
    from one half to three quarters of the encoder, where most released models read.

    "bottom" and "top" follow the alternatives in comments of the released code, which begin with
    layer 0. The power 1.6 gives its encoder list exactly, and its decoder lists to within two
    layers.

    Args:
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        count: By default 8, or 4 for "early" and "middle", but at most half the shallower depth.
        pattern: A key of `PATTERNS`.

    Raises:
        UserError: The pattern is not known, or the depths do not allow the count.
    """
    check_choice("pattern", pattern, PATTERNS)
    most = min(vision_depth, language_depth)
    is_dense = pattern.endswith("dense")
    if count is None:
        usual = 4 if pattern in OURS else 8
        count = most if is_dense else min(usual, max(1, most // 2))
    if not is_whole_number(count) or not 1 <= count <= most:
        raise UserError(
            f"count is {count!r}, but {vision_depth} encoder and {language_depth} decoder layers"
            f" allow 1 to {most} shortcuts with a layer each; choose a count in that range"
        )
    if is_dense and count != most:
        raise UserError(
            f"count is {count}, but pattern {pattern!r} uses all {most} shortcuts that these depths"
            " allow; leave count out or use 'sparse'"
        )
    return PATTERNS[pattern](vision_depth, language_depth, count)
