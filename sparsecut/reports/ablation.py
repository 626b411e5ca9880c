"""The report of what each shortcut contributes: text for a terminal, Markdown, JSON, and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..drawing import text_table
from ..evaluation.mapped_questions import MappedQuestion
from ..plan import Plan
from ..schema import write_text_file
from .heat_maps import make_cards
from .pages import render
from .plan_drawing import draw_plan
from .tables import Cell, Rows, format_points, to_markdown
from .verdicts import describe_uses, judge_ablation, locate_shortcut

LEVEL_ORDER = ("high", "mid", "low")  # of the built-in shapes
DARKEST = 60  # points of loss
FIRST_LEVEL = 5  # the first column after average, interval, lost and won
NOTES = (
    "A shortcut that is off adds zeros; nothing was trained again. Two that carry the same can each"
    " be dropped at no loss.",
    "Points of accuracy against all shortcuts; the 95 % interval is over images, for this one"
    " trained model. Lost and won are answers that turned wrong and right. Dashed cells are gains"
    " of a point or more.",
    "Shuffled: the shortcut reads another image. A loss without it, but none when it is shuffled,"
    " means that the model uses its presence and not its content.",
    "Norms are means over image tokens, after gates. The ratio is what a shortcut adds over the"
    " hidden state it is added to (for layer 0: over the input's own features). A ratio near 0 is a"
    " shortcut that is hardly used.",
)


def write_explanation(
    explanation: dict, out: Path, questions: Sequence[MappedQuestion] = (), reason: str = ""
) -> Path:
    """Write explain.json, explain.md and explain.html.

    Args:
        explanation: What `evaluation.ablation.explain` returned.
        out: The folder to write to.
        questions: Questions with heat maps, for the page.
        reason: Why there are fewer than asked for.

    Returns:
        The path of explain.html.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(explanation, indent=1) + "\n"
    write_text_file(out / "explain.json", text)
    write_text_file(out / "explain.md", write_markdown(explanation))
    path = out / "explain.html"
    write_text_file(path, write_page(explanation, questions, reason))
    return path


def write_text(explanation: dict) -> str:
    """Return the verdict and both tables as lines for a terminal."""
    tables = [text_table(make_loss_table(explanation)), text_table(make_norm_table(explanation))]
    uses = ["\n".join(lines)] if (lines := describe_uses(explanation)) else []
    return "\n\n".join([judge_ablation(explanation), *uses, *tables])


def write_markdown(explanation: dict) -> str:
    """Return the verdict, both tables and the notes in Markdown."""
    parts = ["# What each shortcut contributes", f"**{judge_ablation(explanation)}**"]
    if uses := describe_uses(explanation):
        parts.append("\n".join(f"- {use}" for use in uses))
    parts.append("## Accuracy without it\n\n" + to_markdown(make_loss_table(explanation)))
    parts.append("## Size of its features\n\n" + to_markdown(make_norm_table(explanation)))
    parts.append("\n".join(f"- {note}" for note in NOTES))
    return "\n\n".join(parts) + "\n"


def write_page(
    explanation: dict, questions: Sequence[MappedQuestion] = (), reason: str = ""
) -> str:
    """Return the page, with losses as a table that is darker where more is lost.

    Args:
        explanation: What `evaluation.ablation.explain` returned.
        questions: Questions with heat maps.
        reason: Why there are fewer than asked for.
    """
    numbers = range(len(explanation["shortcuts"]))
    names = {number: locate_shortcut(explanation, number) for number in numbers}
    head, *rows = make_loss_table(explanation)
    return render(
        "explain.html.j2",
        title="What each shortcut contributes",
        verdict=judge_ablation(explanation),
        uses=describe_uses(explanation),
        cards=make_cards(questions, names),
        reason=reason,
        num_questions=explanation["num_questions"],
        num_images=explanation.get("num_images"),
        loss_head=head,
        loss_rows=_shade_losses(explanation, rows),
        norm_table=make_norm_table(explanation),
        drawing=draw_plan(Plan.from_dict(explanation["plan"]), *explanation["depths"]),
        notes=NOTES,
    )


def list_columns(explanation: dict) -> list[tuple[str, str]]:
    """The columns after the average: (levels or groups, name)."""
    first = explanation["conditions"]["all"]
    columns = [("levels", name) for name in sorted(first["levels"], key=_get_level_rank)]
    columns += [("groups", name) for name in sorted(first["groups"])]
    return columns


def _get_level_rank(name: str) -> tuple[int, str]:
    rank = LEVEL_ORDER.index(name) if name in LEVEL_ORDER else len(LEVEL_ORDER)
    return rank, name


def get_average(condition: dict) -> float:
    """The mean over levels, or the accuracy where questions have none."""
    mean = condition["mean_over_levels"]
    return condition["accuracy"] if mean is None else mean


def make_loss_table(explanation: dict) -> Rows:
    """Accuracy with all shortcuts, then points won or lost against it under every condition."""
    columns = list_columns(explanation)
    rows = [["shortcuts", "average", "interval", "lost", "won", *(name for _, name in columns)]]
    for name in explanation["conditions"]:
        if name == "all":
            rows.append(_make_full_row(explanation, columns))
        else:
            rows.append(_make_loss_row(explanation, name, columns))

    return rows


def _make_full_row(explanation: dict, columns: list[tuple[str, str]]) -> list[str]:
    condition = explanation["conditions"]["all"]
    row = ["all of them", f"{100 * get_average(condition):.1f} %", "", "", ""]
    for kind, column in columns:
        row.append(f"{100 * condition[kind][column]['accuracy']:.1f} %")
    return row


def _make_loss_row(explanation: dict, name: str, columns: list[tuple[str, str]]) -> list[str]:
    condition = explanation["conditions"][name]
    full = explanation["conditions"]["all"]
    interval = condition["difference"]["average"]
    low = format_points(interval["low"])
    high = format_points(interval["high"])
    row = [
        _describe_condition(explanation, name),
        format_points(get_average(condition) - get_average(full)),
        f"{low} to {high}",
        str(condition["lost"]),
        str(condition["gained"]),
    ]

    for kind, column in columns:
        accuracy = condition[kind][column]["accuracy"]
        row.append(format_points(accuracy - full[kind][column]["accuracy"]))

    return row


def _describe_condition(explanation: dict, name: str) -> str:
    kind, _, number = name.rpartition(" ")
    if not number.isdigit():
        return "the input only"
    return f"{kind} {locate_shortcut(explanation, int(number))}"


def make_norm_table(explanation: dict) -> Rows:
    """Where each shortcut goes, and how much it adds."""
    head = ["shortcut", "taps", "layer", "mix", "gate"]
    rows = [[*head, "norm added", "norm of the hidden state", "ratio", "cosine"]]
    for shortcut in explanation["shortcuts"]:
        name = str(shortcut["number"])
        if shortcut["number"] == explanation["input"]:
            name += " (the input)"
        rows.append(
            [
                name,
                ", ".join(str(tap) for tap in shortcut["taps"]),
                str(shortcut["layer"]),
                shortcut["mix"],
                _format_norm(shortcut["gate"]),
                _format_norm(shortcut["norm"]),
                _format_norm(shortcut["hidden_norm"]),
                _format_norm(shortcut["ratio"]),
                _format_norm(shortcut["cosine"]),
            ]
        )

    return rows


def _format_norm(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _shade_losses(explanation: dict, rows: Rows) -> list[list[Cell]]:
    """The loss table's cells: darker for a larger loss, with a border for a gain."""
    full, *losses = rows
    shaded = [[Cell(text) for text in full]]
    for row in losses:
        cells = []
        for place, text in enumerate(row):
            is_change = place == 1 or place >= FIRST_LEVEL
            cells.append(_shade(text) if is_change else Cell(text))
        shaded.append(cells)

    return shaded


def _shade(text: str) -> Cell:
    points = float(text)
    if points >= 1:
        return Cell(text, classes="gain")
    depth = min(1.0, max(0.0, -points / DARKEST))
    return Cell(text, depth, "shaded" if depth else "")
