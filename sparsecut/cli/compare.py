"""`sparsecut compare` and `sparsecut explain`: what trained models do differently, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..config.paths import check_replaceable
from ..config.places import check_model_files, check_source_place
from ..schema import UserError, read_json_file
from ..shipped_model import name_model
from ..waits import show_step
from .app import (
    ColumnNames,
    DataKeys,
    Device,
    Dtype,
    File,
    SavedModel,
    Text,
    app,
    argument,
    echo,
    load_model,
    make_source,
    option,
    output_folder,
    parse_columns,
)


@app.command()
def explain(
    model: SavedModel,
    data: Annotated[Path, option("Questions: a file, a folder, or a hub data set (docs/data.md).")],
    images: Annotated[
        File, option("Folder or tar archive of the images; by default the data's folder.")
    ] = None,
    anywhere: Annotated[
        bool, option("Images may lie outside --images; only for data you trust.", "--anywhere")
    ] = False,
    source_keys: DataKeys = None,
    out: Annotated[File, output_folder("Folder for explain.html, .md and .json.")] = None,
    limit: Annotated[
        int | None, option("Maximum number of questions, a fixed random choice.", min=1)
    ] = None,
    batch_size: Annotated[int, option("Questions answered at once.", min=1)] = 64,
    max_new_tokens: Annotated[int, option("Longest answer, in tokens.", min=1)] = 16,
    maps: Annotated[
        int, option("Questions on the page with heat maps of where shortcuts look.", min=0)
    ] = 4,
    column: ColumnNames = None,
    device: Device = None,
    dtype: Dtype = "auto",
    overwrite: Annotated[
        bool, option("Replace what --out holds of another model.", "--overwrite")
    ] = False,
) -> None:
    """Measure what each shortcut of a trained model contributes: the accuracy without it."""
    if out is not None:
        check_replaceable(out, ["explain.*"], "explain.json: conditions, shortcuts")
        _check_same_model(out / "explain.json", model, overwrite)
    source = make_source(
        data,
        source_keys,
        images=images and str(images),
        keep=limit,
        anywhere=anywhere,
        columns=parse_columns(column),
    )
    check_source_place(source)
    check_model_files(model)
    from ..data.examples import read_source

    examples = read_source(source, [])
    from ..evaluation.ablation import explain
    from ..evaluation.mapped_questions import map_questions
    from ..reports.ablation import write_explanation, write_text

    loaded = load_model(model, device, dtype)
    explanation = explain(*loaded, examples, batch_size=batch_size, max_new_tokens=max_new_tokens)

    explanation["model"] = name_model(model)
    if out is not None:
        page = write_explanation(explanation, out)
    echo(write_text(explanation))
    if out is not None:
        if maps:
            with show_step("mapping") as progress:
                mapped = map_questions(
                    *loaded, examples, maps, max_new_tokens=max_new_tokens, progress=progress
                )
            write_explanation(explanation, out, *mapped)
        echo(f"\nThe page: {page}, with tables in explain.md and numbers in explain.json")


def _check_same_model(file: Path, model: str, overwrite: bool) -> None:
    """Raise UserError where a page about another model would be replaced."""
    if overwrite or not file.is_file():
        return
    earlier = read_json_file(file).get("model")
    if isinstance(earlier, str) and Path(earlier).resolve() != Path(model).resolve():
        raise UserError(
            f"{file} explains {earlier}, not {model}; give another --out, or add --overwrite to"
            " replace it"
        )


@app.command()
def compare(
    runs: Annotated[
        list[str],
        argument(
            "Folders of evaluations or training runs, or NAME=FOLDER; one name is one variant.",
            "RUN...",
        ),
    ],
    out: Annotated[Path, output_folder("Folder for the page, the table and the numbers.")] = Path(
        "runs/compare"
    ),
    images: Annotated[
        Text, option("Folder or tar archive of the images, where the runs' recipes name none.")
    ] = None,
    items: Annotated[int, option("Maximum number of differing items to show.", min=0)] = 24,
) -> None:
    """Compare finished evaluations: paired differences over the same items, and cost."""
    check_replaceable(out, ["compare.*"], "compare.json: baseline, runs")
    for run in runs:
        if not Path(run).exists() and not Path(run.partition("=")[2] or run).exists():
            raise UserError(
                f"there is no folder {run}; give folders of evaluations or training runs"
            )
    if images is not None and not Path(images).exists():
        raise UserError(
            f"there are no images at {images}; give a folder or tar archive as --images"
        )
    from ..drawing import text_table
    from ..experiments.compare import compare_runs, read_runs

    chosen = read_runs(runs)
    from ..reports.compare import make_main_table, write_comparison, write_notes
    from ..reports.figures import check_matplotlib
    from ..reports.verdicts import judge_comparison

    check_matplotlib()
    comparison = compare_runs(chosen, num_items=items)
    echo(judge_comparison(comparison))
    echo(f"\n{text_table(make_main_table(comparison))}\n")
    echo("\n".join(write_notes(comparison)))
    echo(f"wrote {write_comparison(out, chosen, comparison, images)}")
