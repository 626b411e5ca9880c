"""The one drawing of a plan as SVG: encoder left, decoder right, both from the bottom up.

It needs no matplotlib, so that the documentation's pages can be built without it.
"""

from __future__ import annotations

from markupsafe import Markup

from ..plan import Plan, Shortcut
from .pages import render

BOX_WIDTH = 66
VISION_LEFT = 24  # pixels; the strip of fine views stands left of it
LANGUAGE_LEFT = 236
WIDTH = LANGUAGE_LEFT + BOX_WIDTH + 8
TOP = 26
FONT_SIZE = 12


def draw_plan(plan: Plan, vision_depth: int, language_depth: int) -> Markup:
    """Draw a plan as an SVG.

    Layers that are read or written are dark and carry their number. The strip at the left is as
    high as fine views run in the encoder. An arrow is a tap of a shortcut: thick with fine patches,
    thin with coarse ones alone, broken where it goes into the input.
    """
    longest = max(vision_depth + 1, language_depth)
    step = max(FONT_SIZE + 1, min(22, 300 // longest))
    bottom = TOP + step * longest + 6
    fine = plan.fine_taps(vision_depth)
    context = {
        "width": WIDTH,
        "height": bottom + 6,
        "box_width": BOX_WIDTH,
        "box_height": step - 2,
        "views": f"encoder, {plan.num_views} view{'s' * (plan.num_views > 1)}",
        "left": VISION_LEFT,
        "right": LANGUAGE_LEFT,
        "boxes": [
            *_make_vision_boxes(plan, vision_depth, bottom, step),
            *_make_language_boxes(plan, language_depth, bottom, step),
        ],
        "fine_height": step * (max(fine) + 1) if fine else 0,
        "bottom": bottom,
        "arrows": _make_arrows(plan, vision_depth, bottom, step),
        "label": _describe(plan),
    }
    return Markup(render("plan.svg.j2", **context).strip())


def _make_vision_boxes(plan: Plan, depth: int, bottom: int, step: int) -> list[dict]:
    taps = set(plan.resolved_taps(depth))
    boxes = []
    for tap in range(depth + 1):
        label = "patches" if tap == 0 else str(tap)
        boxes.append(_make_box(VISION_LEFT, tap, tap in taps, label, bottom, step))
    return boxes


def _make_language_boxes(plan: Plan, depth: int, bottom: int, step: int) -> list[dict]:
    written = {shortcut.layer for shortcut in plan.shortcuts}
    boxes = []
    for layer in range(depth):
        label = "0, input" if layer == 0 else str(layer)
        boxes.append(_make_box(LANGUAGE_LEFT, layer, layer in written, label, bottom, step))
    return boxes


def _make_box(x: int, number: int, is_used: bool, label: str, bottom: int, step: int) -> dict:
    is_labelled = is_used or step >= 18
    top = bottom - step * (number + 1) + 1
    return {"x": x, "y": top, "is_used": is_used, "label": label if is_labelled else ""}


def _make_arrows(plan: Plan, vision_depth: int, bottom: int, step: int) -> list[dict]:
    arrows = []
    for shortcut in plan.shortcuts:
        is_fine = _reads_fine_patches(plan, shortcut)
        end = bottom - step * (shortcut.layer + 0.5)
        for tap in shortcut.flat_taps:
            tap_from_below = tap % (vision_depth + 1)
            arrows.append(
                {
                    "start": bottom - step * (tap_from_below + 0.5),
                    "end": end,
                    "is_input": shortcut.layer == 0,
                    "is_fine": is_fine,
                }
            )

    return arrows


def _reads_fine_patches(plan: Plan, shortcut: Shortcut) -> bool:
    return bool(plan.tiles) and not shortcut.is_coarse


def _describe(plan: Plan) -> str:
    ways = []
    for shortcut in plan.shortcuts:
        taps = ", ".join(str(tap) for tap in shortcut.flat_taps)
        ways.append(f"tap {taps} to layer {shortcut.layer}")
    return "A plan: " + "; ".join(ways)
