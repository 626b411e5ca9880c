"""A plan drawn for the terminal: encoder on the left, language model on the right, arrows between.

Both stacks grow upwards. Shortcuts in the same order on both sides are straight arrows. The others,
and those into the input, run along a track between the stacks, one track for each layer they reach.
A track that meets an arrow without a joint only passes it. Layers that no shortcut reads or reaches
are folded into dots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .plan import GATES, Plan
from .waits.safe_text import escape_controls

LEFT, RIGHT, UP, DOWN = 1, 2, 4, 8
LINES = {  # directions of the lines in a cell -> its character
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
LINE = LINES[LEFT | RIGHT]
POST = LINES[UP | DOWN]
DOTS = "\u22ee"
ARROW = "\u25b6"
VISION_NAMES = {0: "0 = patches"}
LANGUAGE_NAMES = {0: "0 = input"}
STACK_WIDTH = 13  # columns inside a stack
MANY_TRACKS = 12  # up to so many tracks have a free column between them

Item = int | str  # in a stack: a number, dots for folded ones, or nothing
Row = tuple[Item, Item]  # what stands in both stacks at one height


@dataclass(frozen=True)
class Arrow:
    """A shortcut as every drawing shows it.

    Attributes:
        number: Its place in the plan.
        taps: The encoder states it reads, from 0, those of means included, ascending.
        layer: The decoder layer it adds to.
        mix: The name of its mixer.
        label: That name, with what sets the shortcut apart from others of the same mixer.
        description: What the mixer does, in a few words.
        reads_fine: Whether it reads fine views, too.
        has_weights: Whether it can be switched off. The input of an upgraded model cannot.
    """

    number: int
    taps: tuple[int, ...]
    layer: int
    mix: str
    label: str
    description: str
    reads_fine: bool
    has_weights: bool


def list_arrows(plan: Plan, vision_depth: int) -> list[Arrow]:
    """Return the arrows of a plan, for an encoder of `vision_depth` blocks."""
    arrows = []
    for number, shortcut in enumerate(plan.shortcuts):
        taps = sorted({tap % (vision_depth + 1) for tap in shortcut.flat_taps})
        label = shortcut.mix
        if len(taps) > 1:
            label += f" of {len(taps)} taps"
        if shortcut.grain:
            label += f" grain {shortcut.grain}"
        arrow = Arrow(
            number=number,
            taps=tuple(taps),
            layer=shortcut.layer,
            mix=shortcut.mix,
            label=label,
            description=shortcut.mixer.description,
            reads_fine=plan.tiles > 0 and not shortcut.is_coarse,
            has_weights=shortcut.mix != "base",
        )
        arrows.append(arrow)
    return arrows


def draw(
    plan: Plan,
    vision_depth: int,
    language_depth: int,
    *,
    num_patches: int | None = None,
    title: str | None = None,
) -> str:
    """Draw a plan as lines of text.

    Args:
        plan: The plan.
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        num_patches: Patches of one view, where known. They give the number of image tokens.
        title: The first line.

    Raises:
        UserError: The plan does not fit these depths.
    """
    plan.check(vision_depth, language_depth)
    arrows = list_arrows(plan, vision_depth)
    lines = [] if title is None else [title]
    lines += [summarize(plan), ""]
    lines += _draw_stacks(arrows, vision_depth, language_depth)
    lines += ["", *_list_details(plan, vision_depth, num_patches)]
    return "\n".join(lines)


def summarize(plan: Plan) -> str:
    """Return the plan in one line of text."""
    count = len(plan.shortcuts) - 1
    text = f"{count or 'no'} shortcut{'' if count == 1 else 's'}"
    if count and not plan.layers:
        text += " into the input"
    parts = [text, f"{plan.tiles}x{plan.tiles} fine views" if plan.tiles else "coarse view only"]
    if count:
        parts.append(_describe_projectors(plan))
    parts.append("norm on taps" if plan.norm else "no norm")
    if plan.layers:
        parts.append(GATES[plan.gate].description)
    return ", ".join(parts)


def _describe_projectors(plan: Plan) -> str:
    rank = f" of rank {plan.rank}" if plan.rank else ""
    if not plan.shared:
        return f"a projector{rank} {'by tap' if plan.tied else 'each'}"
    return f"one projector, corrections{rank}" if rank else "one shared projector"


def _list_details(plan: Plan, vision_depth: int, num_patches: int | None) -> list[str]:
    """What the drawing cannot show: views, image tokens, mixers, and how layers are numbered."""
    plural = "s" if plan.num_views > 1 else ""
    details = {
        "image": f"{plan.num_views} view{plural}: {_describe_views(plan, vision_depth)}",
        "image tokens": _describe_tokens(plan, num_patches),
    }
    details |= {s.mix: s.mixer.description for s in plan.shortcuts}
    details |= {
        "left": "hidden states of the encoder: 0 = patch embedding, k = after block k",
        "right": "the layer before which features are added: 0 = input embedding",
    }
    width = max(13, *map(len, details))
    return [f"  {name:{width}} {text}" for name, text in details.items()]


def _describe_views(plan: Plan, vision_depth: int) -> str:
    if not plan.tiles:
        return "coarse only"
    text = f"1 coarse and {plan.tiles} x {plan.tiles} fine"
    fine_taps = plan.fine_taps(vision_depth)
    if fine_taps and max(fine_taps) < max(plan.resolved_taps(vision_depth)):
        text += f", the fine ones as far as block {max(fine_taps)}"
    return text


def _describe_tokens(plan: Plan, num_patches: int | None) -> str:
    if plan.has_base_input:
        return "the base's own, as many as before"
    if num_patches is None:
        return f"{plan.image_tokens(8) / 8:g} for each coarse patch"
    return f"{plan.image_tokens(num_patches)} per image ({num_patches} patches per view)"


def _draw_stacks(arrows: Sequence[Arrow], vision_depth: int, language_depth: int) -> list[str]:
    taps = {tap for arrow in arrows for tap in arrow.taps}
    layers = {arrow.layer for arrow in arrows}
    straight = find_straight_pairs(arrows)
    left = fold(taps, vision_depth + 1)
    right = fold(layers, language_depth)
    rows = _align(left, right, straight, taps, layers)
    routing = _route(rows, arrows, straight)
    labels = _label_layers(arrows)
    label_width = max(len(label) for label in labels.values()) + 8
    space = " " * (routing.width + label_width + 1)
    lines = [
        _draw_header("vision encoder", "language model", space),
        _draw_header(f"{vision_depth} blocks", f"{language_depth} layers", space),
        _draw_edges(RIGHT | DOWN, LEFT | DOWN, space),
    ]
    for y in reversed(range(len(rows))):
        tap, layer = rows[y]
        vision = f"{VISION_NAMES.get(tap, tap):^{STACK_WIDTH}}"
        language = f"{LANGUAGE_NAMES.get(layer, layer):^{STACK_WIDTH}}"
        edge = LINES[UP | DOWN | RIGHT] if tap in taps else POST
        arrow = _draw_arrow(labels.get(layer), label_width)
        lines.append(f"  {POST}{vision}{edge}{routing.draw_row(y)}{arrow}{POST}{language}{POST}")
    lines.append(_draw_edges(RIGHT | UP, LEFT | UP, space))
    return lines


def _draw_header(vision: str, language: str, space: str) -> str:
    width = STACK_WIDTH + 2
    return f"  {vision:^{width}}{space}{language:^{width}}".rstrip()


def _draw_arrow(label: str | None, width: int) -> str:
    """The arrow into a layer with what arrives there; spaces of its length where nothing does."""
    if label is None:
        return " " * (width + 1)
    return f" {label} ".center(width, LINE) + ARROW


def _draw_edges(left_corner: int, right_corner: int, space: str) -> str:
    """The upper or lower edges of both stacks."""
    edge = LINES[left_corner] + LINE * STACK_WIDTH + LINES[right_corner]
    return f"  {edge}{space}{edge}"


def find_straight_pairs(arrows: Sequence[Arrow]) -> list[tuple[int, int]]:
    """Return (tap, layer) of the longest run of arrows that climb both stacks together.

    The list is empty where most arrows would not join the run.
    """
    single = [arrow for arrow in arrows if arrow.layer > 0 and len(arrow.taps) == 1]
    pairs = sorted((arrow.layer, arrow.taps[0]) for arrow in single)
    runs: list[list[tuple[int, int]]] = []
    for layer, tap in pairs:
        longest: list[tuple[int, int]] = []
        for run in runs:
            last_tap, last_layer = run[-1]
            if last_tap < tap and last_layer < layer and len(run) > len(longest):
                longest = run
        runs.append([*longest, (tap, layer)])
    longest = max(runs, key=len, default=[])
    return longest if 2 * len(longest) >= len(pairs) else []


def fold(used: set[int], count: int) -> list[Item]:
    """Return the numbers from 0 to `count` - 1, with dots for unused ones that have an unused
    neighbour.
    """
    items: list[Item] = []
    for number in range(count):
        neighbours = {number - 1, number + 1} & set(range(count))
        if number in used or neighbours <= used:
            items.append(number)
        elif not items or items[-1] != DOTS:
            items.append(DOTS)
    return items


def _align(
    left: list[Item],
    right: list[Item],
    straight: Sequence[tuple[int, int]],
    taps: set[int],
    layers: set[int],
) -> list[Row]:
    """Put both stacks on common rows, from the bottom up, with straight pairs on one row."""
    rows: list[Row] = []
    for tap, layer in straight:
        i = left.index(tap)
        j = right.index(layer)
        rows += _interleave(left[:i], right[:j], taps, layers)
        rows.append((tap, layer))
        left = left[i + 1 :]
        right = right[j + 1 :]
    rows += _interleave(left, right, taps, layers)
    for y in range(1, len(rows)):  # dots fill the height that the other stack takes
        items = []
        for item, below in zip(rows[y], rows[y - 1], strict=True):
            items.append(DOTS if item == "" and below == DOTS else item)
        rows[y] = (items[0], items[1])
    return rows


def _interleave(left: list[Item], right: list[Item], taps: set[int], layers: set[int]) -> list[Row]:
    """Put items side by side, but no used tap beside a used layer, where lines would meet."""
    left = list(left)
    right = list(right)
    rows: list[Row] = []
    while left or right:
        clash = bool(left and right) and left[0] in taps and right[0] in layers
        left_is_taller = len(left) >= len(right)
        takes_left = left and (left_is_taller or not clash)
        takes_right = right and not (left_is_taller and clash)
        rows.append((left.pop(0) if takes_left else "", right.pop(0) if takes_right else ""))
    return rows


@dataclass
class Routing:
    """The space between the stacks, as cells that lines pass in some directions.

    Attributes:
        width: Number of columns.
        directions: (column, row) -> the directions of the lines in the cell.
        crossings: Cells where a horizontal and a vertical line meet.
        joints: Crossings where the two belong together.
    """

    width: int
    directions: Counter = field(default_factory=Counter)
    crossings: set[tuple[int, int]] = field(default_factory=set)
    joints: set[tuple[int, int]] = field(default_factory=set)

    def add_horizontal(self, y: int, start: int, stop: int) -> None:
        """Add a line along a row. It is open at the edges of the space.

        Args:
            y: The row.
            start: The first column.
            stop: The last column.
        """
        for x in range(start, stop + 1):
            goes_left = x > start or x == 0
            goes_right = x < stop or x == self.width - 1
            self._add(x, y, LEFT * goes_left | RIGHT * goes_right)

    def add_vertical(self, x: int, low: int, high: int) -> None:
        """Add a line along a column.

        Args:
            x: The column.
            low: The lowest row; rows are counted upwards.
            high: The highest row.
        """
        for y in range(low, high + 1):
            self._add(x, y, UP * (y < high) | DOWN * (y > low))

    def _add(self, x: int, y: int, directions: int) -> None:
        if {directions, self.directions[x, y]} == {LEFT | RIGHT, UP | DOWN}:
            self.crossings.add((x, y))
        self.directions[x, y] |= directions

    def draw_row(self, y: int) -> str:
        """Return one row as text. Of two lines that only cross, the vertical one is seen."""
        row = ""
        for x in range(self.width):
            is_passed = (x, y) in self.crossings and (x, y) not in self.joints
            row += POST if is_passed else LINES.get(self.directions[x, y], " ")
        return row


def _route(
    rows: Sequence[Row], arrows: Sequence[Arrow], straight: Sequence[tuple[int, int]]
) -> Routing:
    """Route every arrow. Lower layers have their track further left.

    So lines that leave one tap do not cross.
    """
    tap_rows = {tap: y for y, (tap, _) in enumerate(rows)}
    layer_rows = {layer: y for y, (_, layer) in enumerate(rows)}
    routed = []
    for arrow in arrows:
        is_straight = len(arrow.taps) == 1 and (arrow.taps[0], arrow.layer) in straight
        if arrow.taps and not is_straight:
            routed.append(arrow)
    layers = sorted({arrow.layer for arrow in routed})
    step = 2 if len(layers) <= MANY_TRACKS else 1
    routing = Routing(width=2 + step * len(layers))
    for tap, _ in straight:
        routing.add_horizontal(tap_rows[tap], 0, routing.width - 1)
    for arrow in routed:
        x = 1 + step * layers.index(arrow.layer)
        end = layer_rows[arrow.layer]
        starts = [tap_rows[tap] for tap in arrow.taps]
        for y in starts:
            routing.add_horizontal(y, 0, x)
            routing.joints.add((x, y))
        routing.add_vertical(x, min(end, *starts), max(end, *starts))
        routing.add_horizontal(end, x, routing.width - 1)
    return routing


def _label_layers(arrows: Sequence[Arrow]) -> dict[int, str]:
    """What arrives at each layer: the mixers' names, counted where several add up."""
    counters: dict[int, Counter] = {}
    for arrow in arrows:
        counters.setdefault(arrow.layer, Counter())[arrow.label] += 1
    labels = {}
    for layer, counter in counters.items():
        names = [f"{n} x {name}" if n > 1 else name for name, n in counter.items()]
        labels[layer] = " + ".join(names)
    return labels


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
    rows = [_escape_cells(row) for row in rows]
    columns = list(zip(*rows, strict=True))
    widths = [len(max(column, key=len)) for column in columns]
    align = align or "<" + ">" * (len(columns) - 1)
    lines = []
    for row in rows:
        cells = [
            f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)
        ]
        lines.append(separator.join(cells).rstrip())
    return "\n".join(lines)


def _escape_cells(row: Sequence[str]) -> list[str]:
    return [escape_controls(cell, keep_lines=False) for cell in row]
