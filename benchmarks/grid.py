"""Which model families work: a tiny random model of each, checked, as a table in docs/support.md.

    python benchmarks/grid.py                      # every family of tests/helpers/families.py
    python benchmarks/grid.py encoders             # or decoders: that section alone
    python benchmarks/grid.py llama vit mamba      # some families, on screen only
    python benchmarks/grid.py --only whisper yolos # some families, and their rows of the page

The whole takes some minutes. With `--only` a row is written as soon as it is measured. Each decoder
is joined to CLIP and each encoder to Llama, by `sparsecut` with the pattern `sparse`. The checks
are those of tests/helpers/checks.py.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from helpers import checks
from helpers.families import LANGUAGE, VISION
from support_page import PAGE, find_section, format_reason, replace_section

VERSIONS = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
COLUMNS = {
    "gradients": checks.gradients,
    "cached = uncached": checks.cached,
    "batch = single": checks.padded,
    "beams": checks.beams,
    "checkpointing": checks.checkpointing,
    "compiles": checks.compiles,
}
ENCODER_COLUMNS = {
    "taps": checks.taps,
    "stops early": checks.stops,
    "other sizes": checks.resizes,
} | COLUMNS
INTRODUCTION = """\
# Model families

The first two sections list encoders and language models that `build` joins. Further sections list
pretrained VLMs that `upgrade` takes, and other checks. Each section names the command that makes
it. Families that are not listed were not tried. Most decoder-only transformers work.
"""
MADE = """\
`make grid` made this section with transformers {transformers} and torch {torch}. It joins a tiny
random model of each family to a tiny {partner}, by `sparsecut` with the pattern `sparse`.
{green} of {tried} families pass every check.
"""
ENCODERS = """\
Some encoders take images of any size: Pixtral, SigLIP2-NaFlex, Qwen2-VL and its successors. They
run here on views of one size, with more columns than rows. Whisper takes audio, without fine views.
Encoders in stages (Swin, ConvNeXt, Hiera) change width and grid from stage to stage. Their blocks
are numbered through. Taps are brought to the finest grid that the plan reads: each patch has the
state of the cell that covers it. Zeros follow its channels up to the widest of these taps. So taps
of an early stage make many image tokens: 3,136 in Swin-T and ConvNeXt-T by `sparsecut`, at 224 pixels.
Later taps or a smaller `view_size` make fewer, and `build` names them. ViT-MAE shows all patches.
Qwen's encoders compute the sizes of their grids while they run, so they cannot be
one full graph.

Encoders of timm are read through transformers' `timm_wrapper`, with the extra `timm`
(`pip install 'sparsecut[timm]'`): give `build` or a recipe a name such as
`timm/vit_small_patch14_reg4_dinov2.lvd142m`, or a folder in timm's form. Known are its ViTs (`vit_*`,
DeiT, EVA, BEiT, SigLIP, DINOv2, DINOv3, SAM, XCiT, CaiT, mixers) and encoders in stages (Swin,
ConvNeXt, MambaOut, MaxViT, DaViT, FocalNet, PVT v2, ResNet, RegNet, EfficientNet, SAM 2's Hiera).
Others are refused. `view_size` sets `dynamic_img_size` or `strict_img_size` where timm has them.
Their mean and deviation are those of the repository's `pretrained_cfg`. `tests/test_timm_encoders.py`
has their claims. They ran with timm 1.0.31, torchvision 0.29.1 and torch 2.14.1.

- *taps*: They equal the encoder's own hidden states, without class and register tokens. A change of
  a patch moves the state at its place.
- *stops early*: Blocks above the deepest tap do not run.
- *other sizes*: With `view_size` the states are those of the encoder's own code, which interpolates
  its positions. They learn where the encoder is trained. "fixed": it has none for other sizes, and
  `view_size` is refused.
"""
CHECKS = """\
- *gradients*: A training step reaches every parameter of the fusion.
- *cached = uncached*: Greedy decoding gives the same tokens, and logits within 1e-4.
- *batch = single*: Each row of a left-padded batch has the logits that it has alone.
- *beams*: Beam search with several returned sequences gives each row what it gives the row alone.
- *checkpointing*: Both kinds of gradient checkpointing give equal gradients.
- *compiles*: The model is one full graph, forward and backward, and equals eager mode.
"""


class Section(NamedTuple):
    """One table of the page."""

    heading: str
    argument: str  # its name on the command line
    kind: str  # argument of `checks.join`
    families: dict
    columns: dict
    partner: str
    explanation: str


SECTIONS = (
    Section(
        "Vision encoders",
        "encoders",
        "vision",
        VISION,
        ENCODER_COLUMNS,
        "Llama",
        ENCODERS + CHECKS,
    ),
    Section("Language models", "decoders", "language", LANGUAGE, COLUMNS, "CLIP encoder", CHECKS),
)


def try_family(kind: str, name: str, columns: dict) -> tuple[list[str], list[str]]:
    """Run the checks on one family.

    Returns:
        The cells ("yes", "no", or a word that a check returns), building first, and a sentence for
        each "no".
    """
    try:
        model = checks.join(**{kind: name})
    except Exception as error:
        return ["no"] + [""] * len(columns), [format_reason(name, "builds", error)]
    cells = ["yes"]
    reasons = []
    for column, check in columns.items():
        try:
            cells.append(check(model) or "yes")
        except Exception as error:
            cells.append("no")
            reasons.append(format_reason(name, column, error))
    return cells, reasons


class Row(NamedTuple):
    """What was measured of one family."""

    cells: list[str]
    reasons: list[str]  # a line for each "no"


def measure(section: Section, wanted: list[str]) -> Iterator[tuple[str, Row]]:
    """Try the families of a section, or the wanted ones, and show each on screen."""
    # A fresh process for each family, because compilation keeps what it has compiled.
    pool = multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1)
    for name in section.families:
        if wanted and name not in wanted:
            continue
        start = time.time()
        row = Row(*pool.apply(try_family, (section.kind, name, section.columns)))
        seconds = f"{time.time() - start:6.1f} s"
        print(f"{name:28}", *(f"{cell:4}" for cell in row.cells), seconds, *row.reasons, flush=True)
        yield name, row


def write_section(section: Section, rows: dict[str, Row], page: Path = PAGE) -> None:
    """Write a section of the page: its families in their order, and the reasons below them."""
    titles = ["family", "builds", *section.columns]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    names = [name for name in section.families if name in rows]
    lines += [f"| `{name}` | " + " | ".join(rows[name].cells) + " |" for name in names]
    lines.append("")
    for name in names:
        lines += rows[name].reasons
    green = sum(not {"no", ""} & set(rows[name].cells) for name in names)
    made = MADE.format(**VERSIONS, green=green, tried=len(names), partner=section.partner)
    replace_section(section.heading, "\n".join([made, section.explanation, *lines]), page)


def read_rows(section: Section, page: Path = PAGE) -> dict[str, Row]:
    """The rows that the page has of a section.

    Raises:
        SystemExit: They were measured with other releases, or the checks were others.
    """
    text = find_section(section.heading, page)
    if not text:
        return {}
    titles = ["family", "builds", *section.columns]
    releases = "transformers {transformers} and torch {torch}".format(**VERSIONS)
    if f"| {' | '.join(titles)} |" not in text or releases not in text:
        sys.exit(
            f"the section {section.heading!r} of {page.name} was not measured with {releases} and"
            f" today's checks; measure all of it: python benchmarks/grid.py {section.argument}"
        )
    rows = {}
    for line in text.splitlines():
        name = line.split("`")[1] if line.startswith(("| `", "- `")) else ""
        if line.startswith("|") and name:
            rows[name] = Row([cell.strip() for cell in line.split("|")[2:-1]], [])
        elif name in rows:
            rows[name].reasons.append(line)
    return rows


def main() -> None:
    """Run the grid, and write docs/support.md unless single families were named."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = sys.argv[1:]
    updates = "--only" in arguments
    parts = {section.argument for section in SECTIONS} & set(arguments)
    wanted = [name for name in arguments if name not in {*parts, "--only"}]
    unknown = set(wanted) - set(LANGUAGE) - set(VISION)
    if unknown or (updates and not wanted):
        sys.exit(
            f"there is no family {', '.join(sorted(unknown)) or 'named'}; known are"
            f" {', '.join([*LANGUAGE, *VISION])}"
        )
    if not wanted:
        replace_section("", INTRODUCTION)
    for section in SECTIONS:
        if parts and section.argument not in parts:
            continue
        rows = read_rows(section) if updates else {}
        for name, row in measure(section, wanted):
            rows[name] = row
            if updates:
                write_section(section, rows)
        if not wanted:
            write_section(section, rows)


if __name__ == "__main__":
    main()
