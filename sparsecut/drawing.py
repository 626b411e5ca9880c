"""A plan drawn for the terminal: encoder on the left, language model on the right, an arrow for
every shortcut.

Both stacks grow upwards. Shortcuts in the same order on both sides are straight arrows; the others, and those into the
input, run along a track between the stacks, one track for each layer they reach. A track that meets an arrow without a
joint only passes it. Layers that nothing reads or reaches are folded into dots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .plan import GATES, MIXERS, Plan, Shortcut

LEFT, RIGHT, UP, DOWN = 1, 2, 4, 8
LINES = {  # arms of a cell -> the character that has them
    LEFT | RIGHT: "\u2500",
    UP | DOWN: "\u2502",
    RIGHT | DOWN: "\u250c",
    LEFT | DOWN: "\u2510",
    RIGHT | UP: "\u2514",
    LEFT | UP: "\u2518",
    UP | DOWN | RIGHT: "\u251c",
    UP | DOWN | LEFT: "\u2524",
    LEFT | RIGHT | DOWN: "\u252c",
    LEFT | RIGHT | UP: "\u2534",
    LEFT | RIGHT | UP | DOWN: "\u253c",
}
LINE, POST = LINES[LEFT | RIGHT], LINES[UP | DOWN]
DOTS, ARROW = "\u22ee", "\u25b6"
NAMES = {0: "0 = patches"}, {0: "0 = input"}  # of numbers inside the stacks
BOX = 13  # columns inside a stack
MANY = 12  # tracks that still leave a free column each
Item = int | str  # a layer's number, dots for folded ones, or nothing


@dataclass
class Wires:
    """The space between the stacks: the arms of the lines in every cell, where lines cross, and
    where they are joined.
    """

    width: int
    arms: Counter = field(default_factory=Counter)
    crossings: set = field(default_factory=set)
    joints: set = field(default_factory=set)

    def across(self, y: int, start: int, stop: int) -> None:
        """A horizontal line from column `start` to `stop`, open at the edges of the space."""
        for x in range(start, stop + 1):
            self._add(
                x, y, LEFT * (x > start or x == 0) | RIGHT * (x < stop or x == self.width - 1)
            )

    def upright(self, x: int, low: int, high: int) -> None:
        """A vertical line between two rows, which are counted upwards."""
        for y in range(low, high + 1):
            self._add(x, y, UP * (y < high) | DOWN * (y > low))

    def _add(self, x: int, y: int, arms: int) -> None:
        if {arms, self.arms[x, y]} == {LEFT | RIGHT, UP | DOWN}:
            self.crossings.add((x, y))
        self.arms[x, y] |= arms

    def line(self, y: int) -> str:
        """One row as text; of two lines that only cross, the upright one is seen."""
        passing = self.crossings - self.joints
        cells = (UP | DOWN if (x, y) in passing else self.arms[x, y] for x in range(self.width))
        return "".join(LINES.get(arms, " ") for arms in cells)


def draw(
    plan: Plan,
    vision_depth: int,
    language_depth: int,
    *,
    num_patches: int | None = None,
    title: str | None = None,
) -> str:
    """The plan as lines of text; `num_patches` of one view, where known, gives the image tokens."""
    plan.check(vision_depth, language_depth)
    flat = [
        sorted({t % (vision_depth + 1) for t in s.flat_taps}) for s in plan.shortcuts
    ]  # a mean is drawn as its states
    shortcuts = [
        Shortcut(taps, s.layer, s.mix, s.grain)
        for taps, s in zip(flat, plan.shortcuts, strict=True)
    ]
    used = {tap for s in shortcuts for tap in s.taps}, {s.layer for s in shortcuts}
    straight = straight_pairs(shortcuts)
    rows = align(fold(used[0], vision_depth + 1), fold(used[1], language_depth), straight, used)
    wires, labels = connect(rows, [s for s in shortcuts if s.taps], straight), arrivals(shortcuts)
    room = max(map(len, labels.values())) + 8
    space, beam = " " * (wires.width + room + 1), LINE * BOX
    lines = [*([title] if title else []), summary(plan), ""]
    lines += [
        f"  {left:^{BOX + 2}}{space}{right:^{BOX + 2}}".rstrip()
        for left, right in (
            ("vision encoder", "language model"),
            (f"{vision_depth} blocks", f"{language_depth} layers"),
        )
    ]
    lines.append("  " + space.join([LINES[RIGHT | DOWN] + beam + LINES[LEFT | DOWN]] * 2))
    for y, (tap, layer) in reversed(list(enumerate(rows))):
        edge = LINES[UP | DOWN | RIGHT * (tap in used[0])]
        arrow = (
            f" {labels[layer]} ".center(room, LINE) + ARROW if layer in labels else " " * (room + 1)
        )
        left, right = NAMES[0].get(tap, tap), NAMES[1].get(layer, layer)
        lines.append(f"  {POST}{left:^{BOX}}{edge}{wires.line(y)}{arrow}{POST}{right:^{BOX}}{POST}")
    lines.append("  " + space.join([LINES[RIGHT | UP] + beam + LINES[LEFT | UP]] * 2))
    return "\n".join([*lines, "", *remarks(plan, vision_depth, num_patches)])


def summary(plan: Plan) -> str:
    """The plan in one line of words."""
    count = len(plan.shortcuts) - 1
    words = [
        f"{count or 'no'}"
        f" shortcut{'s' * (count != 1)}{' into the input' * (count > 0 and not plan.layers)}"
    ]
    words.append(f"{plan.tiles}x{plan.tiles} fine views" if plan.tiles else "coarse view only")
    if count:
        rank = f" of rank {plan.rank}" if plan.rank else ""
        shared = f"one projector, corrections{rank}" if rank else "one shared projector"
        words.append(shared if plan.shared else f"a projector{rank} each")
    words.append("norm on taps" if plan.norm else "no norm")
    if plan.layers:
        words.append(GATES[plan.gate].description)
    return ", ".join(words)


def remarks(plan: Plan, vision_depth: int, num_patches: int | None) -> list[str]:
    """What the drawing cannot show: views, image tokens, mixers, and how layers are numbered."""
    fine = f"1 coarse and {plan.tiles} x {plan.tiles} fine" if plan.tiles else "coarse only"
    taps, deep = plan.resolved_taps(vision_depth), plan.fine_taps(vision_depth)
    if deep and max(deep) < max(taps):
        fine += f", the fine ones as far as block {max(deep)}"
    if plan.has_base_input:
        tokens = "the base's own, as many as before"
    elif num_patches is None:
        tokens = f"{plan.image_tokens(8) / 8:g} for each coarse patch"
    else:
        tokens = f"{plan.image_tokens(num_patches)} per picture ({num_patches} patches per view)"
    mixes = list(dict.fromkeys(s.mix for s in plan.shortcuts))
    return [
        f"  picture       {plan.num_views} view{'s' * (plan.num_views > 1)}: {fine}",
        f"  image tokens  {tokens}",
        *(f"  {mix:13} {MIXERS[mix].description}" for mix in mixes),
        "  left          hidden states of the encoder: 0 = patch embedding, k = after block k",
        "  right         the layer before which features are added: 0 = input embedding",
    ]


def straight_pairs(shortcuts: Sequence[Shortcut]) -> list[tuple[int, int]]:
    """(tap, layer) of the longest run of shortcuts that climb both stacks together; none where most
    would not join it.
    """
    pairs = sorted((s.layer, s.taps[0]) for s in shortcuts if s.layer > 0 and len(s.taps) == 1)
    chains: list[list[tuple[int, int]]] = []
    for layer, tap in pairs:
        below = [chain for chain in chains if chain[-1][0] < tap and chain[-1][1] < layer]
        chains.append([*max(below, key=len, default=[]), (tap, layer)])
    longest = max(chains, key=len, default=[])
    return longest if 2 * len(longest) >= len(pairs) else []


def fold(used: set[int], count: int) -> list[Item]:
    """Numbers 0 to count - 1 from the bottom up, with dots for two or more unused ones in a row."""
    items: list[Item] = []
    for number in range(count):
        lonely = number in used or ({number - 1, number + 1} & set(range(count))) <= used
        if lonely:
            items.append(number)
        elif not items or items[-1] != DOTS:
            items.append(DOTS)
    return items


def align(
    left: list[Item], right: list[Item], straight, used: tuple[set, set]
) -> list[tuple[Item, Item]]:
    """Put both stacks on common rows: straight pairs on one row, and no other tap beside a layer,
    where wires would meet.
    """
    rows: list[tuple[Item, Item]] = []
    for tap, layer in [*straight, (None, None)]:
        i, j = (left.index(tap), right.index(layer)) if tap is not None else (len(left), len(right))
        below, beside = left[:i], right[:j]
        while below or beside:
            clash = below and beside and below[0] in used[0] and beside[0] in used[1]
            taller = len(below) >= len(beside)
            rows.append(
                (
                    below.pop(0) if below and (not clash or taller) else "",
                    beside.pop(0) if beside and (not clash or not taller) else "",
                )
            )
        if tap is not None:
            rows.append((tap, layer))
        left, right = left[i + 1 :], right[j + 1 :]
    for y in range(1, len(rows)):  # folded layers fill the height that the other stack takes
        rows[y] = tuple(
            DOTS if (item, below) == ("", DOTS) else item
            for item, below in zip(rows[y], rows[y - 1], strict=True)
        )
    return rows


def connect(rows: list[tuple[Item, Item]], shortcuts: Sequence[Shortcut], straight) -> Wires:
    """The wires of all shortcuts; lower layers have their track further left, so that wires of one
    tap do not cross.
    """
    of_tap = {tap: y for y, (tap, _) in enumerate(rows)}
    of_layer = {layer: y for y, (_, layer) in enumerate(rows)}
    routed = [s for s in shortcuts if (s.taps[0], s.layer) not in straight or len(s.taps) > 1]
    targets = sorted({s.layer for s in routed})
    step = 2 if len(targets) <= MANY else 1
    tracks = {layer: 1 + step * k for k, layer in enumerate(targets)}
    wires = Wires(width=2 + step * len(targets))
    for tap, _ in straight:
        wires.across(of_tap[tap], 0, wires.width - 1)
    for s in routed:
        x, end = tracks[s.layer], of_layer[s.layer]
        ends = [end, *(of_tap[tap] for tap in s.taps)]
        for y in ends[1:]:
            wires.across(y, 0, x)
            wires.joints.add((x, y))
        wires.upright(x, min(ends), max(ends))
        wires.across(end, x, wires.width - 1)
    return wires


def arrivals(shortcuts: Sequence[Shortcut]) -> dict[int, str]:
    """What arrives at each layer, in words: mixers, with their number where several add up."""
    words: dict[int, Counter] = {}
    for s in shortcuts:
        name = (
            s.mix
            + f" of {len(s.taps)} taps" * (len(s.taps) > 1)
            + f" grain {s.grain}" * (s.grain > 0)
        )
        words.setdefault(s.layer, Counter())[name] += 1
    return {
        layer: " + ".join(f"{n} x {name}" if n > 1 else name for name, n in names.items())
        for layer, names in words.items()
    }


def text_table(
    rows: Sequence[Sequence[str]], *, align: str | None = None, separator: str = "  "
) -> str:
    """Lay out rows of cells as lines of text with aligned columns.

    Args:
        rows: Cells by row, all rows of one length; a header is simply the first row.
        align: One character for each column, "<" for left and ">" for right. By default the first
            column is aligned left and all others right, as numbers are.
        separator: Text between two columns.

    Returns:
        One line for each row, without whitespace at its end.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    align = align or "<" + ">" * (len(columns) - 1)
    lines = []
    for row in rows:
        cells = [
            f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)
        ]
        lines.append(separator.join(cells).rstrip())
    return "\n".join(lines)
