"""What a benchmark asks: its questions, read from the folders that LLaVA's instructions make people
download.

The folders are those under `playground/data/eval` of LLaVA's docs/Evaluation.md, whose eval.zip holds question files with prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...data.images import Pictures
from ...data.jsonl import iterate_lines, parse_line
from ...schema import UserError

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
EVAL_ZIP = "extract LLaVA's eval.zip (docs/Evaluation.md of LLaVA links it) into the root folder"


@dataclass(frozen=True)
class Question:
    """One question as it is asked.

    id: unique in the task. text: the prompt, without the picture's place, which is before it.
    image: a name in the task's pictures, the bytes of a file, or None. facts: what the score or the
    submission needs of it. unit: questions of one unit are kept or left out together. reference:
    the right answer in words, where there is one. group: its kind. source: where it stands.
    """

    id: str
    text: str
    image: str | bytes | None
    facts: Mapping = field(default_factory=dict)
    unit: str = ""
    reference: str = ""
    group: str | None = None
    source: str = ""


@dataclass(frozen=True)
class TaskData:
    """What a task asks: questions, their pictures, the files that they came from, and what else the
    score needs.
    """

    questions: Sequence[Question]
    pictures: Pictures | None
    files: Sequence[Path]
    facts: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What a benchmark says of a model: main by name, in the unit that papers print; details; what
    each question is worth, 0 to 1.
    """

    main: Mapping[str, float]
    details: Mapping
    each: Mapping[str, float]


@dataclass(frozen=True)
class Task:
    """A benchmark: how its questions are read, and what becomes of the answers (by question id).

    score is None where the truth is not public or the score needs a judge, and may return None for
    some options; submit writes the official files into a folder and returns them. options: allowed
    values by name, the first is taken where none is named. The longest answer is that of the
    released scripts. source: where the files come from.
    """

    title: str
    read: Callable[[Path, Mapping[str, str]], TaskData]
    source: str
    score: Callable[[TaskData, Mapping[str, str]], Score | None] | None = None
    submit: Callable[[TaskData, Mapping[str, str], Path], list[Path]] | None = None
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_new_tokens: int = 128


class MissingFileError(ValueError):
    """A file of a benchmark is missing; the runner adds where to get it."""

    def __init__(self, path: Path):
        super().__init__(f"there is no {path}")
        self.path = path


def the_file(*places: Path) -> Path:
    """The first of some places that exists; NotThereError names the first where none does."""
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise MissingFileError(places[0])
    return found


def read_json(path: Path):
    """What a JSON file holds; ValueError where it is missing or broken."""
    try:
        return json.loads(the_file(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None


def read_lines(path: Path, *keys: str) -> list[dict]:
    """The records of a JSON Lines file, each with the keys asked for; ValueError names the line
    that is broken.
    """
    records = []
    for number, line in iterate_lines(the_file(path)):
        try:
            record = parse_line(line)
        except UserError as error:
            raise UserError(
                f"{path} line {number} is not JSON ({error}); download the file again"
            ) from None
        missing = [key for key in keys if not isinstance(record, dict) or key not in record]
        if missing:
            raise UserError(
                f"{path} line {number} has no {', '.join(missing)}; is it the file of this"
                " benchmark?"
            )
        records.append({**record, "source": f"{path.name} line {number}"})
    if not records:
        raise UserError(f"{path} holds no question; download it again")
    return records


def llava_questions(path: Path, **more: Callable[[dict], object]) -> list[Question]:
    """The questions of one of LLaVA's question files; more: fields of `Question`, each made from
    the record.

    `facts` holds question_id as it stands there. Ids that come again (TextVQA's are its pictures')
    get a number.
    """
    questions, seen = [], {}
    for record in read_lines(path, "question_id", "image", "text"):
        name = str(record["question_id"])
        seen[name] = seen.get(name, 0) + 1
        fields = {key: make(record) for key, make in more.items()}
        facts = {"question_id": record["question_id"], **fields.pop("facts", {})}
        unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
        source = record["source"]
        questions.append(
            Question(unique, record["text"], record["image"], facts, source=source, **fields)
        )
    return questions


def write_json(path: Path, value, *, indent: int | None = None) -> Path:
    """Write a JSON file and return its path."""
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
