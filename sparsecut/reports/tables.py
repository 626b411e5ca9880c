"""A study's figures as rows of words, for its page and for Markdown; the first row of a table is
its head.
"""

from __future__ import annotations

DASH = "\N{EN DASH}"


def points(value: float) -> str:
    """A difference in points with its sign: +1.2."""
    return f"{100 * value:+.1f}"


def share(estimate: dict) -> str:
    """An estimate's value in per cent."""
    return f"{100 * estimate['value']:.1f}"


def span(estimate: dict) -> str:
    """An estimate's interval in per cent: 1.2 to 3.4."""
    return f"{100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"


def is_clear(estimate: dict) -> bool:
    """Whether the interval leaves zero out."""
    return estimate["low"] > 0 or estimate["high"] < 0


def main_rows(found: dict) -> list[list[str]]:
    """The main table, best average first; the first row is its head."""
    main, levels, base = found["main"], found["levels"], found["baseline"]
    head = [
        "arm",
        "seeds",
        "average (95 %)",
        *levels,
        f"difference from {base} (95 %)",
        "corrected interval",
    ]
    rows = [[*head, "image tokens", "fusion parameters", "FLOPs here", "FLOPs large", "training s"]]
    for name in ranked(found):
        arm, result = found["arms"][name], found["arms"][name]["results"][main]
        gap = result.get("difference")
        rows.append(
            [
                name,
                str(len(result["seeds"])),
                f"{share(result['average'])} ({span(result['average'])})",
                *(share(result["levels"][level]) for level in levels),
                change_of(gap and gap["average"]),
                span(gap["corrected"]) if gap else DASH,
                number(arm["image_tokens"]),
                number(
                    arm["parameters"].get(
                        "fusion", arm["cost"]["here"].get("num_fusion_parameters")
                    )
                ),
                *(number(arm["relative"][size], ".3f") for size in ("here", "large")),
                number(result["train_seconds"], ",.0f"),
            ]
        )
    return rows


def level_rows(found: dict) -> list[list[str]]:
    """Differences from the baseline per level under the main budget, with corrected intervals; a
    star marks those clear of zero.
    """
    rows = [["arm", *(f"{level} (corrected)" for level in found["levels"])]]
    for name in ranked(found):
        if gap := found["arms"][name]["results"][found["main"]].get("difference"):
            cells = [gap["corrected_levels"][level] for level in found["levels"]]
            rows.append([name, *(change_of(e) + (" *" if is_clear(e) else "") for e in cells)])
    return rows


def group_rows(found: dict) -> list[list[str]]:
    """Shares right by kind of question under the main budget; the first row is the head."""
    results = {
        name: found["arms"][name]["results"][found["main"]]["groups"] for name in ranked(found)
    }
    kinds = sorted({kind for of in results.values() for kind in of})
    if not kinds:
        return []
    cells = {
        name: [number(100 * of[k] if k in of else None, ".1f") for k in kinds]
        for name, of in results.items()
    }
    return [["arm", *kinds], *([name, *row] for name, row in cells.items())]


def budget_rows(found: dict) -> list[list[str]]:
    """Average and difference from the baseline under every budget, and whether the difference
    changes.
    """
    budgets = list(found["budgets"])
    if len(budgets) < 2:
        return []
    head = ["arm"]
    for budget in budgets:
        head += [f"{budget}: average", f"{budget}: difference (95 %)"]
    rows = [[*head, *(f"change of the difference, {found['main']} and {b}" for b in budgets[1:])]]
    names = ranked(found) + [
        n for n, a in found["arms"].items() if a["results"] and found["main"] not in a["results"]
    ]
    for name in names:
        results, row = found["arms"][name]["results"], [name]
        for budget in budgets:
            result = results.get(budget)
            gap = (result or {}).get("difference")
            row.append(share(result["average"]) if result else DASH)
            row.append(change_of(gap and gap["average"]))
        changes = results.get(found["main"], {}).get("change", {})
        rows.append([*row, *(change_of(changes.get(b)) for b in budgets[1:])])
    return rows


def cost_rows(found: dict) -> list[list[str]]:
    """Cost in full at both sizes; the first row is the head."""
    rows = [["arm", "size", "image tokens", "fusion parameters", *(words for words, _, _ in COSTS)]]
    for name, arm in found["arms"].items():
        for size, words in (("here", "own"), ("large", "large")):
            if cost := arm["cost"][size]:
                first = [
                    number(cost.get("num_image_tokens")),
                    number(cost.get("num_fusion_parameters")),
                ]
                rows.append(
                    [name, words, *first, *(unit_of(cost.get(key), unit) for _, key, unit in COSTS)]
                )
    return rows


COSTS = (  # words, key of a count, unit
    ("encoder coarse", "encoder_coarse_flops", "FLOP"),
    ("encoder fine", "encoder_fine_flops", "FLOP"),
    ("fusion", "fusion_flops", "FLOP"),
    ("language prefill", "language_prefill_flops", "FLOP"),
    ("prefill in all", "prefill_total_flops", "FLOP"),
    ("one new token", "language_per_new_token_flops", "FLOP"),
    ("KV cache", "kv_cache_bytes", "B"),
)


def notes(found: dict) -> list[str]:
    """How the figures were made, in sentences."""
    if not found["num_questions"]:
        return []
    gaps = [
        r["difference"]
        for a in found["arms"].values()
        if (r := a["results"].get(found["main"])) and "difference" in r
    ]
    lines = [
        (
            f"Greedy answers to {found['num_questions']:,} questions about"
            f" {found['num_pictures']:,} pictures, exact match in per cent; the average is the mean"
            " over levels, and over seeds."
        ),
        (
            "Intervals are at 95 %, from a bootstrap over pictures and seeds; differences are"
            " paired by seed and question."
        ),
    ]
    if spread := found["spread"].get(found["main"]):
        lines.append(
            f"From seed to seed an arm's average moves by {100 * spread['average']:.1f} points"
            f" (standard deviation, pooled over arms, {spread['num_free']} degrees of freedom,"
            " after what a seed does to all arms is taken out); intervals of differences use it,"
            " or the two arms' own where that is larger."
        )
    if gaps:
        lines.append(
            "Corrected: the interval of the difference at a level of 1 - 0.05 /"
            f" {gaps[0]['comparisons']} (Bonferroni), so that all of them hold together at 95 %."
        )
    if any(gap["note"] for gap in gaps):
        lines.append(
            "Where arms share one seed, intervals speak of the pictures only; another training may"
            " differ by more."
        )
    lines.append(
        f"FLOPs: of a prompt with one picture, relative to {found['baseline']}; here is the study's"
        " own size, large is CLIP-L/336 with a 7B Llama. The frontier goes by the averages, not by"
        " their intervals."
    )
    return lines


def missing_words(found: dict) -> str:
    """Runs that are not finished, as budget/arm with their seeds."""
    seeds: dict[str, list[str]] = {}
    for run in found["missing"]:
        place, _, seed = run.rpartition("/")
        seeds.setdefault(place, []).append(seed)
    return "; ".join(f"{place} seeds {', '.join(numbers)}" for place, numbers in seeds.items())


def ranked(found: dict) -> list[str]:
    """Arms with a finished run of the main budget, best average first."""
    done = {
        n: a["results"][found["main"]]
        for n, a in found["arms"].items()
        if found["main"] in a["results"]
    }
    return sorted(done, key=lambda name: -done[name]["average"]["value"])


def change_of(change: dict | None) -> str:
    """A difference in points with its interval, or a dash."""
    return f"{points(change['value'])} ({span(change)})" if change else DASH


def number(value, form: str = ",") -> str:
    """A number, or a dash where there is none."""
    return DASH if value is None else format(value, form)


def unit_of(value, unit: str) -> str:
    """A number with a prefix: 1.23 GFLOP."""
    if value is None:
        return DASH
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
