"""One self-contained HTML page about several trained arms: what they are, how well they answer,
what they cost.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from ..plan import Plan
from . import charts

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1060px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2rem;border-bottom:1px solid #ccc}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left;white-space:nowrap}.note{color:#555;font-size:.92rem;max-width:46rem}
.row{display:flex;flex-wrap:wrap;gap:1.2rem}figure{margin:0;max-width:270px}figcaption{font-size:.9rem;color:#444}
.legend{margin:.2rem 0 0 2.6rem;font-size:.9rem}.key{margin-right:1.2rem;white-space:nowrap}.key svg{vertical-align:-1px;margin-right:.3rem}
.sample{width:235px;font-size:.86rem;border:1px solid #ddd;padding:.6rem}.sample img{width:144px;image-rendering:pixelated;display:block}
.right{color:#1d6b2e}.wrong{color:#a12b1c}svg{max-width:100%;height:auto}
"""


@dataclass
class Arm:
    """What one arm brings to the page.

    scores: group of questions -> (share right, low, high, number of questions), bounds at 95 %.
    losses: (step, loss) of the last stage. facts: cells of the cost table by column name.
    """

    name: str
    meaning: str
    plan: Plan
    scores: dict[str, tuple[float, float, float, int]]
    average: float
    losses: list[tuple[float, float]]
    facts: dict[str, str]


@dataclass
class Sample:
    """A picture with a question, its reference, and every arm's answer."""

    picture: Path
    question: str
    reference: str
    answers: dict[str, str] = field(default_factory=dict)


def write_report(
    path: Path,
    title: str,
    introduction: str,
    arms: list[Arm],
    samples: list[Sample],
    depths: tuple[int, int],
) -> None:
    """Write the page. introduction is HTML of our own making; everything else is escaped."""
    sections = [
        f"<h1>{escape(title)}</h1>{introduction}",
        "<h2>Accuracy per level</h2>" + _accuracy(arms),
        "<h2>What each arm is</h2>" + _plans(arms, depths),
        "<h2>Cost</h2>"
        + _table(["arm", *arms[0].facts], [[a.name, *a.facts.values()] for a in arms]),
        "<h2>Loss of the second stage</h2>"
        + charts.curves({a.name: a.losses for a in arms}, x_label="step"),
        "<h2>Pictures and answers</h2>" + _samples(samples),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{escape(title)}</title>'
    )
    page = (
        "<!doctype html><html"
        f" lang='en'><head>{head}<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>"
    )
    path.write_text(page, encoding="utf-8")


def _accuracy(arms: list[Arm]) -> str:
    groups = list(arms[0].scores)
    drawn = charts.bars(groups, {a.name: [a.scores[g][:3] for g in groups] for a in arms})
    counts = [f"{g} ({arms[0].scores[g][3]} questions)" for g in groups]
    rows = [
        [a.name, *(_interval(a.scores[g]) for g in groups), f"{100 * a.average:.1f}"] for a in arms
    ]
    note = (
        '<p class="note">Exact match of greedy answers, in per cent, with the 95 % Wilson interval'
        " of the questions asked; the average is the mean of the levels. The intervals speak of the"
        " questions only: another seed of training can move every arm by several points, and <b>one"
        " seed is one seed</b>.</p>"
    )
    return drawn + _table(["arm", *counts, "average"], rows) + note


def _plans(arms: list[Arm], depths: tuple[int, int]) -> str:
    figures = [
        f"<figure>{charts.plan_drawing(a.plan, *depths)}<figcaption><b>{escape(a.name)}</b><br>{escape(a.meaning)}</figcaption></figure>"
        for a in arms
    ]
    return f'<div class="row">{"".join(figures)}</div>'


def _samples(samples: list[Sample]) -> str:
    cards = []
    for s in samples:
        data = base64.b64encode(s.picture.read_bytes()).decode()
        lines = [
            f'<li class="{"right" if answer == s.reference else "wrong"}">{escape(arm)}:'
            f" {escape(answer)}</li>"
            for arm, answer in s.answers.items()
        ]
        cards.append(
            '<div class="sample"><img alt=""'
            f' src="data:image/png;base64,{data}"><b>{escape(s.question)}</b><br>'
            f"reference: {escape(s.reference)}<ul>{''.join(lines)}</ul></div>"
        )
    return f'<div class="row">{"".join(cards)}</div>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _interval(score: tuple[float, float, float, int]) -> str:
    value, low, high, _ = score
    return f"{100 * value:.1f} ({100 * low:.1f} to {100 * high:.1f})"
