"""Numbers as text, and tables as rows of text; the first row of a table is its head."""

from __future__ import annotations

from dataclasses import dataclass

DASH = "\N{EN DASH}"
PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))

Rows = list[list[str]]


@dataclass(frozen=True)
class Cell:
    """A cell of a shaded table.

    Attributes:
        text: What stands in it.
        depth: How dark it is, 0 to 1.
        classes: Names of styles: shaded, gain, sure, unclear.
    """

    text: str
    depth: float = 0.0
    classes: str = ""


def format_points(value: float) -> str:
    """A difference of fractions in points with its sign: +1.2."""
    return f"{100 * value:+.1f}"


def format_percent(estimate: dict) -> str:
    """The value of an estimate in per cent: 58.0."""
    return f"{100 * estimate['value']:.1f}"


def format_interval(estimate: dict) -> str:
    """The interval of an estimate in per cent or points: 1.2 to 3.4."""
    return f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"


def format_percent_interval(estimate: dict) -> str:
    """An estimate in per cent with its interval: 58.0 (56.9 to 59.0)."""
    return f"{format_percent(estimate)} ({format_interval(estimate)})"


def format_change(estimate: dict | None) -> str:
    """A difference in points with its interval, or a dash: +1.2 (0.3 to 2.1)."""
    if not estimate:
        return DASH
    return f"{format_points(estimate['value'])} ({format_interval(estimate)})"


def format_number(value: float | None, form: str = ",") -> str:
    """A number in a format, or a dash where there is none."""
    return DASH if value is None else format(value, form)


def format_unit(value: float | None, unit: str) -> str:
    """A number with a prefix: 1.23 GFLOP."""
    if value is None:
        return DASH
    for prefix, size in PREFIXES:
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def get_difference(result: dict) -> dict | None:
    """The estimate of a result's difference from the baseline, where there is one."""
    gap = result.get("difference")
    return gap["average"] if gap else None


def get_interval(result: dict, level: str) -> tuple[float, float, float]:
    """(value, low, high) of a result's average, or of one of its levels."""
    estimate = result["average"] if level == "average" else result["levels"][level]
    return estimate["value"], estimate["low"], estimate["high"]


def is_clear(estimate: dict) -> bool:
    """Whether an interval leaves zero out."""
    return estimate["low"] > 0 or estimate["high"] < 0


def tabulate_fractions(corner: str, fractions: dict[str, dict[str, float]], last: str = "") -> Rows:
    """A row for each name and a column for each of its keys, in per cent; a dash where absent.

    The key `last` comes last.
    """
    keys: set[str] = set()
    for by_key in fractions.values():
        keys |= set(by_key)

    columns = sorted(keys, key=lambda key: (key == last, key))
    if not columns:
        return [[corner]]

    rows = [[corner, *columns]]
    for name, by_key in fractions.items():
        row = [name]
        for key in columns:
            row.append(f"{100 * by_key[key]:.1f}" if key in by_key else DASH)
        rows.append(row)

    return rows


def to_markdown(rows: Rows) -> str:
    """A table in GitHub's Markdown."""
    lines = []
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
