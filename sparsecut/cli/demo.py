"""The demo: the LLaVA baseline, two controls and SparseCut, trained alike, and one page about them.

The controls stand beside the claim because they explain much of it. `hires_channels` has the same
fine views but no shortcuts. `sparsecut_input` has the same encoder layers, but adds them all to the
input.
"""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from ..experiments.study import Study, load_study
from ..reports.demo import DemoVariant

VARIANTS = {  # of demo.yaml
    "llava": DemoVariant(
        "plain (LLaVA)", "one coarse view, the last block but one, into the input"
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


def run_demo(
    out: str | Path = "runs/demo", *, seed: int = 0, quick: bool = False, log=print
) -> Path:
    """Train and evaluate every variant, two at a time, and write a page about them.

    Args:
        out: Folder for images, models and report.html. Variants that are finished there are kept.
        seed: Draws the images, starts the fusion, and orders the batches.
        quick: A small part of everything, to see that it runs; its numbers mean nothing.
        log: Takes lines about the progress, and some answers at the end.

    Returns:
        The path of report.html.

    Raises:
        UserError: matplotlib is missing, or `out` holds a demo of another seed or size.
        ChildProcessError: A variant failed; the message has the end of its log.
    """
    from ..experiments.runner import run_study
    from ..reports.demo import print_answers, write_page
    from ..reports.figures import check_matplotlib

    check_matplotlib()
    start = time.monotonic()
    study = build_demo_study(out, seed, quick)
    run_study(study, log=log)
    minutes = (time.monotonic() - start) / 60
    page = write_page(study, VARIANTS, minutes, is_quick=quick)
    titles = {name: variant.title for name, variant in VARIANTS.items()}
    print_answers(study, titles, log)
    log(f"\n{minutes:.1f} minutes in all. The report with images, intervals and costs: {page}")
    return page


def build_demo_study(out: str | Path, seed: int = 0, quick: bool = False) -> Study:
    """The demo as a study: `seed` draws its images and is its one seed."""
    changes = [f"output={out}", f"pictures.seed={seed}", f"seeds=[{seed}]"]
    if quick:
        changes += ["pictures.train=64", "pictures.ask=64", "recipe.evaluate.data.keep=42"]
        changes += ["recipe.stages.0.args.max_steps=3", "recipe.stages.1.args.max_steps=4"]
    return load_study(str(files("sparsecut") / "experiments" / "demo.yaml"), changes)


@app.command()
def demo(
    out: Annotated[Path, option("Folder for images, models and the report.")] = Path("runs/demo"),
    seed: Annotated[
        int, option("Seed of the images, the fusion's start and the batches' order.")
    ] = 0,
    quick: Annotated[
        bool, option("Do a small part of everything, to see that it works.", "--quick")
    ] = False,
) -> None:
    """Train and compare four ways of fusion on drawn images, and write a report."""
    run(out, seed=seed, quick=quick)
