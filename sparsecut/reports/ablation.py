"""How an explanation is told: lines for a terminal, Markdown, and one page with a heat map that
survives a grey printer.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from ..plan import Plan
from .charts import plan_drawing

ORDER = ("high", "mid", "low")  # of the picture world's levels
NOTES = (
    (
        "A shortcut that is off adds zeros; nothing was trained again. Two that carry the same can"
        " each be dropped at no loss."
    ),
    (
        "Points of accuracy against all shortcuts; the 95 % interval is over pictures, for this one"
        " trained model. Lost and won are answers that turned wrong and right. Dashed cells are"
        " gains of a point or more."
    ),
    (
        "Shuffled: the shortcut reads another picture. A loss without it, but none when it is"
        " shuffled, means that the model uses its presence and not its content."
    ),
    (
        "Norms are means over image tokens, after gates; the ratio is what a shortcut adds over the"
        " hidden state it is added to (for layer 0: over the input's own features). A ratio near 0"
        " is a shortcut that is hardly used."
    ),
)
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1240px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #ccc}
table{border-collapse:collapse;margin:.6rem 0;font-size:.88rem}
td,th{padding:.3rem .32rem;border:1px solid #ddd;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left;white-space:normal;min-width:7.4rem}.wide{overflow-x:auto}
@media print{.wide{overflow:visible}td,th{font-size:.7rem;print-color-adjust:exact}}
.note{color:#555;font-size:.92rem;max-width:50rem}svg{max-width:100%;height:auto}
"""


def write_explanation(found: dict, out: Path) -> Path:
    """Write explain.json, explain.md and explain.html into `out`; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "explain.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tables = [("What is lost", loss_rows(found)), ("What each adds", norm_rows(found))]
    parts = [f"## {title}\n\n{_markdown(rows)}\n" for title, rows in tables]
    notes = "\n".join(f"- {note}" for note in NOTES)
    (out / "explain.md").write_text(
        "# What each shortcut is good for\n\n" + "\n".join(parts) + f"\n{notes}\n", encoding="utf-8"
    )
    page = out / "explain.html"
    page.write_text(_page(found), encoding="utf-8")
    return page


def lines(found: dict) -> str:
    """Both tables as lines for a terminal."""
    return "\n\n".join(_aligned(rows) for rows in (loss_rows(found), norm_rows(found)))


def columns_of(found: dict) -> list[tuple[str, str]]:
    """(levels or groups, name) of the columns after the average."""
    first = found["conditions"]["all"]
    levels = sorted(first["levels"], key=lambda n: (ORDER.index(n) if n in ORDER else 9, n))
    return [("levels", name) for name in levels] + [
        ("groups", name) for name in sorted(first["groups"])
    ]


def average(condition: dict) -> float:
    """The mean over levels, or the accuracy where questions have none."""
    return (
        condition["accuracy"]
        if condition["mean_over_levels"] is None
        else condition["mean_over_levels"]
    )


def loss_rows(found: dict) -> list[list[str]]:
    """A row per condition: accuracy of all, then points won or lost against it, per level and
    group.
    """
    columns = columns_of(found)
    rows = [["shortcuts", "average", "interval", "lost", "won", *(name for _, name in columns)]]
    base = found["conditions"]["all"]
    for name, one in found["conditions"].items():
        if name == "all":
            cells = [f"{100 * average(one):.1f} %", "", "", ""]
            cells += [f"{100 * one[kind][column]['accuracy']:.1f} %" for kind, column in columns]
        else:
            estimate = one["difference"]["average"]
            low, high = 100 * estimate["low"], 100 * estimate["high"]
            cells = [f"{100 * (average(one) - average(base)):+.1f}", f"{low:+.1f} to {high:+.1f}"]
            cells += [str(one["lost"]), str(one["gained"])]
            cells += [f"{_change(found, name, kind, column):+.1f}" for kind, column in columns]
        rows.append([_words(found, name), *cells])
    return rows


def norm_rows(found: dict) -> list[list[str]]:
    """A row per shortcut: where it goes and how much it adds."""
    rows = [
        [
            "shortcut",
            "taps",
            "layer",
            "mix",
            "gate",
            "norm added",
            "norm of the hidden state",
            "ratio",
            "cosine",
        ]
    ]
    for s in found["shortcuts"]:
        numbers = [s["norm"], s["hidden_norm"], s["ratio"], s["cosine"]]
        shown = ["" if number is None else f"{number:.2f}" for number in numbers]
        name = f"{s['number']} (the input)" if s["number"] == found["input"] else str(s["number"])
        rows.append(
            [
                name,
                ", ".join(map(str, s["taps"])),
                str(s["layer"]),
                s["mix"],
                f"{s['gate']:.2f}",
                *shown,
            ]
        )
    return rows


def _words(found: dict, name: str) -> str:
    *_, last = name.split()
    if not last.isdigit():
        return {"all": "all of them", "input only": "the input only"}[name]
    s = found["shortcuts"][int(last)]
    return f"{name} (tap {', '.join(map(str, s['taps']))} to layer {s['layer']})"


def _change(found: dict, name: str, kind: str, column: str) -> float:
    conditions = found["conditions"]
    return 100 * (
        conditions[name][kind][column]["accuracy"] - conditions["all"][kind][column]["accuracy"]
    )


def _page(found: dict) -> str:
    plan = Plan.from_dict(found["plan"])
    sections = [
        "<h1>What each shortcut is good for</h1>",
        f'<p class="note">{found["num_questions"]:,} questions, one trained model.</p>',
        f"<h2>What is lost</h2><div class='wide'>{_heat(found)}</div>",
        f"<h2>What each adds</h2><div class='wide'>{_table(norm_rows(found))}</div>",
        f"<h2>The plan</h2>{plan_drawing(plan, *found['depths'])}",
        *(f'<p class="note">{escape(note)}</p>' for note in NOTES),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Shortcuts'
        " explained</title>"
    )
    return (
        "<!doctype html><html"
        f" lang='en'><head>{head}<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>"
    )


def _heat(found: dict) -> str:
    """The table of losses with cells shaded by their size: darker is a larger loss; gains have a
    border instead.
    """
    rows = loss_rows(found)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = []
    for name, row in zip(found["conditions"], rows[1:], strict=True):
        cells = [f"<td>{escape(row[0])}</td>"]
        for place, cell in enumerate(row[1:], 1):
            shaded = name != "all" and (place == 1 or place > 4)
            cells.append(f"<td{_shade(float(cell)) if shaded else ''}>{escape(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _shade(points: float) -> str:
    if points >= 1:
        return ' style="outline:2px dashed #555;outline-offset:-3px"'
    depth = min(1.0, -points / 60) if points < 0 else 0.0
    red, green, blue = (round(255 - depth * (255 - dark)) for dark in (27, 79, 114))
    return (
        f' style="background:rgb({red},{green},{blue});color:{"#fff" if depth > 0.65 else "#222"}"'
    )


def _table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    )


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
