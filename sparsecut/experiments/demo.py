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
from .study_parts import Run

FINAL = "final"  # where training leaves a run's model
BATCH = "per_device_train_batch_size"


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


@dataclass(frozen=True)
class PublishedResult:
    """What one variant reached with five seeds, from docs/older-results.md, in per cent.

    Attributes:
        title: The name that the page shows.
        variant: The variant of the demo that it belongs to; None where the demo does not train it.
        average: The average over levels with its interval over images and seeds.
        above: Points above the baseline with their interval.
    """

    title: str
    variant: str | None
    average: str
    above: str


# `sparsecut study shapes rates=null`, five seeds. tests/reports/test_demo.py compares them.
FIVE_SEEDS = {  # by the study's name of a variant
    "llava": PublishedResult("LLaVA baseline", "llava", "58.0 (56.9 to 59.0)", "\N{EN DASH}"),
    "hires_channels": PublishedResult(
        "hi-res at the input", "hires_channels", "51.9 (49.1 to 54.8)", "-6.1 (-9.5 to -2.7)"
    ),
    "one_tap_at_input": PublishedResult(
        "one tap at the input", None, "83.7 (79.0 to 87.5)", "+25.8 (22.4 to 29.1)"
    ),
    "taps_at_input": PublishedResult(
        "same taps at the input", "sparsecut_input", "80.2 (76.2 to 84.7)", "+22.3 (18.9 to 25.6)"
    ),
    "sparsecut": PublishedResult(
        "SparseCut", "sparsecut", "83.3 (76.2 to 90.0)", "+25.4 (20.1 to 30.5)"
    ),
}
# SparseCut minus each control over the same five seeds; neither is clear of zero.
OVER_CONTROLS = {
    "taps_at_input": "+3.1 points (-0.6 to 6.7)",
    "one_tap_at_input": "-0.4 points (-7.6 to 6.9)",
}


def describe_five_seeds() -> str:
    """Return what five seeds say about the shortcuts themselves, beside both controls."""
    same, one = OVER_CONTROLS["taps_at_input"], OVER_CONTROLS["one_tap_at_input"]
    return (
        f"Over five seeds, SparseCut differs by {same} from the same taps at the input and by {one}"
        " from one tap at the input, so no gain of placing features deeper is shown."
    )


def describe_training(study: Study) -> str:
    """Return how much a study trains: its images, and the steps of each stage."""
    stages = [stage["args"] for stage in study.recipe["stages"]]
    steps = [f"{args['max_steps']} steps of {args[BATCH]}" for args in stages]
    return f"{study.pictures.train:,} images, {' and '.join(steps)}"


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


def list_next_commands(study: Study) -> dict[str, list[str]]:
    """Return commands to go on with after a demo: what each is for, and its words."""
    model = str(Run(study.main, "sparsecut", study.seeds[0]).get_folder(study.output) / FINAL)
    data = Path(study.output) / "data"
    records = f"{data / study.pictures.split}.json"
    image = str(data / study.pictures.split / "0.png")
    few = ["--limit", "40", "--max-new-tokens", "2"]
    return {
        "ask the trained model about an image": ["chat", model, image],
        "the same in the browser": ["serve", model, "--ui"],
        "what each shortcut contributes": ["explain", model, "--data", records, *few],
    }
