"""`sparsecut demo`: train four ways of fusion alike, and write one page about them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from .app import app, echo, option, output_folder
from .demo_display import describe_end, show_demo


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
        log: Takes lines about the progress where there is no terminal, and the results.

    Returns:
        The path of report.html.

    Raises:
        UserError: matplotlib is missing, or `out` holds a demo of another seed or size.
        StudyRunError: A variant failed; the message has the end of its error.
    """
    from ..experiments.demo import VARIANTS, build_demo_study, list_next_commands
    from ..experiments.runner import run_study
    from ..reports.demo import print_scores, write_page
    from ..reports.figures import check_matplotlib

    check_matplotlib()
    start = time.monotonic()
    study = build_demo_study(out, seed, quick)
    titles = {name: variant.title for name, variant in VARIANTS.items()}
    with show_demo(study, titles, log) as study_log:
        run_study(study, workers=workers, log=study_log)
    page = write_page(study, VARIANTS, is_quick=quick)
    print_scores(study, titles, log)
    minutes = (time.monotonic() - start) / 60
    log(f"{minutes:.1f} minutes in all.\n\n{describe_end(page, list_next_commands(study))}")
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
    run_demo(out, seed=seed, quick=quick, log=echo)
