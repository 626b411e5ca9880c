"""The table of the pointing game, for a terminal and for Markdown."""

from __future__ import annotations

import numpy as np

from .tables import Rows, to_markdown

SHARES = ("hit", "hit_chance", "hit_shuffled", "hit_other", "near", "near_chance")
HEAD = ["shortcut", "map", "question", "items", "in the cell of the detail", "by chance"]


def make_table(rows: list[dict]) -> str:
    """Return the shares as a table in Markdown, pooled over models by their numbers of items.

    Args:
        rows: What `experiments.pointing.play` returned, of one model or of several.
    """
    if not rows:
        return "No shortcut decides an answer, so there is no map to check."
    pooled: dict[tuple, list[dict]] = {}
    for row in rows:
        pooled.setdefault((row["shortcut"], row["kind"], row["question"]), []).append(row)
    table: Rows = [[*HEAD, "shuffled", "another question's", "within one cell", "by chance"]]
    for (shortcut, kind, question), own in pooled.items():
        weights = [row["num_items"] for row in own]
        cells = [str(shortcut), kind, question, str(sum(weights))]
        for name in SHARES:
            share = np.average([row[name] for row in own], weights=weights)
            cells.append(f"{100 * share:.0f} %")
        table.append(cells)
    return to_markdown(table)
