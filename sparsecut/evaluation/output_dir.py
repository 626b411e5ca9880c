"""What an evaluation leaves in its folder, and how an interrupted one goes on from there.

settings.json is written first, predictions.jsonl gets one line per question as they come (put into the order of the questions at the
end), and result.json is written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..schema import UserError
from .scoring import METRICS

SETTINGS, PREDICTIONS, RESULT = "settings.json", "predictions.jsonl", "result.json"


def answered(record: dict, answer: str, metric: str | None) -> dict:
    """A record's answer, and whether it is right by a metric; None judges nothing."""
    return {
        "prediction": answer,
        "correct": METRICS[metric](answer, record["reference"]) if metric else None,
    }


def open_run(out: Path, settings: dict, records: list[dict], resume: bool) -> None:
    """Take over the answers that `out` has for these records, or begin there; ValueError where it
    holds another run.
    """
    file = out / PREDICTIONS
    if resume and file.is_file():
        _compare(out, settings)
        old = {_key(line): line for line in read_lines(file)}
        unknown = set(old) - {_key(record) for record in records}
        if unknown:
            raise UserError(
                f"{file} holds {len(unknown)} answers to questions that are not asked now, such as"
                f" {min(unknown)[0]!r}; give another output folder, ask the same questions, or"
                " start over (--fresh, resume=False)"
            )
        for record in records:
            if _key(record) in old:
                record |= answered(record, old[_key(record)]["prediction"], settings["metric"])
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULT).unlink(missing_ok=True)
    write_json(out / SETTINGS, settings)
    write_lines(file, [record for record in records if record["prediction"] is not None], "w")


def _compare(out: Path, settings: dict) -> None:
    """Raise ValueError unless the run in `out` had the same settings."""
    file = out / SETTINGS
    then = _flat(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    now = _flat(json.loads(json.dumps(settings)))
    differing = [name for name in {**now, **then} if then.get(name) != now.get(name)]
    if differing:
        told = [
            f"{n} ({then.get(n)!r} then, {now.get(n)!r} now)" if n != "prompt_template" else n
            for n in differing
        ]
        raise UserError(
            f"{out} holds answers made with another {' and another '.join(told)}; give another"
            " output folder, use the settings of then, or start over (--fresh, resume=False)"
        )


def _flat(settings: dict) -> dict:
    pairs = ((n, v if isinstance(v, dict) else {"": v}) for n, v in settings.items())
    return {f"{n}.{k}".rstrip("."): value for n, inner in pairs for k, value in inner.items()}


def _key(record: dict) -> tuple:
    return record["id"], record["prompt"], tuple(record["images"])


def read_lines(file: Path) -> list[dict]:
    """Records of a JSON Lines file; a last line that an interruption cut short is left out."""
    lines = file.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(
        lines[:-1], start=1
    ):  # what follows the last line end is nothing, or half a line
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UserError(
                f"{file} line {number} is not JSON; remove it, or start over (--fresh,"
                " resume=False)"
            ) from None
    return records


def write_lines(file: Path, records: Sequence[dict], mode: str) -> None:
    """Records as JSON Lines, appended ("a") or in place of the file ("w")."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if mode == "a":
        with file.open("a", encoding="utf-8") as lines:
            lines.write(text)
        return
    # Replaced at once, so that an interruption leaves the old file or the new one, and two
    # processes do not meet.
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def write_json(file: Path, value: dict) -> None:
    """A value as JSON that people can read."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
