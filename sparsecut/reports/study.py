"""What a study found: every figure from what its runs left on disk, as JSON, as Markdown tables and
as a page.

`study_figures.figures` computes; its result is report.json, and the other two files only show it. An unfinished study is
reported as far as it goes, and what is missing is named.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..experiments.results import SIZES, figures
from .study_page import page
from .tables import (
    budget_rows,
    cost_rows,
    group_rows,
    is_clear,
    level_rows,
    main_rows,
    missing_words,
    notes,
    points,
    share,
    span,
)

AFFORDABLE = 1.10  # times the baseline's prefill FLOPs


def write_study_report(folder: Path) -> Path:
    """Write report.json, report.md and report.html into a study's folder; returns the last one's
    path.

    Raises ValueError where there is no study, or where runs were asked different questions.
    """
    folder = Path(folder)
    found = figures(folder)
    found["headline"] = headline(found)
    (folder / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (folder / "report.md").write_text(markdown(found), encoding="utf-8")
    path = folder / "report.html"
    path.write_text(page(found), encoding="utf-8")
    return path


def headline(found: dict) -> list[str]:
    """What the figures say, in sentences."""
    arms, main, baseline = found["arms"], found["main"], found["baseline"]
    done = {name: arm["results"][main] for name, arm in arms.items() if main in arm["results"]}
    if not done:
        return ["No run of the main budget is finished, so there is nothing to say yet."]
    best = max(done, key=lambda name: done[name]["average"]["value"])
    lines = [f"Highest average: {best} with {_said(done[best])}{_beside(found, best)}."]
    if alike := [name for name in done if name != best and not _surely_differ(found, best, name)]:
        lines.append(
            f"Not told apart from it once all pairs are corrected for: {', '.join(alike)}."
        )
    for size, words in SIZES.items():
        cheap = [n for n in done if (arms[n]["relative"][size] or 9e9) <= AFFORDABLE]
        if cheap and any(arms[n]["relative"][size] for n in done):
            top = max(cheap, key=lambda name: done[name]["average"]["value"])
            lines.append(
                f"Best at no more than {AFFORDABLE:.2f} times the prefill FLOPs of {baseline} at"
                f" {words}: {top} with {_said(done[top])}{_beside(found, top, size)}."
            )
        if found["frontier"][size]:
            lines.append(
                f"No arm is both better and cheaper at {words} than:"
                f" {', '.join(found['frontier'][size])}."
            )
    compared = {n: r["difference"]["corrected"] for n, r in done.items() if r.get("difference")}
    if compared:
        above = [n for n, e in compared.items() if e["low"] > 0]
        below = [n for n, e in compared.items() if e["high"] < 0]
        rest = [n for n in compared if n not in above and n not in below]
        said = [
            (above, "clearly above it"),
            (below, "clearly below it"),
            (rest, "not told apart from it"),
        ]
        parts = "; ".join(
            f"{len(names)} {words} ({', '.join(names)})" for names, words in said if names
        )
        lines.append(
            f"Of {len(compared)} arms compared with {baseline}, corrected for so many comparisons:"
            f" {parts}."
        )
    for budget in found["budgets"]:
        if change := done[best].get("change", {}).get(budget):
            old, new = (
                arms[best]["results"][b]["difference"]["average"]["value"]
                for b in (change["from"], change["to"])
            )
            lines.append(
                f"Between the budgets {change['from']} and {change['to']} the lead of {best} over"
                f" {baseline} goes from {points(old)} to {points(new)} points, a change of"
                f" {points(change['value'])} ({span(change)})."
            )
    if any((r.get("difference") or {}).get("note") for r in done.values()):
        lines.append(
            "Some arms have one seed in common only: their intervals leave out that another"
            " training may differ."
        )
    if found["missing"]:
        lines.append(
            f"Unfinished: {len(found['missing'])} runs are missing, see the end of this report."
        )
    return lines


def markdown(found: dict) -> str:
    """The report's tables in GitHub's Markdown."""
    parts = [f"# {found['title']}", *([found["note"]] if found["note"] else [])]
    parts.append("\n".join(f"- {line}" for line in found["headline"]))
    for title, rows in (
        ("Quality and cost", main_rows(found)),
        ("Differences per level", level_rows(found)),
        ("By kind of question", group_rows(found)),
        ("Training budgets", budget_rows(found)),
        ("Cost", cost_rows(found)),
    ):
        if len(rows) > 1:
            parts.append(f"## {title}\n\n" + _table(rows))
    parts.append("\n".join(f"- {line}" for line in notes(found)))
    if found["missing"]:
        parts.append(f"Missing runs: {missing_words(found)}.")
    return "\n\n".join(parts) + "\n"


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _surely_differ(found: dict, one: str, other: str) -> bool:
    """Whether the two differ after correction for all pairs; arms outside the matrix count as
    differing.
    """
    cells = [e for a, b, e in found["pairs"]["cells"] if {a, b} == {one, other}]
    return not cells or cells[0]["corrected_p"] < 0.05


def _said(result: dict) -> str:
    seeds = len(result["seeds"])
    return (
        f"{share(result['average'])} % ({span(result['average'])}, {seeds} seed{'s' * (seeds > 1)})"
    )


def _beside(found: dict, name: str, size: str = "large") -> str:
    """How far an arm is from the baseline, and at which cost, as the end of a sentence."""
    arm, baseline = found["arms"][name], found["baseline"]
    words = ""
    if gap := arm["results"][found["main"]].get("difference"):
        wide = gap["corrected"]
        clear = "clear of zero" if is_clear(wide) else "not clear of zero"
        value = gap["average"]["value"]
        words = f", {abs(100 * value):.1f} points {'above' if value >= 0 else 'below'} {baseline}"
        words += f" (difference {span(wide)} after correction, {clear})"
    if name != baseline and arm["relative"][size]:
        words += f", at {arm['relative'][size]:.3f} times its prefill FLOPs ({SIZES[size]})"
    return words
