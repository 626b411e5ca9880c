"""Places for names of points in a crowded figure. All coordinates are pixels, y grows upwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Box = tuple[float, float, float, float]  # left, bottom, right, top
Place = tuple[float, float]
MARK = 7  # pixels around a point that its mark takes
DISTANCES = (10, 14, 22, 34, 48, 64, 84, 108, 136, 168, 204, 244, 288)
DIRECTIONS = 20
CROWD = 60  # pixels within which points are neighbours
STEPS = 16  # along a line, where it is tested


def place_labels(
    anchors: Sequence[Place], sizes: Sequence[Place], lines: Sequence[Box], room: Box
) -> list[Box]:
    """Find a box for each label, near its point.

    Labels never cover a mark or one another, unless the room is full. They cover thin lines only
    where there is no other place nearby. Points in the thickest crowd choose first.

    Args:
        anchors: (x, y) of each point.
        sizes: (width, height) of each label.
        lines: Thin boxes that labels had better not cover.
        room: The box that all labels stay in.
    """
    marks = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in anchors]
    order = list(range(len(anchors)))
    order.sort(key=lambda i: -_count_neighbours(anchors, i))

    boxes: dict[int, Box] = {}
    for i in order:
        candidates = []
        for box in _make_candidates(anchors[i], sizes[i]):
            if _is_inside(box, room):
                candidates.append(box)
        labels = list(boxes.values())
        others = [*marks[:i], *marks[i + 1 :], *labels]
        boxes[i] = _choose_box(candidates, anchors[i], [marks[i], *others], lines)

    return [boxes[i] for i in range(len(anchors))]


def _count_neighbours(anchors: Sequence[Place], i: int) -> int:
    return sum(math.dist(anchors[i], other) < CROWD for other in anchors)


def _choose_box(
    candidates: Sequence[Box], anchor: Place, taken: Sequence[Box], lines: Sequence[Box]
) -> Box:
    """The first candidate that meets most wishes; the first of `taken` is the point's own mark."""
    free = [box for box in candidates if not _covers_any(box, taken)]
    clear = [box for box in free if not _covers_any(box, lines)]

    for box in clear:
        if not _is_hidden(box, anchor, taken[1:]):
            return box

    best = clear or free or candidates
    return best[0] if best else (*anchor, *anchor)


def find_leader_end(box: Box, anchor: Place) -> Place:
    """Return the point of a label's box that is nearest to its mark."""
    x, y = anchor
    left, bottom, right, top = box
    return min(max(x, left), right), min(max(y, bottom), top)


def _make_candidates(anchor: Place, size: Place) -> Iterator[Box]:
    """Yield boxes around a point, the nearest first, the right-hand side first."""
    x, y = anchor
    width, height = size

    for distance in DISTANCES:
        for turn in range(DIRECTIONS):
            angle = 2 * math.pi * turn / DIRECTIONS
            middle = y + distance * math.sin(angle)
            side = math.cos(angle)
            edge = x + distance * side
            if side > 0.2:
                left = edge
            elif side < -0.2:
                left = edge - width
            else:
                left = edge - width / 2
            yield left, middle - height / 2, left + width, middle + height / 2


def _is_inside(box: Box, room: Box) -> bool:
    is_right_of_the_left_edge = box[0] >= room[0] and box[1] >= room[1]
    return is_right_of_the_left_edge and box[2] <= room[2] and box[3] <= room[3]


def _covers_any(box: Box, others: Sequence[Box]) -> bool:
    return any(_overlap(box, other) for other in others)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _is_hidden(box: Box, anchor: Place, others: Sequence[Box]) -> bool:
    """Whether the line between a label and its mark runs through another mark or label."""
    x, y = anchor
    end_x, end_y = find_leader_end(box, anchor)

    for step in range(1, STEPS):
        fraction = step / STEPS
        place_x = x + fraction * (end_x - x)
        place_y = y + fraction * (end_y - y)
        point = (place_x, place_y, place_x, place_y)
        is_outside_the_mark = math.dist(anchor, (place_x, place_y)) > MARK
        if is_outside_the_mark and _covers_any(point, others):
            return True

    return False
