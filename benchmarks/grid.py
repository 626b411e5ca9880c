"""Which model families work: a tiny random model of each, checked; a table on screen and in
docs/support.md.

    python benchmarks/grid.py                      # every family of tests/families.py, some minutes
    python benchmarks/grid.py encoders             # or decoders: that section alone
    python benchmarks/grid.py llama vit mamba      # some of them, on screen only

Each decoder is joined to CLIP and each encoder to Llama, with `sparsecut` in the pattern `sparse`. The checks are those of tests/checks.py.
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from helpers import checks
from helpers.families import LANGUAGE, VISION
from support_page import replace_section

COLUMNS = {
    "gradients": checks.gradients,
    "cached = uncached": checks.cached,
    "batch = single": checks.padded,
    "beams": checks.beams,
    "checkpointing": checks.checkpointing,
    "compiles": checks.compiles,
}
ENCODER_COLUMNS = {"taps": checks.taps, "stops early": checks.stops} | COLUMNS
PARTS = {"vision": "encoders", "language": "decoders"}  # words of the command line
INTRODUCTION = """\
# Model families

Which encoders and language models `build` joins, and more below, each section made by the command that it names. Families that are
not listed were not tried; most decoder-only transformers work.

"""
MADE = """\
Made by `make grid` with transformers {transformers} and torch {torch}: a tiny random model of each family, joined to a tiny
{partner} by `sparsecut` in the pattern `sparse`. {green} of {tried} families pass every check.
"""
ENCODERS = """\
Encoders that pack pictures of any size (Pixtral, SigLIP2-NaFlex, Qwen2-VL's and its successors') run on views of one size, here with
more columns than rows; Whisper listens, without fine views. Hierarchical encoders (Swin, Hiera, ConvNeXt) change width and grid
from stage to stage, so a patch has no one state per layer, and masked or detecting ones (MAE, YOLOS) have no state for every patch:
both are refused by name. Qwen's encoders read the numbers of a picture's grid as they run, which one full graph cannot hold.

- *taps*: equal to the encoder's own hidden states, without class and register tokens; touching one patch moves the state in its place
- *stops early*: blocks above the deepest tap do not run
"""
CHECKS = """\
- *gradients*: a training step reaches every parameter of the fusion
- *cached = uncached*: greedy decoding, the same tokens, and scores within 1e-4
- *batch = single*: each row of a left-padded batch has the logits it has alone
- *beams*: beam search with several returned sequences, equal to the rows alone
- *checkpointing*: equal gradients with gradient checkpointing of both kinds
- *compiles*: one full graph, forward and backward, equal to eager mode
"""


def try_family(kind: str, name: str, columns: dict) -> tuple[list[str], list[str]]:
    """Cells ("yes" or "no") of a family, building first, and a sentence for each "no"."""
    try:
        model = checks.join(**{kind: name})
    except Exception as error:
        return ["no"] + [""] * len(columns), [f"does not build: {reason(error)}"]
    cells, reasons = ["yes"], []
    for column, check in columns.items():
        try:
            check(model)
            cells.append("yes")
        except Exception as error:
            cells.append("no")
            reasons.append(f"{column}: {reason(error)}")
    return cells, reasons


def reason(error: Exception) -> str:
    """The first sentence of an error, short enough for a table."""
    text = (
        str(error).strip().split("\n")[0].split(";")[0].replace("|", "/")[:200].replace("*", "\\*")
    )  # which Markdown would read as emphasis
    return (
        text
        if isinstance(error, ValueError | AssertionError)
        else f"{type(error).__name__}: {text}"
    )


def table(
    kind: str, families: dict, columns: dict, wanted: list[str]
) -> tuple[str, dict[str, int]]:
    """A Markdown table of families, their reasons below it, and how many were tried and are green
    in every column.
    """
    pool = multiprocessing.get_context("fork").Pool(
        1, maxtasksperchild=1
    )  # what compilation keeps goes with each family
    lines = ["| family | builds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    notes, counts = [], {"tried": 0, "green": 0}
    for name in [n for n in families if not wanted or n in wanted]:
        start = time.time()
        cells, reasons = pool.apply(try_family, (kind, name, columns))
        print(
            f"{name:28}",
            *(f"{c:4}" for c in cells),
            f"{time.time() - start:6.1f} s",
            *reasons,
            flush=True,
        )
        counts["tried"] += 1
        counts["green"] += set(cells) == {"yes"}
        lines.append("| `" + name + "` | " + " | ".join(cells) + " |")
        notes += [f"- `{name}`: {r}" for r in reasons]
    return "\n".join([*lines, "", *notes, ""]), counts


def main() -> None:
    """Run the grid; a full run is written to docs/support.md."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    only = [part for part in ("encoders", "decoders") if part in sys.argv[1:]]
    wanted = [name for name in sys.argv[1:] if name not in only]
    if unknown := set(wanted) - set(LANGUAGE) - set(VISION):
        sys.exit(
            f"no such family: {', '.join(sorted(unknown))}; known are"
            f" {', '.join([*LANGUAGE, *VISION])}"
        )
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    sections = {}
    for heading, kind, families, columns, partner, more in (
        ("Vision encoders", "vision", VISION, ENCODER_COLUMNS, "Llama", ENCODERS + CHECKS),
        ("Language models", "language", LANGUAGE, COLUMNS, "CLIP encoder", CHECKS),
    ):
        if only and PARTS[kind] not in only:
            continue
        rows, counts = table(kind, families, columns, wanted)
        sections[heading] = "\n".join(
            [MADE.format(**versions, **counts, partner=partner), more, rows]
        )
    if not wanted:
        replace_section("", INTRODUCTION)
        for heading, text in sections.items():
            replace_section(heading, text)


if __name__ == "__main__":
    main()
