"""The demo's page, and its summary for the terminal: a study of four variants with one seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from markupsafe import Markup

from ..data.images import ImageStore
from ..data.jsonl import read_json_lines
from ..drawing import text_table
from ..evaluation.judging import get_answer
from ..experiments.demo import (
    FIVE_SEEDS,
    DemoVariant,
    describe_five_seeds,
    describe_training,
)
from ..experiments.results import compute_results
from ..experiments.study import Run, Study, load_study
from ..plan import Plan
from ..schema import read_json_file, write_text_file
from .figures import draw_bars, draw_curves
from .pages import embed_image, render
from .plan_drawing import draw_plan
from .study_tables import get_main_results
from .tables import (
    DASH,
    Rows,
    format_change,
    format_number,
    format_percent,
    format_percent_interval,
    get_difference,
    get_interval,
)
from .verdicts import judge_demo

LEVELS = {
    "high": "high: shape, place",
    "mid": "mid: texture, count",
    "low": "low: shade, lines, digit",
}
NUM_ITEMS_ON_PAGE = 8


def write_page(study: Study, variants: dict[str, DemoVariant], *, is_quick: bool = False) -> Path:
    """Write report.html into a finished demo's folder.

    Args:
        study: The demo as a study.
        variants: How to present each of its variants.
        is_quick: Whether it was the small demo, whose numbers mean nothing.

    Returns:
        The path of report.html.
    """
    out = Path(study.output)
    results = compute_results(out)
    titles = {name: variant.title for name, variant in variants.items()}
    page = render(
        "demo.html.j2",
        title=study.title,
        verdict=judge_demo(results, titles, is_quick=is_quick),
        num_images=study.pictures.train,
        seed=study.seeds[0],
        baseline=titles[study.baseline],
        charts=_draw_levels(results, titles),
        score_table=_make_score_table(results, titles),
        seeds_table=_make_seeds_table(results),
        seeds_finding=describe_five_seeds(),
        own_training=describe_training(study),
        seeds_training=describe_training(load_study("shapes")),
        cards=_make_cards(results, variants),
        cost_table=_make_cost_table(results, titles),
        curves=_draw_losses(results, titles),
        items=[_make_item(out, item) for item in choose_items(study, titles, NUM_ITEMS_ON_PAGE)],
    )
    path = out / "report.html"
    write_text_file(path, page)
    return path


def print_scores(study: Study, titles: dict[str, str], log: Callable[[str], None]) -> None:
    """Print a table of accuracies, and what it does not show."""
    rows = [["accuracy in per cent", "average", *LEVELS]]
    for name, title in titles.items():
        path = _get_folder(study, name) / "eval" / "result.json"
        result = read_json_file(path)
        row = [title, f"{100 * result['mean_over_levels']:.1f}"]
        for level in LEVELS:
            accuracy = result["levels"][level]["accuracy"]
            row.append(f"{100 * accuracy:.1f}")
        rows.append(row)

    log(f"\n{text_table(rows)}")
    log("This is one seed: other seeds move every number by some points.")
    log(f"{describe_five_seeds()} docs/older-results.md has the table.\n")


def choose_items(study: Study, titles: dict[str, str], number: int) -> list[dict]:
    """Choose questions evenly over the file, kinds in turn, whoever is right.

    Returns:
        For each question: image, question, reference, and the answer of each variant.
    """
    records = {}
    for name, title in titles.items():
        path = _get_folder(study, name) / "eval" / "predictions.jsonl"
        records[title] = read_json_lines(path)

    first = next(iter(records.values()))
    kinds = sorted({record["group"] for record in first})

    items = []
    for i in range(number):
        start = i * len(first) // number
        kind = kinds[i % len(kinds)]
        chosen = _find_next(first, kind, start)
        items.append(_collect_answers(records, first[chosen], chosen))

    return items


def _find_next(records: list[dict], kind: str, start: int) -> int:
    """The first question of a kind from a place on, going round at the end."""
    order = [*range(start, len(records)), *range(start)]
    return next(i for i in order if records[i]["group"] == kind)


def _collect_answers(records: dict[str, list[dict]], question: dict, number: int) -> dict:
    reference = question["reference"]
    answers = []
    for title, rows in records.items():
        text = get_answer(rows[number])
        answers.append({"name": title, "text": text, "is_right": text == reference})

    text = question["prompt"].rpartition(">")[2]
    return {
        "image": question["images"][0],
        "question": text.strip(),
        "reference": reference,
        "answers": answers,
    }


def _make_item(out: Path, item: dict) -> dict:
    image = ImageStore(out / "data").load(item["image"])
    return item | {"url": embed_image(image)}


def _draw_levels(results: dict, titles: dict[str, str]) -> list[Markup]:
    by_variant = get_main_results(results)
    charts = []
    for level in ("average", *results["levels"]):
        rows = {}
        for name, title in titles.items():
            rows[title] = get_interval(by_variant[name], level)
        chart_title = LEVELS.get(level, level)
        reference = titles[results["baseline"]]
        charts.append(draw_bars(rows, title=chart_title, reference=reference))

    return charts


def _make_score_table(results: dict, titles: dict[str, str]) -> Rows:
    by_variant = get_main_results(results)
    baseline = titles[results["baseline"]]
    levels = results["levels"]

    rows = [["variant", "average (95 %)", *levels, f"above {baseline} (95 %)"]]
    for name, title in titles.items():
        result = by_variant[name]
        row = [title, format_percent_interval(result["average"])]
        for level in levels:
            row.append(format_percent(result["levels"][level]))
        row.append(format_change(get_difference(result)))
        rows.append(row)

    return rows


def _make_seeds_table(results: dict) -> Rows:
    """This run beside what five seeds gave, and a control that the demo does not train."""
    by_variant = get_main_results(results)
    baseline = FIVE_SEEDS[results["baseline"]].title
    head = ["variant", "this run, one seed (95 %)", "five seeds (95 %)"]
    rows = [[*head, f"five seeds, above {baseline} (95 %)"]]
    for published in FIVE_SEEDS.values():
        own = by_variant.get(published.variant)
        shown = DASH if own is None else format_percent_interval(own["average"])
        rows.append([published.title, shown, published.average, published.above])
    return rows


def _make_cards(results: dict, variants: dict[str, DemoVariant]) -> list[dict]:
    cards = []
    for name, variant in variants.items():
        facts = results["arms"][name]
        drawing = draw_plan(Plan.from_dict(facts["plan"]), *facts["depths"])
        cards.append({"name": variant.title, "meaning": variant.meaning, "drawing": drawing})
    return cards


def _make_cost_table(results: dict, titles: dict[str, str]) -> Rows:
    head = ["variant", "image tokens per image", "encoder passes per image", "fusion parameters"]
    rows = [[*head, "language model parameters", "training seconds", "answering seconds"]]
    by_variant = get_main_results(results)

    for name, title in titles.items():
        facts = results["arms"][name]
        result = by_variant[name]
        rows.append(
            [
                title,
                format_number(facts["image_tokens"]),
                format_number(facts["views"]),
                format_number(facts["parameters"]["fusion"]),
                format_number(facts["parameters"]["language"]),
                format_number(result["train_seconds"], ",.0f"),
                format_number(result["eval_seconds"], ",.0f"),
            ]
        )

    return rows


def _draw_losses(results: dict, titles: dict[str, str]) -> Markup:
    curves = results["curves"][results["main"]]
    lines = {title: curves.get(name, []) for name, title in titles.items()}
    return draw_curves(lines, title="loss of the second stage", x_label="step")


def _get_folder(study: Study, name: str) -> Path:
    return Run(study.main, name, study.seeds[0]).get_folder(study.output)
