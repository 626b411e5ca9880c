"""A study's report: every number as JSON, tables as Markdown, and one page.

`experiments.results` computes; its result is report.json, and the other two files only show it. An
unfinished study is reported as far as it goes, and what is missing is named.
"""

from __future__ import annotations

import json
from pathlib import Path

from markupsafe import Markup

from ..experiments.results import compute_results
from ..experiments.study_parts import Question
from ..experiments.variant_costs import SIZES
from ..plan import Plan
from ..schema import write_text_file
from .figures import (
    Interval,
    draw_bars,
    draw_curves,
    get_curve_limit,
    is_drawn,
    write_svg,
)
from .findings import write_findings
from .pages import render
from .plan_drawing import draw_plan
from .protocol_tables import (
    make_rate_table,
    make_text_table,
    write_rate_warnings,
    write_text_notes,
)
from .question_tables import make_question_tables
from .scatter import Point, draw_scatter
from .study_tables import (
    get_main_results,
    make_budget_table,
    make_cost_table,
    make_kind_table,
    make_level_table,
    make_main_table,
    name_missing_runs,
    rank_variants,
    write_notes,
)
from .tables import (
    Cell,
    format_interval,
    format_number,
    format_percent,
    format_points,
    get_interval,
    is_clear,
    to_markdown,
)
from .verdicts import judge_study

MAX_CURVES = 5  # beside the baseline in one chart


def write_study_report(folder: str | Path, questions: dict[str, Question] | None = None) -> Path:
    """Write report.json, report.md, report.html and its main drawings into a study's folder.

    Args:
        folder: The study's folder.
        questions: What is asked of it, in place of the questions that it began with.

    Returns:
        The path of report.html.

    Raises:
        UserError: There is no study, or its runs answered different questions.
    """
    folder = Path(folder)
    results = compute_results(folder, questions)
    results["verdict"] = judge_study(results)
    results["headline"] = write_findings(results)
    write_text_file(folder / "report.json", json.dumps(results, indent=1))
    write_text_file(folder / "report.md", write_markdown(results))
    path = folder / "report.html"
    scatters = draw_scatters(results)
    write_text_file(path, write_page(results, scatters))
    for name, drawing in scatters.items():
        if is_drawn(drawing):
            write_svg(folder / f"report.{name}.svg", drawing)
    return path


def write_markdown(results: dict) -> str:
    """Return the report's tables in GitHub's Markdown."""
    findings = [f"- {finding}" for finding in results["headline"]]
    notes = [f"- {note}" for note in write_notes(results)]
    tables = {
        "Quality and cost": make_main_table(results),
        "Questions that text answers": make_text_table(results),
        "Fusion rates": make_rate_table(results),
        "Differences per level": make_level_table(results),
        "By kind of question": make_kind_table(results),
        "Training budgets": make_budget_table(results),
        "Cost": make_cost_table(results),
    }

    parts = [f"# {results['title']}", f"**{results['verdict']}**"]
    if results["note"]:
        parts.append(results["note"])
    parts.append("\n".join(findings))

    for table in make_question_tables(results):
        parts.append(f"## {table['ask']}\n\n{to_markdown(table['rows'])}\n\n{table['note']}")

    explained = {
        "Questions that text answers": write_text_notes(results),
        "Fusion rates": write_rate_warnings(results),
    }
    for title, rows in tables.items():
        if len(rows) > 1:
            parts.append(f"## {title}\n\n{to_markdown(rows)}")
            parts += explained.get(title, [])

    parts.append("\n".join(notes))
    if results["missing"]:
        parts.append(f"Missing runs: {name_missing_runs(results)}.")
    return "\n\n".join(parts) + "\n"


def write_page(results: dict, scatters: dict[str, Markup]) -> str:
    """Return the report as one HTML page, with the drawings of `draw_scatters`."""
    names = rank_variants(results)
    return render(
        "study.html.j2",
        title=results["title"] or "A study",
        verdict=results["verdict"],
        note=results["note"] or "",
        findings=results["headline"],
        question_tables=make_question_tables(results),
        baseline=results["baseline"],
        has_results=bool(names),
        main_table=make_main_table(results),
        notes=write_notes(results),
        text_table=make_text_table(results),
        text_notes=write_text_notes(results),
        rate_table=make_rate_table(results),
        rate_warnings=write_rate_warnings(results),
        level_charts=_draw_levels(results, names),
        scatters=scatters.values(),
        level_table=make_level_table(results),
        pair_head=["", *(str(i + 1) for i in range(len(results["pairs"]["arms"])))],
        pair_rows=_make_pair_rows(results["pairs"]),
        num_pairs=len(results["pairs"]["cells"]),
        cards=[_make_card(results, name) for name in _list_variants(results, names)],
        budget_table=make_budget_table(results),
        curves=_draw_all_curves(results, names),
        kind_table=make_kind_table(results),
        cost_table=make_cost_table(results),
        missing=name_missing_runs(results),
    )


def _list_variants(results: dict, ranked: list[str]) -> list[str]:
    """All variants: those with results first, best first."""
    return ranked + [name for name in results["arms"] if name not in ranked]


def _draw_levels(results: dict, names: list[str]) -> list[Markup]:
    """A chart of the average, then one of each level."""
    by_variant = get_main_results(results)
    charts = []
    for level in ("average", *results["levels"]):
        rows = {name: get_interval(by_variant[name], level) for name in names}
        charts.append(draw_bars(rows, title=level, reference=results["baseline"]))
    return charts


def draw_scatters(results: dict) -> dict[str, Markup]:
    """Draw accuracy against cost, at the study's own size and at the large one, by a name for each.

    Where it is known what text answers, the other questions have drawings of their own, first.
    """
    names = rank_variants(results)
    measures = {"average": (_get_averages(results, names), results["frontier"])}
    if results["text"] and results["num_questions"] > results["text"]["num_open"] > 0:
        opens = (_get_open_intervals(results, names), results["text"]["frontier"])
        measures = {"open questions": opens, **measures}

    x_label = f"prefill FLOPs / those of {results['baseline']}, stretched near 1"
    drawings = {}
    for measure, (intervals, frontiers) in measures.items():
        for size, size_name in SIZES.items():
            points = _make_points(results, intervals, frontiers[size], size)
            title = f"{measure.capitalize()}, at {size_name}"
            drawing = draw_scatter(points, title=title, x_label=x_label)
            drawings[f"{measure.split()[0]}-{size}"] = drawing
    return drawings


def _get_averages(results: dict, names: list[str]) -> dict[str, Interval]:
    by_variant = get_main_results(results)
    return {name: get_interval(by_variant[name], "average") for name in names}


def _get_open_intervals(results: dict, names: list[str]) -> dict[str, Interval]:
    parts = results["text"]["arms"]
    estimates = {name: parts[name]["open"] for name in names if "open" in parts.get(name, {})}
    return {name: (e["value"], e["low"], e["high"]) for name, e in estimates.items()}


def _make_points(
    results: dict, intervals: dict[str, Interval], frontier: list[str], size: str
) -> list[Point]:
    points = []
    for name, interval in intervals.items():
        variant = results["arms"][name]
        cost = variant["relative"][size]
        if cost:
            points.append(Point(name, cost, interval, variant["family"], name in frontier))
    return points


def _make_pair_rows(pairs: dict) -> list[list[Cell]]:
    """Row minus column of every pair, as cells with a shade."""
    estimates: dict[tuple[str, str], dict] = {}
    largest = 0.0
    for a, b, estimate in pairs["cells"]:
        value = estimate["value"]
        estimates[a, b] = estimate
        estimates[b, a] = {**estimate, "value": -value}
        largest = max(largest, abs(value))

    rows = []
    for number, row_name in enumerate(pairs["arms"], start=1):
        row = [Cell(f"{number} {row_name}")]
        for column_name in pairs["arms"]:
            estimate = estimates.get((row_name, column_name))
            cell = _make_pair_cell(estimate, largest or 1) if estimate else Cell("")
            row.append(cell)
        rows.append(row)

    return rows


def _make_pair_cell(estimate: dict, largest: float) -> Cell:
    depth = max(0.0, estimate["value"]) / largest
    classes = ["shaded"] if depth else []
    if estimate["corrected_p"] < 0.05:
        classes.append("sure")
    elif not is_clear(estimate):
        classes.append("unclear")
    return Cell(format_points(estimate["value"]), depth, " ".join(classes))


def _make_card(results: dict, name: str) -> dict:
    """What the page shows of one variant."""
    variant = results["arms"][name]
    result = variant["results"].get(results["main"], {})
    drawing = None
    if variant["plan"] and variant["depths"]:
        drawing = draw_plan(Plan.from_dict(variant["plan"]), *variant["depths"])
    facts = {
        "image tokens": format_number(variant["image_tokens"]),
        "encoder views": format_number(variant["views"]),
        "fusion parameters": format_number(variant["parameters"].get("fusion")),
        "prefill FLOPs here": format_number(variant["relative"]["here"], ".3f"),
        "prefill FLOPs large": format_number(variant["relative"]["large"], ".3f"),
        "training seconds": format_number(result.get("train_seconds"), ",.0f"),
    }
    return {
        "name": name,
        "family": variant["family"],
        "score": _describe_score(result),
        "drawing": drawing,
        "facts": facts,
    }


def _describe_score(result: dict) -> str:
    if not result:
        return "not run"
    score = f"average {format_percent(result['average'])} %"
    gap = result.get("difference")
    if gap:
        points = format_points(gap["average"]["value"])
        score += f", {points} points ({format_interval(gap['corrected'])} corrected)"
    return score


def _draw_all_curves(results: dict, names: list[str]) -> list[Markup]:
    """Losses by family, a few variants and the baseline in a chart, all on one scale."""
    baseline = results["baseline"]
    families: dict[str, list[str]] = {}
    for name, variant in results["arms"].items():
        if name in names and name != baseline:
            families.setdefault(variant["family"], []).append(name)

    all_lines = []
    for by_variant in results["curves"].values():
        all_lines += by_variant.values()

    limit = get_curve_limit(all_lines)

    charts = []
    for family, members in families.items():
        for start in range(0, len(members), MAX_CURVES):
            shown = [baseline, *members[start : start + MAX_CURVES]]
            for budget, by_variant in results["curves"].items():
                lines = {name: by_variant.get(name, []) for name in shown}
                title = f"{family}, {budget}"
                charts.append(draw_curves(lines, title=title, x_label="step", y_limit=limit))

    return charts
