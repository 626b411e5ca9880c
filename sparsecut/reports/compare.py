"""The page of a comparison: one HTML file with tables, plans, and the items on which runs differ,
with their pictures.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..data.images import Pictures
from ..experiments.compare import Compared, notes, stores, table
from . import charts
from .evaluations import STYLE

SIDE = 224  # pixels of a picture on the page
MORE_STYLE = """
.item{width:310px;font-size:.86rem;border:1px solid #ddd;padding:.6rem;break-inside:avoid;overflow-wrap:anywhere}
.item img{max-width:100%;max-height:224px;display:block;margin-bottom:.3rem}.wide{overflow-x:auto}
.right::before{content:"\\2713 "}.wrong::before{content:"\\2717 "}.item ul{padding-left:1.1rem;margin:.3rem 0;list-style:none}
"""


def write_comparison(
    folder: Path, runs: Sequence[Compared], found: dict, images: str | Path | None = None
) -> Path:
    """Write compare.html, compare.md and compare.json into a folder and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    rows = table(found)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    (folder / "compare.md").write_text(
        "\n".join([*lines, "", *(f"- {n}" for n in notes(found)), ""]), encoding="utf-8"
    )
    page = folder / "compare.html"
    page.write_text(_page(found, stores(runs, images)), encoding="utf-8")
    return page


def _page(found: dict, pictures: Sequence[Pictures]) -> str:
    title = " and ".join(found["runs"]) if len(found["runs"]) < 4 else f"{len(found['runs'])} runs"
    kinds = _kinds(found)
    sections = [
        f"<h1>{escape(title)}, compared</h1>",
        _table(table(found)),
        '<ul class="note">'
        + "".join(f"<li>{escape(line)}</li>" for line in notes(found))
        + "</ul>",
        "<h2>Average over levels</h2>" + _bars(found),
        f"<h2>By kind of question</h2>{_table(kinds)}" if len(kinds[0]) > 1 else "",
        _plans(found),
        f"<h2>Items on which they differ</h2>{_items(found, pictures)}" if found["items"] else "",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{escape(title)}</title>'
    )
    style = f"<style>{STYLE}{MORE_STYLE}</style>"
    return (
        "<!doctype html><html"
        f" lang='en'><head>{head}{style}</head><body>{''.join(sections)}</body></html>"
    )


def _bars(found: dict) -> str:
    shares = {name: row["share"] for name, row in found["runs"].items()}
    groups = [
        "average",
        *(level for level in next(iter(shares.values()))["levels"] if level != "all"),
    ]
    cells = {
        name: [
            (e["value"], e["low"], e["high"])
            for e in (share["average"] if g == "average" else share["levels"][g] for g in groups)
        ]
        for name, share in shares.items()
    }
    return charts.bars(groups, cells)


def _kinds(found: dict) -> list[list[str]]:
    names = sorted({kind for row in found["runs"].values() for kind in row["kinds"]})
    rows = [["run", *names]]
    for name, row in found["runs"].items():
        rows.append(
            [
                name,
                *(
                    f"{100 * row['kinds'][kind]:.1f}" if kind in row["kinds"] else "-"
                    for kind in names
                ),
            ]
        )
    return rows


def _plans(found: dict) -> str:
    from ..plan import Plan

    figures = [
        f"<figure>{charts.plan_drawing(Plan.from_dict(row['plan']), *row['depths'])}<figcaption><b>{escape(name)}</b></figcaption></figure>"
        for name, row in found["runs"].items()
        if row["plan"]
    ]
    return f'<h2>What each is</h2><div class="row">{"".join(figures)}</div>' if figures else ""


def _items(found: dict, pictures: Sequence[Pictures]) -> str:
    note = (
        f'<p class="note">{len(found["items"])} of {found["num_differing"]:,} items: those that'
        f" {escape(found['baseline'])} gets wrong and another right, and the other way round, in"
        " turn; chosen by that, so they say nothing about how often it happens. Most seeds"
        " decide.</p>"
    )
    return (
        note + f'<div class="row">{"".join(_item(item, pictures) for item in found["items"])}</div>'
    )


def _item(item: dict, pictures: Sequence[Pictures]) -> str:
    shown = "".join(_picture(name, pictures) for name in item["images"])
    lines = []
    for run, answers in item["answers"].items():
        said = ", ".join(dict.fromkeys(text or "(nothing)" for text, _ in answers.values()))
        right = 2 * sum(correct for _, correct in answers.values()) > len(answers)
        lines.append(
            f'<li class="{"right" if right else "wrong"}">{escape(run)}: {escape(said)}</li>'
        )
    kind = f" ({escape(item['group'])})" if item["group"] else ""
    return (
        f'<div class="item">{shown}<b>{escape(item["prompt"])}</b>{kind}<br>reference:'
        f" {escape(item['reference'])}"
        f"<ul>{''.join(lines)}</ul></div>"
    )


def _picture(name: str, pictures: Sequence[Pictures]) -> str:
    store = next((store for store in pictures if isinstance(name, str) and name in store), None)
    if store is None:
        return f"<i>{escape(str(name))}</i><br>"
    picture = store.open(name)
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return (
        f'<img alt="{escape(name)}"'
        f' src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
    )


def _table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
