"""The demo as a study: the LLaVA baseline, two controls and SparseCut, trained alike with one seed.

The controls stand beside the claim because they explain much of it. `hires_channels` has the same
fine views but no shortcuts. `sparsecut_input` has the same encoder layers, but adds them all to the
input.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from .study import Study, load_study


@dataclass(frozen=True)
class DemoVariant:
    """How the demo presents one of its variants.

    Attributes:
        title: The name that the page shows.
        meaning: What the variant is, in a few words.
    """

    title: str
    meaning: str


VARIANTS = {  # of demo.yaml
    "llava": DemoVariant(
        "LLaVA baseline", "one coarse view, the last block but one, into the input"
    ),
    "hires_channels": DemoVariant(
        "hi-res at the input", "control: LLaVA's block, with four fine views, into the input"
    ),
    "sparsecut_input": DemoVariant(
        "same taps at the input", "control: SparseCut's blocks and views, all into the input"
    ),
    "sparsecut": DemoVariant(
        "SparseCut",
        "shallow blocks with fine views; the deepest goes into the input, the others before decoder"
        " layers",
    ),
}


def build_demo_study(out: str | Path, seed: int = 0, quick: bool = False) -> Study:
    """Build the demo's study.

    Args:
        out: Its folder.
        seed: Draws the images, and is the study's one seed.
        quick: A small part of everything, to see that it runs.
    """
    changes = [f"output={out}", f"pictures.seed={seed}", f"seeds=[{seed}]"]
    if quick:
        changes += ["pictures.train=64", "pictures.ask=64", "recipe.evaluate.data.keep=42"]
        changes += ["recipe.stages.0.args.max_steps=3", "recipe.stages.1.args.max_steps=4"]
    return load_study(str(files("sparsecut") / "experiments" / "demo.yaml"), changes)
