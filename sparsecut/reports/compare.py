"""The report of a comparison: a page with the items on which runs differ, Markdown, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from ..data.images import ImageStore
from ..experiments.compare import ComparedRun, find_images
from ..plan import Plan
from ..schema import write_text_file
from .figures import draw_bars
from .pages import embed_image, render
from .plan_drawing import draw_plan
from .tables import (
    Rows,
    format_change,
    format_number,
    format_percent,
    format_percent_interval,
    get_difference,
    get_interval,
    tabulate_fractions,
    to_markdown,
)
from .verdicts import judge_comparison

IMAGE_SIDE = 224  # pixels of an image on the page


def write_comparison(
    folder: Path,
    runs: Sequence[ComparedRun],
    comparison: dict,
    images: str | Path | None = None,
) -> Path:
    """Write compare.html, compare.md and compare.json.

    Args:
        folder: Where to write.
        runs: What `experiments.compare.read_runs` returned.
        comparison: What `experiments.compare.compare_runs` returned.
        images: A folder or archive of the items' images; by default the runs' own.

    Returns:
        The path of compare.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    verdict = judge_comparison(comparison)
    stored = {"verdict": verdict, **comparison}
    write_text_file(folder / "compare.json", json.dumps(stored, indent=1) + "\n")
    notes = "\n".join(f"- {note}" for note in write_notes(comparison))
    table = to_markdown(make_main_table(comparison))
    write_text_file(folder / "compare.md", f"**{verdict}**\n\n{table}\n\n{notes}\n")
    path = folder / "compare.html"
    write_text_file(path, write_page(comparison, find_images(runs, images)))
    return path


def write_page(comparison: dict, images: Sequence[ImageStore]) -> str:
    """Return the comparison as one HTML page; images are looked up by name."""
    names = list(comparison["runs"])
    subject = " and ".join(names) if len(names) < 4 else f"{len(names)} runs"
    kinds = make_kind_table(comparison)
    return render(
        "compare.html.j2",
        title=f"{subject}, compared",
        verdict=judge_comparison(comparison),
        baseline=comparison["baseline"],
        charts=_draw_levels(comparison),
        main_table=make_main_table(comparison),
        notes=write_notes(comparison),
        kind_table=kinds if len(kinds[0]) > 1 else [],
        plans=_draw_plans(comparison),
        num_differing=comparison["num_differing"],
        items=[_make_item(item, images) for item in comparison["items"]],
    )


def make_main_table(comparison: dict) -> Rows:
    """Accuracy, difference from the first run, and cost of every run."""
    baseline = comparison["baseline"]
    runs = comparison["runs"]
    levels = _list_levels(comparison)
    head = ["run", "seeds", "average (95 %)", *levels]
    head += [f"above {baseline} (corrected)", "image tokens", "prompt FLOPs"]
    costs = [row["cost"] for row in runs.values() if row["cost"]]

    rows = [head]
    for name, row in runs.items():
        fractions = row["share"]
        cells = [name, str(len(row["seeds"])), format_percent_interval(fractions["average"])]
        for level in levels:
            cells.append(format_percent(fractions["levels"][level]))
        cells.append(format_change(get_difference(row)))
        cells += _format_cost(row["cost"], costs)
        rows.append(cells)

    return rows


def _list_levels(comparison: dict) -> list[str]:
    """The questions' levels; none where questions have none."""
    first = comparison["runs"][comparison["baseline"]]
    return [level for level in first["share"]["levels"] if level != "all"]


def _format_cost(cost: dict | None, costs: list[dict]) -> list[str]:
    """Image tokens, and FLOPs relative to the first run with a cost."""
    if not cost:
        return [format_number(None), format_number(None)]
    ratio = cost["prefill_total_flops"] / costs[0]["prefill_total_flops"]
    return [format_number(cost["num_image_tokens"]), format_number(ratio, ".3f")]


def make_kind_table(comparison: dict) -> Rows:
    """Accuracy by kind of question."""
    kinds = {name: row["kinds"] for name, row in comparison["runs"].items()}
    return tabulate_fractions("run", kinds)


def write_notes(comparison: dict) -> list[str]:
    """How the numbers were made, in sentences."""
    runs = comparison["runs"].values()
    notes = [
        f"All runs answered the same {comparison['num_questions']:,} questions."
        f" {comparison['num_differing']:,} of them are right in some runs and wrong in others.",
        "Intervals: bootstrap over images and seeds. Differences are paired by question (and seed),"
        " and corrected for their number.",
    ]
    if any(len(row["seeds"]) == 1 for row in runs):
        notes.append(
            "With one seed an interval is about the images only, and another training"
            " may differ by more."
        )

    if any(row["cost"] for row in runs):
        notes.append(
            "Prompt FLOPs: of a prompt with one image and 64 text tokens, relative to the first run"
            " with a saved model."
        )

    return notes


def _draw_levels(comparison: dict) -> list[Markup]:
    """A chart of the average, then one of each level."""
    charts = []
    for level in ("average", *_list_levels(comparison)):
        rows = {}
        for name, row in comparison["runs"].items():
            rows[name] = get_interval(row["share"], level)
        charts.append(draw_bars(rows, title=level, reference=comparison["baseline"]))

    return charts


def _draw_plans(comparison: dict) -> dict[str, Markup]:
    drawings = {}
    for name, row in comparison["runs"].items():
        if row["plan"]:
            drawings[name] = draw_plan(Plan.from_dict(row["plan"]), *row["depths"])
    return drawings


def _make_item(item: dict, images: Sequence[ImageStore]) -> dict:
    """What the page shows of an item: its images, and every run's answers."""
    answers = []
    for name, by_seed in item["answers"].items():
        texts = [text or "(nothing)" for text, _ in by_seed.values()]
        different_texts = list(dict.fromkeys(texts))
        num_right = sum(is_right for _, is_right in by_seed.values())
        answers.append(
            {
                "name": name,
                "text": ", ".join(different_texts),
                "is_right": 2 * num_right > len(by_seed),
            }
        )

    return {
        "images": [(str(name), _embed(name, images)) for name in item["images"]],
        "prompt": item["prompt"],
        "group": item["group"] or "",
        "reference": item["reference"],
        "answers": answers,
    }


def _embed(name: str, images: Sequence[ImageStore]) -> Markup | None:
    """An image as a URL, or None where no folder or archive holds it."""
    for store in images:
        if isinstance(name, str) and name in store:
            image = store.load(name)
            image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
            return embed_image(image)
    return None
