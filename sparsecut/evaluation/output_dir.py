"""The output folder of an evaluation, and how an interrupted evaluation resumes from it.

settings.json is written first. predictions.jsonl gets one line for each answer, and images.jsonl
one for each with images. At the end their lines are sorted in the order of the questions.
result.json is written last. Other files of the folder are left alone.
"""

from __future__ import annotations

import json
import logging
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..chat_templates.thoughts import Answer
from ..data.examples import Example
from ..data.jsonl import append_json_lines, iterate_lines, parse_line, write_json_lines
from ..schema import UserError, read_json_file, write_text_file
from .answered_images import AnsweredImages
from .judging import get_answer, judge

SETTINGS = "settings.json"
PREDICTIONS = "predictions.jsonl"
RESULT = "result.json"
OWN_KEYS = {"weights", "versions"}  # at least one is in our settings and results
LATER_SETTINGS = ("weights_sum", "plan")  # which folders of old versions do not hold
TO_START_OVER = "start over (--fresh, resume=False)"
LINE_KEYS = {  # of a prediction -> what it may be
    "id": str,
    "prompt": str,
    "images": list,
    "prediction": str,
    "reference": str,
    "group": str | None,
    "level": str | None,
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputDir:
    """The output folder of an evaluation that is running.

    Attributes:
        folder: The folder.
        images: What is known of the images of answered questions.
    """

    folder: Path
    images: AnsweredImages

    def append(self, records: Sequence[dict], examples: Sequence[Example]) -> None:
        """Add the answers to some questions."""
        self.images.append(records, examples)  # first: every answer has its images there
        append_json_lines(self.folder / PREDICTIONS, records)

    def finish(self, records: list[dict], examples: Sequence[Example], result: dict) -> None:
        """Write all in the order of the questions, then the result."""
        self.images.write(records, examples)
        write_result(self.folder, records, result)


def open_output_dir(
    folder: Path,
    settings: dict,
    records: list[dict],
    examples: Sequence[Example],
    resume: bool,
) -> OutputDir:
    """Prepare the folder, and fill the records with the answers that it already holds.

    Args:
        folder: The output folder; it is made where it is missing.
        settings: Everything but the questions that answers depend on.
        records: The questions; answers are written into them.
        examples: Their examples.
        resume: Whether to take over answers. Otherwise the folder's answers are deleted.

    Raises:
        UserError: The folder holds files of something else under our names, or it has answers made
            with other settings, about other images, or to other questions.
    """
    check_ours(folder)
    file = folder / PREDICTIONS
    goes_on = resume and file.is_file()
    images = AnsweredImages(folder, is_new=not goes_on)
    if goes_on:
        _check_settings(folder, settings)
        _take_over_answers(file, records, settings["metric"])
        images.check(records, examples)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    write_json(folder / SETTINGS, settings)
    images.write(records, examples)
    answered = [record for record in records if record["prediction"] is not None]
    write_json_lines(file, answered)
    return OutputDir(folder, images)


def check_ours(folder: Path) -> None:
    """Raise UserError where files that an evaluation replaces are of something else."""
    present = [name for name in (SETTINGS, RESULT, PREDICTIONS) if (folder / name).exists()]
    if not present or any(_is_ours(folder / name) for name in present):
        return
    raise UserError(
        f"{folder} holds {' and '.join(present)} of something else than an evaluation, which would"
        " be replaced; give another output folder"
    )


def _is_ours(file: Path) -> bool:
    """Whether an evaluation wrote a file; an empty or broken one may be of an interrupted one."""
    try:
        if file.name != PREDICTIONS:
            return bool(OWN_KEYS & set(read_json_file(file)))
        first = next(iterate_lines(file), None)
        return first is None or {"prompt", "prediction"} <= set(parse_line(first[1]))
    except (UserError, OSError, TypeError):
        return False


def _take_over_answers(file: Path, records: list[dict], metric: str | None) -> None:
    """Fill the records with the answers of a file; UserError where it has others."""
    answers = {}
    for line in read_predictions(file):
        answers[_get_key(line)] = Answer(get_answer(line), line["prediction"])
    keys = [_get_key(record) for record in records]
    unknown = set(answers) - set(keys)
    if unknown:
        raise UserError(
            f"{file} holds {len(unknown)} answers to questions outside this evaluation, such as"
            f" {min(unknown)[0]!r}; give another output folder, ask the same questions, or"
            f" {TO_START_OVER}"
        )
    for record, key in zip(records, keys, strict=True):
        if key in answers:
            record |= judge(record, answers[key], metric)


def _get_key(record: dict) -> tuple:
    """What identifies a question: its id, its prompt and the names of its images."""
    return record["id"], record["prompt"], tuple(record["images"])


def _check_settings(folder: Path, settings: dict) -> None:
    """Raise UserError where the folder's answers were made with other settings."""
    file = folder / SETTINGS
    stored = {}
    if file.is_file():
        stored = read_json_file(file)
    as_stored = json.loads(json.dumps(settings))
    before = _flatten(stored)
    now = _flatten(as_stored)
    differences = []
    unknown = [name for name in LATER_SETTINGS if name in settings and name not in stored]
    if stored and unknown:
        logger.warning(
            "%s was written by a version that did not note %s, so it is not known whether it is the"
            " same",
            file,
            " and ".join(unknown),
        )
    for name in {**now, **before}:
        if name.partition(".")[0] in unknown:
            continue
        if before.get(name) == now.get(name):
            continue
        if name.startswith(("prompt_template", "plan.")):  # too long to print
            differences.append(name)
        else:
            differences.append(f"{name} ({before.get(name)!r} then, {now.get(name)!r} now)")
    if differences:
        raise UserError(
            f"{folder} holds answers made with another {' and another '.join(differences)}; give"
            f" another output folder, use the same settings, or {TO_START_OVER}"
        )


def _flatten(settings: dict) -> dict:
    """Settings with dotted keys in place of inner dictionaries."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                flat[f"{name}.{key}"] = inner
        else:
            flat[name] = value
    return flat


def read_predictions(file: Path, *, judged: bool = False) -> list[dict]:
    """The records of predictions.jsonl, without a last line that an interruption cut short.

    Args:
        file: predictions.jsonl.
        judged: Whether every answer must be known to be right or wrong.

    Raises:
        UserError: A line is not JSON, or no prediction.
    """
    records = []
    for number, line in iterate_lines(file, skip_partial=True):
        try:
            record = parse_line(line)
            _check_prediction(record, judged)
        except UserError as error:
            raise UserError(
                f"{file} line {number}: {error}; remove the line, or {TO_START_OVER}"
            ) from None
        records.append(record)
    return records


def _check_prediction(record, judged: bool) -> None:
    """Raise UserError where a line of predictions.jsonl is not what an evaluation writes."""
    if not isinstance(record, dict):
        raise UserError(f"a prediction is keys and values, but this is {str(record)[:40]!r}")
    for key, kind in LINE_KEYS.items():
        if key not in record or not isinstance(record[key], kind):
            raise UserError(f"{key} is {str(record.get(key))[:40]!r}, which no evaluation writes")
    names = [name for name in record["images"] if not isinstance(name, str)]
    if names:
        raise UserError(f"images has {str(names[0])[:40]!r}, which is no image's name")
    correct = record.get("correct")
    if judged and not (isinstance(correct, int | float) and 0 <= correct <= 1):
        raise UserError(
            f"correct is {str(correct)[:40]!r}, but only answers that are known to be right or"
            " wrong can be compared"
        )


def write_result(folder: Path, records: list[dict], result: dict) -> None:
    """Write the records in the order of the questions, then the result."""
    write_json_lines(folder / PREDICTIONS, records)
    write_json(folder / RESULT, result)


def write_json(file: Path, value, *, indent: int | None = 2) -> Path:
    """Write a JSON file, and return its path."""
    return write_text_file(file, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def get_versions() -> dict[str, str]:
    """Versions of the software that computed a result."""
    import torch  # reading results needs neither
    import transformers

    return {
        "sparsecut": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def get_command() -> str | None:
    """The command of sparsecut that this process runs; None where a script uses the library."""
    program = Path(sys.argv[0])
    if program.stem == "sparsecut" or program.parts[-2:] == ("sparsecut", "__main__.py"):
        return shlex.join(["sparsecut", *sys.argv[1:]])
    return None
