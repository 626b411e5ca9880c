"""Which vision-language models can be upgraded: a tiny random one of each family, checked; a table
in docs/support.md.

    python benchmarks/upgrades.py                  # every family, about a minute
    python benchmarks/upgrades.py llava gemma3     # some of them, on screen only

The checks are those of tests/helpers/upgrade_checks.py.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from grid import reason
from helpers import bases
from helpers.upgrade_checks import FAMILY_CHECKS
from support_page import replace_section

from sparsecut.families import FAMILIES

HEADING = "Vision-language models that can be upgraded"
COLUMNS = {name: check for name, check in FAMILY_CHECKS.items() if name != "loss"}
INTRODUCTION = """\
Made by `make grid` with transformers {transformers} and torch {torch}: a tiny random model of each family, upgraded by the default plan.
Others are refused by name.

- *patches*: how many lie under one image token, in a model as small as these; read from the model
- *finer views*: cut by us where a base has one view of a fixed size; the others bring their own resolutions
- *tables*: the patches listed under a token are exactly those that its gradient reaches
- *identity*: logits, greedy, beam and sampled answers are the base's to the last bit before training
- *effect*: random shortcuts change the answer, not the words before a picture, not words alone, and not the base by itself
- *cached = uncached*: decoding, and prompts in chunks (not PaliGemma, whose prefix looks both ways, nor Gemma 3's pictures in chunks)
- *batch = single*: each row of a left-padded batch answers as alone
- *gradients*: a training step reaches every parameter of the fusion and none of the base's

Videos go through the base alone: shortcuts read pictures only.
"""


def try_family(name: str) -> tuple[list[str], list[str]]:
    """Cells of a family, and a sentence for each "no"."""
    cells, reasons = [], []
    for column, check in COLUMNS.items():
        try:
            check(name)
            cells.append("yes")
        except Exception as error:
            cells.append("no")
            reasons.append(f"- `{name}`: {column}: {reason(error)}")
    return cells, reasons


def main() -> None:
    """Try the families and write the section, unless only some were named."""
    wanted = sys.argv[1:] or list(bases.FAMILY_NAMES)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    lines = [
        "| family | patches | finer views | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    reasons = []
    for name in wanted:
        cells, found = try_family(name)
        family, model = FAMILIES[name], bases.build_base(name)
        facts = [
            f"`{name}`",
            str(family.patches_under(model)),
            "yes" if family.has_one_view(model) else "own",
        ]
        lines.append("| " + " | ".join([*facts, *cells]) + " |")
        reasons += found
        print(lines[-1], *found, sep="\n")
    if not sys.argv[1:]:
        head = INTRODUCTION.format(
            transformers=transformers.__version__, torch=torch.__version__.split("+")[0]
        )
        replace_section(HEADING, "\n".join([head, *lines, "", *reasons]))


if __name__ == "__main__":
    main()
