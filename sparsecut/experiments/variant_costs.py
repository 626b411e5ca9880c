"""What each variant of a study is and costs, and which variants no other beats at their cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..plan import Plan
from ..schema import read_json_file

SIZES = {"here": "the study's own size", "large": "CLIP-L/336 + 7B"}


def read_costs(folder: Path) -> dict:
    """The counted costs of a study's variants; nothing where they were not counted."""
    path = folder / "costs.json"
    return read_json_file(path) if path.is_file() else {}


def describe_variants(variants: dict[str, dict], folder: Path, baseline: str) -> None:
    """Add what does not depend on the budget: the plan, its sizes and its cost."""
    costs = read_costs(folder)
    for name, variant in variants.items():
        facts = variant.pop("facts", None) or {}
        variant |= _describe_variant(facts, costs.get(name) or {}, costs.get(baseline) or {})
        if not variant["family"]:
            variant["family"] = _describe_family(variant["plan"])


def _describe_variant(facts: dict, cost: dict, baseline_cost: dict) -> dict:
    counts = {size: cost.get(size) or {} for size in SIZES}
    relative = {}
    for size in SIZES:
        flops = counts[size].get("prefill_total_flops")
        baseline_flops = (baseline_cost.get(size) or {}).get("prefill_total_flops")
        relative[size] = flops / baseline_flops if flops and baseline_flops else None

    return {
        "plan": facts.get("plan") or cost.get("plan"),
        "depths": facts.get("depths"),
        "image_tokens": facts.get("image_tokens", counts["here"].get("num_image_tokens")),
        "views": facts.get("views"),
        "parameters": facts.get("parameters") or {},
        "cost": counts,
        "relative": relative,
    }


def _describe_family(plan: dict | None) -> str:
    """Where a plan adds and what it sees; for studies that name no families."""
    if plan is None:
        return "not run yet"
    plan = Plan.from_dict(plan)
    place = "into layers too" if plan.layers else "input only"
    views = "fine views" if plan.tiles else "one view"
    return f"{place}, {views}"


def find_frontier(results: dict, scores: Mapping[str, float], size: str) -> list[str]:
    """Variants that no other beats in score at no more prefill FLOPs, cheapest first.

    Args:
        results: What is known of every variant.
        scores: Variant to what is compared, such as its average.
        size: Where FLOPs are counted, a key of `SIZES`.
    """
    places = {}
    for name, score in scores.items():
        cost = results["arms"][name]["relative"][size]
        if cost:
            places[name] = (cost, -score)

    frontier = []
    for name, place in places.items():
        is_beaten = any(_beats(other, place) for other in places.values())
        if not is_beaten:
            frontier.append(name)

    return sorted(frontier, key=lambda name: places[name])


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether (cost, -accuracy) is no worse in both and better in one."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def get_averages(results: dict) -> dict[str, float]:
    """The accuracy of every variant that was trained under the main budget."""
    finished = [name for name, one in results["arms"].items() if results["main"] in one["results"]]
    return {name: get_average(results, name) for name in finished}


def get_average(results: dict, name: str) -> float:
    """A variant's accuracy under the main budget."""
    return results["arms"][name]["results"][results["main"]]["average"]["value"]
