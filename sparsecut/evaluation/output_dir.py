"""The output folder of an evaluation, and how an interrupted evaluation resumes from it.

settings.json is written first. predictions.jsonl gets one line for each question as it is answered,
and is put into the order of the questions at the end. result.json is written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..schema import UserError
from .scoring import METRICS

SETTINGS = "settings.json"
PREDICTIONS = "predictions.jsonl"
RESULT = "result.json"


def judge(record: dict, answer: str, metric: str | None) -> dict:
    """The fields that an answer adds to a record: itself, and whether it is correct.

    Args:
        record: A line of predictions.jsonl, of which `reference` is read.
        answer: The model's answer.
        metric: A key of `scoring.METRICS`. None leaves the answer unjudged.
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
    write_lines(file, answered, "w")


def _take_over_answers(file: Path, records: list[dict], metric: str | None) -> None:
    answers = {_get_key(line): line["prediction"] for line in read_lines(file)}
    unknown = set(answers) - {_get_key(record) for record in records}
    if unknown:
        raise UserError(
            f"{file} holds {len(unknown)} answers to questions that are not asked now, such as"
            f" {min(unknown)[0]!r}; give another output folder, ask the same questions, or start"
            " over (--fresh, resume=False)"
        )
    for record in records:
        key = _get_key(record)
        if key in answers:
            record |= judge(record, answers[key], metric)


def _get_key(record: dict) -> tuple:
    """What identifies a question: its id, its prompt and the names of its images."""
    return record["id"], record["prompt"], tuple(record["images"])


def _check_settings(folder: Path, settings: dict) -> None:
    """Raise UserError where the folder's answers were made with other settings."""
    file = folder / SETTINGS
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    before = _flatten(stored)
    now = _flatten(json.loads(json.dumps(settings)))
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
            flat.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            flat[name] = value
    return flat


def read_lines(file: Path) -> list[dict]:
    """The records of predictions.jsonl, without a last line that an interruption cut short.

    Raises:
        UserError: A line is not JSON.
    """
    # What follows the last newline is nothing, or half a line.
    lines = file.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UserError(
                f"{file} line {number} is not JSON; remove it, or start over (--fresh,"
                " resume=False)"
            ) from None
    return records


def write_lines(file: Path, records: Sequence[dict], mode: str) -> None:
    """Write records as JSON Lines, at the end of the file ("a") or in its place ("w")."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if mode == "a":
        with file.open("a", encoding="utf-8") as lines:
            lines.write(text)
        return
    # Replaced at once: an interruption leaves the old file or the new one.
    part = file.with_suffix(f".{os.getpid()}.part")  # each process has its own
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def write_json(file: Path, value: dict) -> None:
    """Write a value as indented JSON."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
