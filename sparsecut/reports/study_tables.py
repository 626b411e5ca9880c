"""The tables of a study's report, from the numbers of `experiments.results`."""

from __future__ import annotations

from .tables import (
    DASH,
    Rows,
    format_change,
    format_interval,
    format_number,
    format_percent,
    format_percent_interval,
    format_unit,
    get_difference,
    is_clear,
    tabulate_fractions,
)

COSTS = (  # head, key of a count, unit
    ("encoder coarse", "encoder_coarse_flops", "FLOP"),
    ("encoder fine", "encoder_fine_flops", "FLOP"),
    ("fusion", "fusion_flops", "FLOP"),
    ("language prefill", "language_prefill_flops", "FLOP"),
    ("prefill in all", "prefill_total_flops", "FLOP"),
    ("one new token", "language_per_new_token_flops", "FLOP"),
    ("KV cache", "kv_cache_bytes", "B"),
    ("weights", "weight_bytes", "B"),
    ("kept by a training step", "training_fusion_language_bytes", "B"),
)
MEAN = "mean of kinds"
SIZE_NAMES = {"here": "own", "large": "large"}


def get_main_results(results: dict) -> dict[str, dict]:
    """Results under the main budget by variant, in the study's order; finished variants only."""
    main = results["main"]
    by_variant = {}
    for name, variant in results["arms"].items():
        if main in variant["results"]:
            by_variant[name] = variant["results"][main]
    return by_variant


def rank_variants(results: dict) -> list[str]:
    """Variants with a finished run of the main budget, best average first."""
    by_variant = get_main_results(results)
    return sorted(by_variant, key=lambda name: -by_variant[name]["average"]["value"])


def make_main_table(results: dict) -> Rows:
    """Accuracy, difference from the baseline and cost of every finished variant, best first."""
    head = [
        "variant",
        "seeds",
        "average (95 %)",
        *results["levels"],
        f"above {results['baseline']} (95 %)",
        "corrected",
        "image tokens",
        "fusion parameters",
        "FLOPs of a prompt",
        "FLOPs here",
        "FLOPs large",
        "peak memory",
        "training s",
        "answers s",
    ]
    if results["rates"]:
        head.insert(1, "rate")
    by_variant = get_main_results(results)

    rows = [head]
    for name in rank_variants(results):
        rows.append(_make_main_row(results, name, by_variant[name]))

    return rows


def _make_main_row(results: dict, name: str, result: dict) -> list[str]:
    variant = results["arms"][name]
    gap = result.get("difference")
    counted = variant["cost"]["here"].get("num_fusion_parameters")
    num_fusion_parameters = variant["parameters"].get("fusion", counted)

    row = [name]
    if results["rates"]:
        row.append(format_number(result.get("rate"), "g"))
    row += [str(len(result["seeds"])), format_percent_interval(result["average"])]
    for level in results["levels"]:
        row.append(format_percent(result["levels"][level]))

    return [
        *row,
        format_change(get_difference(result)),
        format_interval(gap["corrected"]) if gap else DASH,
        format_number(variant["image_tokens"]),
        format_number(num_fusion_parameters),
        format_unit(variant["cost"]["here"].get("prefill_total_flops"), "FLOP"),
        format_number(variant["relative"]["here"], ".3f"),
        format_number(variant["relative"]["large"], ".3f"),
        format_unit(result.get("peak_bytes"), "B"),
        format_number(result["train_seconds"], ",.0f"),
        format_number(result.get("eval_seconds"), ",.0f"),
    ]


def make_level_table(results: dict) -> Rows:
    """Differences from the baseline per level, corrected; a star marks those clear of zero."""
    rows = [["variant", *(f"{level} (corrected)" for level in results["levels"])]]
    by_variant = get_main_results(results)

    for name in rank_variants(results):
        gap = by_variant[name].get("difference")
        if not gap:
            continue
        row = [name]
        for level in results["levels"]:
            estimate = gap["corrected_levels"][level]
            row.append(format_change(estimate) + (" *" if is_clear(estimate) else ""))
        rows.append(row)

    return rows


def make_kind_table(results: dict) -> Rows:
    """Accuracy by kind of question under the main budget."""
    groups = {}
    for name in rank_variants(results):
        groups[name] = get_main_results(results)[name]["groups"]
        if len(groups[name]) > 1:
            groups[name] = groups[name] | {MEAN: sum(groups[name].values()) / len(groups[name])}
    return tabulate_fractions("variant", groups, last=MEAN)


def make_budget_table(results: dict) -> Rows:
    """Average and difference under every budget, and how the difference changes."""
    budgets = list(results["budgets"])
    main = results["main"]

    head = ["variant"]
    for budget in budgets:
        head += [f"{budget}: average", f"{budget}: difference (95 %)"]

    for budget in budgets[1:]:
        head.append(f"change of the difference, {main} and {budget}")

    rows = [head]
    if len(budgets) < 2:
        return rows
    names = rank_variants(results)

    for name, variant in results["arms"].items():
        if variant["results"] and name not in names:
            names.append(name)

    for name in names:
        rows.append(_make_budget_row(name, results["arms"][name]["results"], budgets, main))

    return rows


def _make_budget_row(name: str, by_budget: dict, budgets: list[str], main: str) -> list[str]:
    row = [name]
    for budget in budgets:
        result = by_budget.get(budget)
        if result:
            row.append(format_percent(result["average"]))
            row.append(format_change(get_difference(result)))
        else:
            row += [DASH, DASH]

    main_result = by_budget.get(main, {})
    changes = main_result.get("change", {})

    for budget in budgets[1:]:
        row.append(format_change(changes.get(budget)))

    return row


def make_cost_table(results: dict) -> Rows:
    """Counted cost in full, at the study's own size and at the large one."""
    head = ["variant", "size", "image tokens", "fusion parameters"]
    head += [name for name, _, _ in COSTS]

    rows = [head]
    for name, variant in results["arms"].items():
        for size, size_name in SIZE_NAMES.items():
            cost = variant["cost"][size]
            if cost:
                rows.append([name, size_name, *_format_cost(cost)])

    return rows


def _format_cost(cost: dict) -> list[str]:
    cells = [
        format_number(cost.get("num_image_tokens")),
        format_number(cost.get("num_fusion_parameters")),
    ]
    for _, key, unit in COSTS:
        cells.append(format_unit(cost.get(key), unit))
    return cells


def write_notes(results: dict) -> list[str]:
    """How the numbers were made, in sentences."""
    if not results["num_questions"]:
        return []
    main = results["main"]
    notes = [
        f"Greedy answers to {results['num_questions']:,} questions about"
        f" {results['num_pictures']:,} images; exact match in per cent. The average is the mean"
        f" over {results['average_over']} and seeds.",
        "Intervals are at 95 %, from a bootstrap over images and seeds. Differences are paired by"
        " seed and question.",
    ]
    spread = results["spread"].get(main)
    if spread:
        notes.append(
            f"From seed to seed a variant's average moves by {100 * spread['average']:.1f} points."
            " This is a standard deviation, pooled over variants, with"
            f" {spread['num_free']} degrees of freedom. What a seed does to all variants is taken"
            " out. Intervals of differences use it, or the two variants' own where that is larger."
        )

    gaps = [result.get("difference") for result in get_main_results(results).values()]
    gaps = [gap for gap in gaps if gap]
    if gaps:
        notes.append(
            f"Corrected: the interval at a level of 1 - 0.05 / {gaps[0]['comparisons']}"
            " (Bonferroni), so that all of them hold together at 95 %."
        )

    if any(gap["note"] for gap in gaps):
        notes.append(
            "Where variants share one seed, intervals are about the images only; another training"
            " may differ by more."
        )

    notes.append(
        "FLOPs of a prompt: encoder with all views, fusion and language model, counted for one"
        f" image. Here and large: the same relative to {results['baseline']}. Here is the study's"
        " own size; large is CLIP-L/336 with a 7B Llama. The frontier goes by the averages, not by"
        " their intervals. Peak memory is what a run added to its process, with its data."
    )
    return notes


def name_missing_runs(results: dict) -> str:
    """Runs that are not finished, as budget/variant with their seeds."""
    seeds: dict[str, list[str]] = {}
    for run in results["missing"]:
        place, _, seed = run.rpartition("/")
        seeds.setdefault(place, []).append(seed)

    texts = []
    for place, numbers in seeds.items():
        noun = "seed" if len(numbers) == 1 else "seeds"
        texts.append(f"{place} {noun} {', '.join(numbers)}")

    return "; ".join(texts)
