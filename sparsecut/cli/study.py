"""`sparsecut study` and `sparsecut search`: many runs, described by one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..config.paths import check_writable_folder
from .app import app, argument, echo, option
from .completion import complete_shipped
from .early_checks import check_holds

Overrides = Annotated[
    list[str] | None, argument("Changes, such as seeds=[0,1] output=runs/study/b")
]
Workers = Annotated[int, option("Processes on this machine, one thread each.", min=1)]
NUM_PAIRS_SHOWN = 12
COMPLETE = complete_shipped("study")


@app.command()
def study(
    file: Annotated[
        Path, argument("A study file (YAML), or a name of `sparsecut recipes`.", complete=COMPLETE)
    ],
    overrides: Overrides = None,
    workers: Workers = 2,
    variants: Annotated[
        list[str] | None, option("Only this variant; may be repeated.", "--variant", "--arm")
    ] = None,
    seeds: Annotated[list[int] | None, option("Only this seed; may be repeated.", "--seed")] = None,
    report: Annotated[
        bool, option("Train nothing; report on the finished runs.", "--report")
    ] = False,
    dry_run: Annotated[
        bool, option("Count the runs and estimate their time; train nothing.", "--dry-run")
    ] = False,
) -> None:
    """Train and compare variants of fusion over seeds, and report; goes on where it stopped."""
    from ..experiments.study import load_study, narrow_study

    chosen = load_study(file, overrides or [])
    part = chosen
    if variants or seeds:
        part = narrow_study(chosen, variants or (), seeds or ())  # checks both
    if dry_run:
        from ..experiments.estimate import estimate_study, format_estimate

        echo(format_estimate(estimate_study(part), workers))
        return
    if report:
        check_holds(Path(chosen.output), ["study.yaml"], "give the output folder of a study")
    else:
        check_writable_folder(chosen.output)
        chosen.check_places()
    from ..reports.figures import check_matplotlib
    from ..reports.study import write_study_report

    check_matplotlib()
    if not report:
        from ..experiments.runner import run_study

        run_study(chosen, workers=workers, variants=variants or (), seeds=seeds or (), log=echo)

    page = write_study_report(chosen.output, chosen.questions)
    echo(
        f"\nThe report: {page}, with tables in {page.with_suffix('.md')} and numbers in"
        f" {page.with_suffix('.json')}"
    )


@app.command()
def search(
    file: Annotated[
        Path,
        argument(
            "A study file or a name of `sparsecut recipes`; its recipe, images and main budget are"
            " used, not its variants.",
            complete=COMPLETE,
        ),
    ],
    overrides: Overrides = None,
    count: Annotated[int | None, option("Maximum number of shortcuts.")] = None,
    ratio: Annotated[
        float | None, option("Maximum cost, in times the baseline's prefill FLOPs, such as 1.1.")
    ] = None,
    seeds: Annotated[
        list[int] | None,
        option("A seed of the supernet; may be repeated. Default: 0.", "--seed"),
    ] = None,
    rank: Annotated[int, option("Inner width of each pair's projector.", min=1)] = 8,
    penalty: Annotated[float, option("Weight of the gates' sizes in the loss.", min=0)] = 0.01,
    workers: Workers = 2,
    overwrite: Annotated[
        bool, option("Replace the plan of a search with another budget.", "--overwrite")
    ] = False,
) -> None:
    """Find a plan: train all pairs of tap and layer at once, keep the best few under a budget."""
    from ..experiments.study import load_study

    chosen = load_study(file, overrides or [])
    check_writable_folder(chosen.output)
    chosen.check_places()
    from ..drawing import draw
    from ..experiments.search import search_plan

    plan, pairs = search_plan(
        chosen,
        count=count,
        ratio=ratio,
        seeds=tuple(seeds or (0,)),
        rank=rank,
        penalty=penalty,
        workers=workers,
        overwrite=overwrite,
        log=echo,
    )
    vision_depth = max(pair["tap"] for pair in pairs)
    language_depth = max(pair["layer"] for pair in pairs) + 1
    echo(f"\n{draw(plan, vision_depth, language_depth, title='the chosen plan')}")
    echo("\nthe best pairs:")

    for pair in pairs[:NUM_PAIRS_SHOWN]:
        echo(
            f"  tap {pair['tap']:2} -> layer {pair['layer']:2}   importance {pair['worth']:.4f}"
            f"   gate {pair['gate']:.2f}"
        )

    echo(
        f"\nwrote {Path(chosen.output) / 'search' / 'plan.yaml'}; use it as a variant of a study,"
        " as a recipe's fusion, or with build --plan"
    )
