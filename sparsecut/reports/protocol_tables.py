"""Tables of a study's protocol: how rates were chosen, and what text alone answers."""

from __future__ import annotations

from .study_tables import rank_variants
from .tables import (
    DASH,
    Rows,
    format_change,
    format_interval,
    format_percent,
    format_percent_interval,
    is_clear,
)

CHOSEN = "*"
EMPTY_LOSS = "loss not finite"


def make_rate_table(results: dict) -> Rows:
    """The dev score of every variant at every rate; a star marks the rate that was chosen."""
    choices = results["rates"]
    rows = [["variant", *_name_columns(choices), "chosen", "lost at the default", "remarks"]]
    for name, choice in choices.items():
        row = [name]
        for rate in choice["grid"]:
            row.append(_format_cell(choice, rate, _differ(choices)))
        chosen = choice["rate"]
        lost = choice["lost_at_default"]
        row.append(DASH if chosen is None else f"{chosen:g}")
        row.append(DASH if lost is None else f"{100 * lost:.1f}")
        row.append("; ".join(_list_remarks(choice)) or DASH)
        rows.append(row)
    if len(rows) > 2:
        rows.append(_make_loss_row(choices))
    return rows


def _differ(choices: dict) -> bool:
    """Whether variants have different grids, because of their factors."""
    return len({tuple(choice["grid"]) for choice in choices.values()}) > 1


def _name_columns(choices: dict) -> list[str]:
    """The rates, or their places where variants have grids of their own."""
    grids = [choice["grid"] for choice in choices.values()] or [[]]
    if _differ(choices):
        return [f"rate {number}" for number in range(1, len(grids[0]) + 1)]
    return [f"{rate:g}" for rate in grids[0]]


def _format_cell(choice: dict, rate: float, names_rate: bool) -> str:
    """A mean dev score with its seeds."""
    cell = choice["cells"][f"{rate:g}"]
    prefix = f"{rate:g}: " if names_rate else ""
    if cell["diverged"]:
        return f"{prefix}{EMPTY_LOSS}"
    if cell["score"] is None:
        return f"{prefix}{DASH}"
    seeds = ", ".join(f"{100 * score:.1f}" for score in cell["by_seed"].values())
    mark = f" {CHOSEN}" if rate == choice["rate"] else ""
    return f"{prefix}{100 * cell['score']:.1f} ({seeds}){mark}"


def _list_remarks(choice: dict) -> list[str]:
    remarks = []
    if choice["missing"]:
        remarks.append(f"{choice['missing']} runs missing")
    if choice["at_edge"]:
        remarks.append("at the edge of the grid")
    if choice["unclear"]:
        rates = ", ".join(f"{rate:g}" for rate in choice["unclear"])
        remarks.append(f"not told from {rates}")
    return remarks


def _make_loss_row(choices: dict) -> list[str]:
    """The most that any variant loses against its own best, at every rate of the grid."""
    row = ["most that a variant loses"]
    number = max(len(choice["grid"]) for choice in choices.values())
    for place in range(number):
        losses = [_get_loss(choice, choice["grid"][place]) for choice in choices.values()]
        known = [loss for loss in losses if loss is not None]
        row.append(f"{100 * max(known):.1f}" if known else DASH)
    defaults = [choice["lost_at_default"] for choice in choices.values()]
    known = [loss for loss in defaults if loss is not None]
    return [*row, "", f"{100 * max(known):.1f}" if known else DASH, ""]


def _get_loss(choice: dict, rate: float) -> float | None:
    score = choice["cells"][f"{rate:g}"]["score"]
    if score is None or choice["rate"] is None:
        return None
    best = choice["cells"][f"{choice['rate']:g}"]["score"]
    return best - score


def write_rate_warnings(results: dict) -> list[str]:
    """What is unsure about the chosen rates, one sentence each."""
    choices = results["rates"]
    warnings = []
    edge = [f"{name} ({one['rate']:g})" for name, one in choices.items() if one["at_edge"]]
    if edge:
        warnings.append(
            f"The best rate is at the edge of the grid for {', '.join(edge)}: a better one may lie"
            " outside, so extend rates.grid; only new runs are made."
        )
    unclear = [name for name, one in choices.items() if one["unclear"]]
    if unclear:
        warnings.append(
            f"Dev runs cannot tell the chosen rate from another one for {', '.join(unclear)}: the"
            " difference is within noise, so add seeds to rates.seeds if it matters."
        )
    diverged = [name for name, one in choices.items() if _has_diverged(one)]
    if diverged:
        warnings.append(
            f"At some rates the loss was not finite for {', '.join(diverged)}; these rates are left"
            " out."
        )
    if results["stale"]:
        warnings.append(
            "A grown grid now chooses another rate than these runs had, so they are left out:"
            f" {', '.join(results['stale'])}. The test split is read once for each seed: give new"
            " seeds, such as seeds=[5,6,7]."
        )
    return warnings


def _has_diverged(choice: dict) -> bool:
    return any(cell["diverged"] for cell in choice["cells"].values())


def make_text_table(results: dict) -> Rows:
    """All questions, those that text answers, and the open ones, by variant."""
    text = results["text"]
    head = ["variant", "all questions", "answered by text", "open questions (95 %)"]
    rows = [[*head, f"open, above {results['baseline']} (95 %)", "corrected"]]
    if text is None:
        return rows
    for name in rank_variants(results):
        scores = text["arms"].get(name)
        if scores:
            rows.append(_make_text_row(results, name, scores))
    return rows


def _make_text_row(results: dict, name: str, scores: dict) -> list[str]:
    questions = results["arms"][name]["results"][results["main"]]["questions"]
    given, is_open = scores.get("given"), scores.get("open")
    corrected = scores.get("corrected")
    star = " *" if corrected and is_clear(corrected) else ""
    return [
        name,
        f"{100 * questions:.1f}",
        format_percent(given) if given else DASH,
        format_percent_interval(is_open) if is_open else DASH,
        format_change(scores.get("difference")),
        format_interval(corrected) + star if corrected else DASH,
    ]


def write_text_notes(results: dict) -> list[str]:
    """What text alone answers, in sentences."""
    text = results["text"]
    if text is None:
        return []
    total = results["num_questions"]
    notes = []
    if text["commonest"]:
        notes.append(
            "The commonest training answer to a question's text, without any image, is right for"
            f" {100 * text['commonest']['questions']:.1f} % of the questions"
            f" ({_list_levels(text['commonest'])})."
        )
    if text["text_only"]:
        number = len(text["text_only"]["seeds"])
        noun = "seed" if number == 1 else "seeds"
        notes.append(
            "The same training without images answers"
            f" {100 * text['text_only']['questions']:.1f} % ({_list_levels(text['text_only'])};"
            f" {number} {noun})."
        )
    notes.append(
        f"{total - text['num_open']:,} of {total:,} questions are answered by one of the two, and"
        f" {text['num_open']:,} are open. An answer that goes against the text scores on open"
        " questions and loses on the others, so read both columns."
    )
    return notes


def _list_levels(scores: dict) -> str:
    parts = [f"{name} {format_percent(level)}" for name, level in scores["levels"].items()]
    return ", ".join(parts)
