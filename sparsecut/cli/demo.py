"""`sparsecut demo`: train four ways of fusion alike, and write one page about them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from .app import app, option, output_folder


def run_demo(
    out: str | Path = "runs/demo",
    *,
    seed: int = 0,
    quick: bool = False,
    workers: int = 2,
    log: Callable[[str], None] = print,
) -> Path:
    """Train and evaluate every variant of the demo, and write a page about them.

    Args:
        out: Folder for images, models and report.html. Finished variants there are reused.
        seed: Draws the images, starts the fusion, and orders the batches.
        quick: A small part of everything, to see that it runs; its numbers mean nothing.
        workers: Processes on this machine; 0 runs everything in this one.
        log: Takes lines about the progress, and some answers at the end.

    Returns:
        The path of report.html.

    Raises:
        UserError: matplotlib is missing, or `out` holds a demo of another seed or size.
        StudyRunError: A variant failed; the message has the end of its error.
    """
    from ..experiments.demo import VARIANTS, build_demo_study
    from ..experiments.runner import run_study
    from ..reports.demo import print_answers, write_page
    from ..reports.figures import check_matplotlib

    check_matplotlib()
    start = time.monotonic()
    study = build_demo_study(out, seed, quick)
    run_study(study, workers=workers, log=log)
    minutes = (time.monotonic() - start) / 60
    page = write_page(study, VARIANTS, is_quick=quick)
    titles = {name: variant.title for name, variant in VARIANTS.items()}
    print_answers(study, titles, log)
    log(f"\n{minutes:.1f} minutes in all. The report with images, intervals and costs: {page}")
    return page


@app.command()
def demo(
    out: Annotated[Path, output_folder("Folder for images, models and the report.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[
        int, option("Seed of the images, the fusion's start and the batches' order.")
    ] = 0,
    quick: Annotated[
        bool, option("Do a small part of everything, to see that it works.", "--quick")
    ] = False,
) -> None:
    """Train and compare four ways of fusion on drawn images, and write a report."""
    run_demo(out, seed=seed, quick=quick)
