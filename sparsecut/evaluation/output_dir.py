"""The output folder of an evaluation, and how an interrupted evaluation resumes from it.

settings.json is written first. predictions.jsonl gets one line for each answer. At the end its
lines are sorted in the order of the questions. result.json is written last.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..data.errors import RecordError
from ..data.jsonl import read_json_lines, write_json_lines
from ..schema import UserError, read_json_file
from .exact_match import METRICS

SETTINGS = "settings.json"
PREDICTIONS = "predictions.jsonl"
RESULT = "result.json"


def judge(record: dict, answer: str, metric: str | None) -> dict:
    """The fields that an answer adds to a record: itself, and whether it is correct.

    Args:
        record: A line of predictions.jsonl, of which `reference` is read.
        answer: The model's answer.
        metric: A key of `exact_match.METRICS`. None leaves the answer unjudged.
    """
    correct = METRICS[metric](answer, record["reference"]) if metric else None
    return {"prediction": answer, "correct": correct}


def open_output_dir(folder: Path, settings: dict, records: list[dict], resume: bool) -> None:
    """Prepare the folder, and fill the records with the answers that it already holds.

    Args:
        folder: The output folder; it is made where it is missing.
        settings: Everything but the questions that answers depend on.
        records: The questions; answers are written into them.
        resume: Whether to take over answers. Otherwise the folder's answers are deleted.

    Raises:
        UserError: The folder has answers made with other settings or to other questions.
    """
    file = folder / PREDICTIONS
    if resume and file.is_file():
        _check_settings(folder, settings)
        _take_over_answers(file, records, settings["metric"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    write_json(folder / SETTINGS, settings)
    answered = [record for record in records if record["prediction"] is not None]
    write_json_lines(file, answered)


def _take_over_answers(file: Path, records: list[dict], metric: str | None) -> None:
    """Fill the records with the answers of a file; UserError where it has others."""
    answers = {_get_key(line): line["prediction"] for line in read_predictions(file)}
    keys = [_get_key(record) for record in records]
    unknown = set(answers) - set(keys)
    if unknown:
        raise UserError(
            f"{file} holds {len(unknown)} answers to questions outside this evaluation, such as"
            f" {min(unknown)[0]!r}; give another output folder, ask the same questions, or start"
            " over (--fresh, resume=False)"
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
    for name in {**now, **before}:
        if before.get(name) == now.get(name):
            continue
        if name == "prompt_template":  # too long to print
            differences.append(name)
        else:
            differences.append(f"{name} ({before.get(name)!r} then, {now.get(name)!r} now)")
    if differences:
        raise UserError(
            f"{folder} holds answers made with another {' and another '.join(differences)}; give"
            " another output folder, use the same settings, or start over (--fresh, resume=False)"
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


def read_predictions(file: Path) -> list[dict]:
    """The records of predictions.jsonl, without a last line that an interruption cut short.

    Raises:
        UserError: A line is not JSON.
    """
    try:
        return read_json_lines(file, skip_partial=True)
    except RecordError as error:
        raise UserError(
            f"{error}; remove the line, or start over (--fresh, resume=False)"
        ) from None


def write_result(folder: Path, records: list[dict], result: dict) -> None:
    """Write the records in the order of the questions, then the result."""
    write_json_lines(folder / PREDICTIONS, records)
    write_json(folder / RESULT, result)


def write_json(file: Path, value, *, indent: int | None = 2) -> Path:
    """Write a JSON file, and return its path."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
    return file
