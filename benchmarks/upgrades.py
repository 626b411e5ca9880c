"""Which pretrained VLMs can be upgraded: a tiny random model of each family, checked.

    python benchmarks/upgrades.py                  # all: two minutes; writes docs/support.md
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
from helpers import bases
from helpers.upgrade_checks import FAMILY_CHECKS
from support_page import format_reason, replace_section

from sparsecut.families import FAMILIES

HEADING = "Vision-language models that can be upgraded"
INTRODUCTION = """\
`make grid` made this section with transformers {transformers} and torch {torch}. It upgrades a tiny
random model of each family by the default plan. Other families are refused, and told why.

- *patches*: The number of patches under one image token, in models as small as these.
- *fine views*: Whether SparseCut cuts them, which needs one view of a fixed size per image. The
  other families ("own") have resolutions of their own.
- *tables*: The patches listed under a token are exactly those that its gradient reaches.
- *identity*: Before training, logits and greedy, beam and sampled answers equal the base's to the
  bit.
- *effect*: Random shortcuts change the answer. They do not change the text before an image, text
  without images, or the base itself.
- *cached = uncached*: Decoding with a cache equals decoding without, and prefill in chunks equals
  the whole. PaliGemma is tried in chunks only: it attends to the whole prompt in both directions.
  Gemma 3 is not tried in chunks: its images attend in both directions.
- *batch = single*: Each row of a left-padded batch has the answer that it has alone.
- *gradients*: A training step reaches every parameter of the fusion and none of the base.
- *loss*: With gradient accumulation, the loss is per token of the whole step.

Videos (`pixel_values_videos`) are refused: shortcuts read images only, and would add nothing to
frames. Give some frames as images.
"""


def try_family(name: str) -> tuple[list[str], list[str]]:
    """Run the checks on one family: cells ("yes" or "no"), and a sentence for each "no"."""
    cells = []
    reasons = []
    for column, check in FAMILY_CHECKS.items():
        try:
            check(name)
            cells.append("yes")
        except Exception as error:
            cells.append("no")
            reasons.append(format_reason(name, column, error))
    return cells, reasons


def main() -> None:
    """Try the families, and write the section unless single families were named."""
    wanted = sys.argv[1:] or list(bases.FAMILY_NAMES)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    titles = ["family", "patches", "fine views", *FAMILY_CHECKS]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    notes = []
    for name in wanted:
        cells, reasons = try_family(name)
        family = FAMILIES[name]
        model = bases.build_base(name)
        patches = str(family.patches_under(model))
        fine_views = "yes" if family.has_one_view(model) else "own"
        lines.append("| " + " | ".join([f"`{name}`", patches, fine_views, *cells]) + " |")
        notes += reasons
        print(lines[-1], *reasons, sep="\n", flush=True)
    if not sys.argv[1:]:
        versions = {
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
        }
        head = INTRODUCTION.format(**versions)
        replace_section(HEADING, "\n".join([head, *lines, "", *notes]))


if __name__ == "__main__":
    main()
