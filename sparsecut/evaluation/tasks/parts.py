"""The parts of a benchmark that several processes answered, put together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...data.examples import Example
from ...schema import UserError, read_json_file
from ..answered_images import AnsweredImages
from ..output_dir import LATER_SETTINGS, PREDICTIONS, SETTINGS, read_predictions


def read_parts(
    folder: Path, part_folders: Sequence[Path], examples: Sequence[Example]
) -> list[dict]:
    """Return the records of all parts in the order of the questions.

    Args:
        folder: The task's folder.
        part_folders: Those of its parts, in order.
        examples: All questions.

    Raises:
        UserError: The parts were answered with different settings, about images that have changed
            since, or lack questions.
    """
    settings = [read_json_file(part_folder / SETTINGS) for part_folder in part_folders]
    shared = set.intersection(*map(set, settings))
    for one in settings:
        for name in set(LATER_SETTINGS) - shared:
            one.pop(name, None)
    if any(other != settings[0] for other in settings):
        raise UserError(
            f"the parts in {folder} were answered by different models or settings; give another"
            " output folder, or start over (--fresh)"
        )
    by_id = {}
    for i, part_folder in enumerate(part_folders):
        records = read_predictions(part_folder / PREDICTIONS)
        by_id |= {record["id"]: record for record in records}
        _check_images(part_folder, records, examples[i :: len(part_folders)])
    ids = [example.id for example in examples]
    missing = [key for key in ids if key not in by_id]
    if missing:
        raise UserError(
            f"the parts in {folder} hold no answer to {len(missing)} questions, such as"
            f" {missing[0]}, since some have other questions; start over (--fresh) with all"
            " parts, or give another output folder"
        )
    return [by_id[key] for key in ids]


def _check_images(folder: Path, records: Sequence[dict], examples: Sequence[Example]) -> None:
    """Raise UserError where images of a part's questions have changed since it was answered."""
    if [record["id"] for record in records] == [example.id for example in examples]:
        AnsweredImages(folder).check(records, examples)
