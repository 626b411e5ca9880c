"""A study's findings in sentences: the list below the verdict of its report."""

from __future__ import annotations

from ..experiments.variant_costs import SIZES
from .protocol_tables import write_rate_warnings, write_text_notes
from .study_tables import get_main_results, rank_variants
from .tables import (
    format_change,
    format_interval,
    format_percent,
    format_points,
    get_difference,
    is_clear,
)
from .verdicts import find_indistinguishable

AFFORDABLE = 1.10  # times the baseline's prefill FLOPs


def write_findings(results: dict) -> list[str]:
    """Return the findings of a study, one sentence each."""
    by_variant = get_main_results(results)
    if not by_variant:
        return ["No run of the main budget is finished, so there are no findings yet."]
    best = max(by_variant, key=lambda name: by_variant[name]["average"]["value"])
    findings = [f"Highest average: {_describe(results, best, 'large')}."]
    close = find_indistinguishable(results, best)
    if close:
        findings.append(
            f"Not distinguishable from it, corrected for all pairs: {', '.join(close)}."
        )

    for size in SIZES:
        findings += _describe_affordable(results, size)

    findings += _sort_by_side(results)
    for budget in results["budgets"]:
        change = by_variant[best].get("change", {}).get(budget)
        if change:
            findings.append(_describe_budget_change(results, best, change))

    gaps = [result.get("difference") for result in by_variant.values()]
    if any(gap and gap["note"] for gap in gaps):
        findings.append(
            "Some variants have one seed in common only: their intervals leave out that another"
            " training may differ."
        )

    findings += write_text_notes(results)
    findings += write_rate_warnings(results)
    if results["missing"]:
        findings.append(
            f"Unfinished: {len(results['missing'])} runs are missing, see the end of this report."
        )

    return findings


def _describe(results: dict, name: str, size: str) -> str:
    """A variant's accuracy, how far it is from the baseline, and at which cost."""
    variant = results["arms"][name]
    result = variant["results"][results["main"]]
    baseline = results["baseline"]
    average = result["average"]
    percent = format_percent(average)
    num_seeds = len(result["seeds"])
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
    text = f"{name} with {percent} % ({format_interval(average)}, {seeds})"

    gap = result.get("difference")
    if gap:
        value = 100 * gap["average"]["value"]
        side = "above" if value >= 0 else "below"
        corrected = gap["corrected"]
        clear = "clear of zero" if is_clear(corrected) else "not clear of zero"
        text += f", {abs(value):.1f} points {side} {baseline}"
        text += f" (difference {format_interval(corrected)} after correction, {clear})"

    cost = variant["relative"][size]
    if name != baseline and cost:
        text += f", at {cost:.3f} times its prefill FLOPs ({SIZES[size]})"
    return text


def _describe_affordable(results: dict, size: str) -> list[str]:
    """The best variant that costs little more than the baseline, and the frontier."""
    findings = []
    cheap = []
    for name in rank_variants(results):
        cost = results["arms"][name]["relative"][size]
        if cost and cost <= AFFORDABLE:
            cheap.append(name)

    if cheap:
        best = _describe(results, cheap[0], size)
        findings.append(
            f"Best at no more than {AFFORDABLE:.2f} times the prefill FLOPs of"
            f" {results['baseline']} at {SIZES[size]}: {best}."
        )

    frontier = results["frontier"][size]
    if frontier:
        findings.append(
            f"No variant is both better and cheaper at {SIZES[size]} than: {', '.join(frontier)}."
        )

    return findings


def _sort_by_side(results: dict) -> list[str]:
    """Which variants are clearly above or below the baseline."""
    sides: dict[str, list[str]] = {
        "clearly above it": [],
        "clearly below it": [],
        "not distinguishable from it": [],
    }
    for name, result in get_main_results(results).items():
        gap = result.get("difference")
        if not gap:
            continue
        if gap["corrected"]["low"] > 0:
            sides["clearly above it"].append(name)
        elif gap["corrected"]["high"] < 0:
            sides["clearly below it"].append(name)
        else:
            sides["not distinguishable from it"].append(name)

    parts = []
    for side, names in sides.items():
        if names:
            parts.append(f"{len(names)} {side} ({', '.join(names)})")

    if not parts:
        return []
    number = sum(len(names) for names in sides.values())
    return [
        f"Of {number} variants compared with {results['baseline']}, corrected for so many"
        f" comparisons: {'; '.join(parts)}."
    ]


def _describe_budget_change(results: dict, name: str, change: dict) -> str:
    by_budget = results["arms"][name]["results"]
    leads = []
    for budget in (change["from"], change["to"]):
        gap = get_difference(by_budget[budget])
        leads.append(format_points(gap["value"]))

    return (
        f"Between the budgets {change['from']} and {change['to']} the lead of {name} over"
        f" {results['baseline']} goes from {leads[0]} to {leads[1]} points, a change of"
        f" {format_change(change)}."
    )
