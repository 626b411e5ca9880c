"""The demo: plain fusion, two controls and SparseCut, trained alike on the picture world, and one
page about them.

The controls stand beside the claim because they explain much of it: `hires_channels` has the same fine views but no
shortcuts, `sparsecut_input` the same encoder layers but all of them added to the input.
"""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from ..experiments.study import Study, load_study
from .app import app, option

ARMS = {  # of demo.yaml: title and meaning
    "llava": ("plain (LLaVA)", "one coarse view, the last block but one, into the input"),
    "hires_channels": (
        "hi-res at the input",
        "control: plain fusion's block, with four fine views, into the input",
    ),
    "sparsecut_input": (
        "same taps at the input",
        "control: SparseCut's blocks and views, all into the input",
    ),
    "sparsecut": (
        "SparseCut",
        (
            "shallow blocks with fine views, the deepest into the input, the others before decoder"
            " layers"
        ),
    ),
}


def run(out: str | Path = "runs/demo", *, seed: int = 0, quick: bool = False, log=print) -> Path:
    """Draw pictures, train and evaluate every arm (two at a time), print some answers and write
    out/report.html.

    seed: draws the pictures, starts the fusion and orders the batches. quick: a small part of
    everything, to see that it runs; its figures mean nothing. Arms that are finished in `out` are
    kept. Returns the report's path; raises ValueError where `out` holds a demo of another seed or
    size, ChildProcessError with the end of an arm's log where one fails.
    """
    from ..experiments.runner import run_study
    from ..reports.demo import answer_aloud, write_page

    start, study = time.monotonic(), demo_study(out, seed, quick)
    run_study(study, log=log)
    minutes = (time.monotonic() - start) / 60
    page = write_page(study, ARMS, minutes)
    answer_aloud(study, ARMS, log)
    log(f"\n{minutes:.1f} minutes in all. The report with pictures, intervals and costs: {page}")
    return page


def demo_study(out: str | Path, seed: int = 0, quick: bool = False) -> Study:
    """The demo as a study: its pictures and its one seed are of `seed`."""
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
