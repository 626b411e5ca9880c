"""A study's figures as one self-contained HTML page with drawings; it computes nothing."""

from __future__ import annotations

from html import escape

from ..plan import Plan
from . import charts, plots
from .evaluations import STYLE
from .tables import (
    budget_rows,
    cost_rows,
    group_rows,
    is_clear,
    level_rows,
    main_rows,
    missing_words,
    notes,
    number,
    points,
    ranked,
    share,
    span,
)

MORE_STYLE = """
body{max-width:1140px}table{font-size:.8rem}td,th{padding:.2rem .45rem}td{white-space:nowrap}
th{vertical-align:bottom}tr.base td{background:#eee}
.wide{overflow-x:auto}.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(235px,1fr));gap:.8rem}
.card{border:1px solid #ccc;padding:.5rem .7rem;font-size:.84rem;break-inside:avoid}.card b{font-size:.95rem}
.two{display:grid;grid-template-columns:1fr 1fr;gap:.4rem 1.2rem}li{margin:.2rem 0}
@media print{body{max-width:none;margin:0}section{break-inside:avoid}}
"""


def page(found: dict) -> str:
    """The page as HTML text."""
    title = escape(found["title"] or "A study")
    sections = [f"<h1>{title}</h1><p>{escape(found['note'] or '')}</p>", _list(found["headline"])]
    names = ranked(found)
    if names:
        sections += [
            "<h2>Quality and cost</h2>"
            + _html(main_rows(found), found["baseline"])
            + _list(notes(found), "note"),
            "<h2>Quality against prefill FLOPs</h2>" + _scatters(found, names),
            "<h2>Per level</h2>" + _levels(found, names) + _level_differences(found),
            "<h2>Every pair of arms</h2>" + _matrix(found),
            "<h2>What each arm is and what it costs</h2>" + _cards(found, names),
            "<h2>Training</h2>"
            + _html(budget_rows(found), found["baseline"])
            + _curves(found, names),
            "<h2>By kind of question</h2>" + _html(group_rows(found), found["baseline"]),
            "<h2>Cost in full</h2>" + _html(cost_rows(found), found["baseline"]),
        ]
    if found["missing"]:
        sections.append(f"<h2>Missing runs</h2><p>{escape(missing_words(found))}</p>")
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{title}</title>'
    )
    style = f"<style>{STYLE}{MORE_STYLE}</style>"
    return (
        "<!doctype html><html"
        f" lang='en'><head>{head}{style}</head><body>{''.join(sections)}</body></html>"
    )


def _scatters(found: dict, names: list[str]) -> str:
    families = list(dict.fromkeys(found["arms"][name]["family"] for name in names))
    parts = []
    for size, words in (("here", "the study's own size"), ("large", "CLIP-L/336 and a 7B Llama")):
        dots = []
        for name in names:
            arm = found["arms"][name]
            e = arm["results"][found["main"]]["average"]
            if arm["relative"][size]:
                mark = families.index(arm["family"])
                on = name in found["frontier"][size]
                dots.append(
                    plots.Point(
                        name, arm["relative"][size], e["value"], e["low"], e["high"], mark, on
                    )
                )
        label = f"prefill FLOPs over those of {found['baseline']}, at {words} (stretched near 1)"
        parts.append(f"<figure>{plots.scatter(dots, families, x_label=label)}</figure>")
    return "".join(parts)


def _levels(found: dict, names: list[str]) -> str:
    def triple(e: dict) -> tuple[float, float, float]:
        return e["value"], e["low"], e["high"]

    rows = {}
    for name in names:
        result = found["arms"][name]["results"][found["main"]]
        rows[name] = [
            triple(result["average"]),
            *(triple(result["levels"][level]) for level in found["levels"]),
        ]
    return plots.bar_rows(["average", *found["levels"]], rows, reference=found["baseline"])


def _level_differences(found: dict) -> str:
    note = (
        f'<p class="note">Difference from {escape(found["baseline"])} in points; a star: clear of'
        " zero after correction.</p>"
    )
    return note + _html(level_rows(found), found["baseline"])


def _matrix(found: dict) -> str:
    cells = {}
    for a, b, e in found["pairs"]["cells"]:
        clear, sure = is_clear(e), e["corrected_p"] < 0.05
        cells[a, b], cells[b, a] = (e["value"], clear, sure), (-e["value"], clear, sure)
    note = (
        '<p class="note">Row minus column in points, paired; the darker, the further the row is'
        " ahead. Bold: clear of zero after "
        f"correction for all {len(found['pairs']['cells'])} pairs. Upright: clear on its own only."
        " Italic: not clear.</p>"
    )
    return plots.matrix(found["pairs"]["arms"], cells) + note


def _cards(found: dict, names: list[str]) -> str:
    cards = []
    for name in names + [n for n in found["arms"] if n not in names]:
        arm = found["arms"][name]
        drawn = ""
        if arm["plan"] and arm["depths"]:
            drawn = plots.plan_sketch(Plan.from_dict(arm["plan"]), *arm["depths"])
        result = arm["results"].get(found["main"], {})
        gap = result.get("difference")
        said = f"average {share(result['average'])} %" if result else "not run"
        if gap:
            said += f", {points(gap['average']['value'])} ({span(gap['corrected'])} corrected)"
        facts = {
            "image tokens": number(arm["image_tokens"]),
            "encoder views": number(arm["views"]),
            "fusion parameters": number(arm["parameters"].get("fusion")),
            "prefill FLOPs here": number(arm["relative"]["here"], ".3f"),
            "prefill FLOPs large": number(arm["relative"]["large"], ".3f"),
            "training seconds": number(result.get("train_seconds"), ",.0f"),
        }
        lines = "<br>".join(f"{words}: {value}" for words, value in facts.items())
        cards.append(
            "<div"
            f' class="card"><b>{escape(name)}</b><br>{escape(arm["family"])}<br>{said}<br>{drawn}<br>{lines}</div>'
        )
    note = (
        '<p class="note">Encoder left, decoder right, both from the bottom up, dark where read or'
        " added to. Strip at the far left: how far fine views run. Thick lines: coarse and fine"
        " patches; thin lines: coarse only. FLOPs relative to the baseline.</p>"
    )
    return note + f'<div class="cards">{"".join(cards)}</div>'


def _curves(found: dict, names: list[str], most: int = 5) -> str:
    """Losses by family, at most `most` arms and the baseline in a chart, budgets side by side on
    one scale.
    """
    base, parts = found["baseline"], []
    families: dict[str, list[str]] = {}
    for name in found["arms"]:
        if name in names and name != base:
            families.setdefault(found["arms"][name]["family"], []).append(name)
    lines = [line for of in found["curves"].values() for line in of.values()]
    top = max((y for line in lines for _, y in line[len(line) // 10 :]), default=1) * 1.05
    for family, members in families.items():
        for i in range(0, len(members), most):
            shown = [base, *members[i : i + most]]
            for budget, of in found["curves"].items():
                drawn = charts.curves(
                    {n: of[n] for n in shown if of.get(n)}, x_label="step", width=500, y_most=top
                )
                parts.append(
                    f"<figure><figcaption>{escape(family)},"
                    f" {escape(budget)}</figcaption>{drawn}</figure>"
                )
    note = (
        '<p class="note">Loss of the last stage, mean over seeds; the baseline is in every'
        " chart.</p>"
    )
    return note + f'<div class="two">{"".join(parts)}</div>'


def _html(rows: list[list[str]], baseline: str) -> str:
    if len(rows) < 2:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = []
    for row in rows[1:]:
        mark = ' class="base"' if row[0] == baseline else ""
        body.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _list(lines: list[str], style: str = "") -> str:
    return f'<ul class="{style}">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
