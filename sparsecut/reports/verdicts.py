"""The one sentence on top of each page, computed from its numbers.

A difference is called clear only where its interval leaves out zero. A verdict also names what does
as well as the best variant, and what the intervals leave out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..experiments.demo import describe_five_seeds
from .study_tables import get_main_results
from .tables import (
    format_interval,
    format_percent,
    format_points,
    is_clear,
)

ONE_SEED = "with one seed, another training may differ by more"


def judge_study(results: dict) -> str:
    """Return what a study shows: whether the best variant beats the baseline, and who else does."""
    by_variant = get_main_results(results)
    baseline = results["baseline"]
    if not by_variant:
        return "There is no verdict yet: no run of the main budget is finished."
    best = max(by_variant, key=lambda name: by_variant[name]["average"]["value"])
    close = [name for name in find_indistinguishable(results, best) if name != baseline]
    gap = by_variant[best].get("difference")
    percent = f"{format_percent(by_variant[best]['average'])} %"
    if best == baseline:
        verdict = f"No variant is above {baseline}, which has the highest average, {percent}"
    elif gap is None:
        verdict = (
            f"{best} has the highest average, {percent}, but it cannot be compared: no run of"
            f" {baseline} is finished with the same seed"
        )
    elif not is_clear(gap["corrected"]):
        verdict = (
            f"No variant is clearly above {baseline}: {best}, the highest, is ahead by"
            f" {_format_gap(gap['average']['value'], gap['corrected'])}"
        )
    else:
        verdict = (
            f"{best} is above {baseline} by"
            f" {_format_gap(gap['average']['value'], gap['corrected'])}"
        )
        if close:
            verdict += f", but {_join_names(close)} cannot be distinguished from it"

    caveats = []
    if gap and gap["note"]:
        caveats.append(ONE_SEED)
    if results["missing"]:
        number = len(results["missing"])
        caveats.append(f"{number} run{'s are' if number > 1 else ' is'} missing")
    return "; ".join([verdict, *caveats]) + "."


def find_indistinguishable(results: dict, name: str) -> list[str]:
    """Variants that no corrected comparison distinguishes from this one, best first."""
    by_variant = get_main_results(results)
    close = []
    for a, b, estimate in results["pairs"]["cells"]:
        if name in (a, b) and estimate["corrected_p"] >= 0.05:
            close.append(b if a == name else a)
    return sorted(close, key=lambda other: -by_variant[other]["average"]["value"])


def judge_comparison(comparison: dict) -> str:
    """Return which runs are clearly above or below the first run."""
    baseline = comparison["baseline"]
    gaps = {}
    for name, row in comparison["runs"].items():
        if "difference" in row:
            gaps[name] = row["difference"]

    if len(gaps) == 1:
        [(name, gap)] = gaps.items()
        verdict = _judge_pair(name, baseline, gap["average"])
    else:
        verdict = f"Of {len(gaps)} runs compared with {baseline}: {_sort_by_side(gaps)}"

    if any(gap["note"] for gap in gaps.values()):
        verdict += f"; {ONE_SEED}"
    return verdict + "."


def _judge_pair(name: str, baseline: str, estimate: dict) -> str:
    value = estimate["value"]
    if not is_clear(estimate):
        difference = f"{100 * value:+.1f} points ({format_interval(estimate)})"
        return f"{name} cannot be distinguished from {baseline}: the difference is {difference}"
    if value > 0:
        return f"{name} is above {baseline} by {_format_gap(value, estimate)}"
    return f"{name} is below {baseline} by {_format_gap(value, estimate)}"


def _sort_by_side(gaps: dict[str, dict]) -> str:
    above = []
    below = []
    neither = []
    for name, gap in gaps.items():
        estimate = gap["average"]
        points = format_points(estimate["value"])
        text = f"{name} ({points} points, {format_interval(estimate)})"
        if not is_clear(estimate):
            neither.append(text)
        elif estimate["value"] > 0:
            above.append(text)
        else:
            below.append(text)

    parts = []
    for side, texts in (("above it", above), ("below it", below)):
        if texts:
            verb = "is" if len(texts) == 1 else "are"
            parts.append(f"{_join_names(texts)} {verb} {side}")

    if neither:
        parts.append(f"{_join_names(neither)} cannot be distinguished")
    return ", ".join(parts)


def count_needed_images(comparisons: int = 1) -> int:
    """How many images a clear difference needs at least.

    With fewer, an interval over images leaves out zero by chance too often, even where all images
    agree: a sign test of them would not be significant. One image alone gives no interval at all.
    """
    return math.ceil(math.log2(2 * comparisons / 0.05))


def explain_silence(explanation: dict) -> str:
    """Return why nothing can be told of a model's shortcuts; "" where something may be."""
    name = _name_model(explanation)
    conditions = explanation["conditions"]
    shortcuts = explanation["shortcuts"]
    norms = [one.get("norm") for one in shortcuts if one.get("number") != explanation.get("input")]
    if norms and not any(norm is None or norm > 0 for norm in norms):
        return (
            f"{name}: its shortcuts add nothing, all their features are zero, so no answer depends"
            " on them. Train it first."
        )
    if not any(condition.get("accuracy", 1) for condition in conditions.values()):
        return (
            f"{name} answers none of the {explanation['num_questions']:,} questions right, with its"
            " shortcuts or without, so nothing can be told of them."
        )
    num_images, needed = explanation.get("num_images"), count_needed_images()
    if num_images is not None and num_images < needed:
        images = "one image" if num_images == 1 else f"{num_images} images"
        return (
            f"{name}: nothing can be told of its shortcuts by questions about {images}; give"
            f" questions about at least {needed}, better a hundred."
        )
    return ""


def judge_ablation(explanation: dict) -> str:
    """Return which shortcuts a model leans on, by what is lost without them."""
    conditions = explanation["conditions"]
    if silence := explain_silence(explanation):
        return silence
    losses = {}
    for name, condition in conditions.items():
        kind, _, number = name.rpartition(" ")
        if kind == "without":
            losses[int(number)] = condition["difference"]["average"]

    missed = [number for number, estimate in losses.items() if estimate["high"] < 0]
    together = conditions["input only"]["difference"]["average"]
    if missed:
        most = min(missed, key=lambda number: losses[number]["value"])
        verdict = (
            f"{_name_model(explanation)} leans most on shortcut"
            f" {locate_shortcut(explanation, most)}: without it, accuracy falls by"
            f" {_format_gap(losses[most]['value'], losses[most])}"
        )
        return verdict + _describe_rest(len(losses) - 1, len(missed) - 1) + "."

    if together["high"] < 0:
        return (
            f"{_name_model(explanation)}: no single shortcut is clearly missed, but without all of"
            f" them accuracy falls by {_format_gap(together['value'], together)}."
        )

    return (
        f"{_name_model(explanation)}: no use of the shortcuts can be seen; without all of them"
        " accuracy changes by"
        f" {100 * together['value']:+.1f} points ({format_interval(together)})."
    )


def _name_model(explanation: dict) -> str:
    """The model's name; explanations of earlier versions have none."""
    return explanation.get("model") or "The model"


def describe_uses(explanation: dict) -> list[str]:
    """Return a sentence for each shortcut: for which kinds of questions it is clearly needed.

    Only kinds count whose loss has an interval below zero, corrected for the number of kinds, over
    enough images.
    """
    sentences: list[str] = []
    silence = explain_silence(explanation)
    for name, condition in explanation["conditions"].items():
        kind, _, number = name.rpartition(" ")
        if kind != "without":
            continue
        groups = condition.get("group_differences", {})
        least = count_needed_images(max(1, len(groups)))
        needed = {}
        for group, gap in groups.items():
            if gap["high"] < 0 and gap.get("num_images", least) >= least:
                needed[group] = gap
        place = locate_shortcut(explanation, int(number))
        average = condition["difference"]["average"]
        if silence:
            sentences.append(f"Nothing can be told of shortcut {place}.")
        elif needed:
            ranked = sorted(needed, key=lambda group: needed[group]["value"])
            texts = [f"{group} ({format_points(needed[group]['value'])})" for group in ranked]
            sentences.append(
                f"Shortcut {place} is good for {', '.join(texts)}: points lost without it."
            )
        elif average["high"] < 0:
            sentences.append(
                f"Shortcut {place} is good for accuracy as a whole"
                f" ({format_points(average['value'])} points without it); no kind of question shows"
                " it alone."
            )
        else:
            sentences.append(
                f"Nothing can be told of shortcut {place}: no loss without it is clear."
            )
    return sentences


def locate_shortcut(explanation: dict, number: int) -> str:
    """Return a shortcut's number with where it reads and adds: 1 (tap 3 to layer 0)."""
    shortcut = explanation["shortcuts"][number]
    taps = ", ".join(str(tap) for tap in shortcut["taps"])
    return f"{number} (tap {taps} to layer {shortcut['layer']})"


def _describe_rest(number: int, missed: int) -> str:
    if number == 0:
        return ""
    if number == 1:
        return (
            "; the other one is clearly missed too" if missed else "; the other one is not missed"
        )

    if missed == 0:
        return f"; none of the other {number} is clearly missed"
    return f"; of the other {number}, {missed} {'are' if missed > 1 else 'is'} clearly missed too"


def judge_demo(results: dict, titles: dict[str, str], *, is_quick: bool) -> str:
    """Return how SparseCut compares with the baseline and its controls, after one training.

    Args:
        results: The numbers of the demo's study.
        titles: Variant to the name that the page shows.
        is_quick: Whether this was the small demo, whose numbers mean nothing.
    """
    name = titles["sparsecut"]
    baseline = titles[results["baseline"]]
    gap = get_main_results(results)["sparsecut"]["difference"]
    verdict = _judge_pair(name, baseline, gap["corrected"] | {"value": gap["average"]["value"]})
    close = [titles[other] for other in find_indistinguishable(results, "sparsecut")]
    close = [title for title in close if title != baseline]
    if close and is_clear(gap["corrected"]):
        verdict += f", but {_join_names(close)} cannot be distinguished from it"
    if is_quick:
        return f"Quick demo, whose numbers mean nothing: {verdict}."
    return f"{verdict}; one seed is no evidence about the method. {describe_five_seeds()}"


def _format_gap(value: float, estimate: dict) -> str:
    """The size of a difference with its interval, both without sign where the sign is clear."""
    low, high = 100 * estimate["low"], 100 * estimate["high"]
    if value < 0 and high <= 0:
        low, high = -high, -low
    return f"{abs(100 * value):.1f} points ({low:.1f} to {high:.1f})"


def _join_names(names: Sequence[str], most: int = 3) -> str:
    """Names as a list in a sentence; those beyond `most` are counted."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} other{'s' * (len(names) - most > 1)}")
    if len(shown) == 1:
        return shown[0]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"
