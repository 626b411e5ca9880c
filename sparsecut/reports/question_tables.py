"""A table for each question that a study asks."""

from __future__ import annotations

from .tables import DASH, Rows, format_change, format_number, is_clear


def make_question_tables(results: dict) -> list[dict]:
    """Titles (`ask`), notes and tables (`rows`) of the questions with a finished pair."""
    tables = []
    for question in results["questions"].values():
        if question["rows"]:
            rows = _make_rows(results, question)
            note = _write_note(question["comparisons"], len(rows) - 1)
            tables.append({"ask": question["ask"], "note": note, "rows": rows})
    return tables


def _make_rows(results: dict, question: dict) -> Rows:
    has_budgets = any(row["budget"] != results["main"] for row in question["rows"])
    has_open = any(row.get("open") for row in question["rows"])
    head = ["variant", "against"]
    head += ["budget"] if has_budgets else []
    head += ["seeds", "average, points"]
    head += ["open questions, points"] if has_open else []
    rows = [[*head, "FLOPs here", "FLOPs large"]]
    for row in question["rows"]:
        first, second = row["pair"]
        cells = [first, second]
        cells += [row["budget"]] if has_budgets else []
        cells += [str(len(row["seeds"])), _mark(row["average"])]
        cells += [_mark(row.get("open"))] if has_open else []
        cells += [_compare_cost(results, first, second, size) for size in ("here", "large")]
        rows.append(cells)
    return rows


def _mark(estimate: dict | None) -> str:
    """A difference in points with its interval, and a star where that leaves zero out."""
    if not estimate:
        return DASH
    return format_change(estimate) + (" *" if is_clear(estimate) else "")


def _compare_cost(results: dict, first: str, second: str, size: str) -> str:
    """Prefill FLOPs of both, relative to the baseline."""
    costs = [results["arms"][name]["relative"][size] for name in (first, second)]
    return " and ".join(format_number(cost, ".3f") for cost in costs)


def _write_note(comparisons: int, finished: int) -> str:
    star = "a star: clear of zero."
    if comparisons == 1:
        return f"Difference, paired by seed and question, with its 95 % interval; {star}"
    note = (
        "Differences, paired by seed and question, with 95 % intervals that hold together for all"
        f" {comparisons} comparisons of this question; {star}"
    )
    missing = comparisons - finished
    return f"{note} Not finished: {missing} of them." if missing else note
