"""What a benchmark task is, and how its questions are read from disk.

The folders are those that LLaVA's docs/Evaluation.md makes people download into
playground/data/eval. Its eval.zip holds the question files, prompts included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...data.access import Access
from ...data.errors import RecordError
from ...data.images import ImageStore
from ...data.jsonl import iterate_lines, parse_line
from ...schema import UserError, read_text_file

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
# People link parts of a benchmark's folders to where the images are.
TASK_ACCESS = Access(follows_links=True)
EVAL_ZIP = "extract LLaVA's eval.zip (docs/Evaluation.md of LLaVA links it) into the root folder"


@dataclass(frozen=True)
class Question:
    """One question, as the model gets it.

    Attributes:
        id: The question's name, unique in its task.
        text: The prompt without its image, which stands before it.
        image: A name among the task's images, the bytes of an image file, or None.
        facts: What the score or the submission needs to know about the question.
        unit: Questions of one unit are selected or left out together; empty for a unit of its own.
        reference: The right answer as text; empty where it is not known.
        group: The kind of question, or None.
        source: The question's place, such as "llava_test.jsonl line 3".
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
    """The data of a task.

    Attributes:
        questions: The questions, in order.
        images: Where the images are; None where the questions hold their bytes.
        files: The files that were read.
        facts: What the score or the submission needs besides the questions.
    """

    questions: Sequence[Question]
    images: ImageStore | None
    files: Sequence[Path]
    facts: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """How a benchmark scores a model.

    Attributes:
        main: The figures that papers print, by name and in the papers' unit.
        details: All figures.
        per_question: The score of every answer by the question's id, 0 to 1.
    """

    main: Mapping[str, float]
    details: Mapping
    per_question: Mapping[str, float]


@dataclass(frozen=True)
class Task:
    """A benchmark task. Answers are mappings from a question's id to the model's text.

    Attributes:
        title: The benchmark's name.
        read: Reads the task's data from the root folder, for some options.
        source: Where the files come from, for an error message.
        score: Scores answers. None where the truth is not public or a judge is needed; the
            function may return None for some options.
        submit: Writes the files that the benchmark's server takes into a folder, and returns them.
        options: Allowed values by name; the first value is the default.
        max_new_tokens: The longest answer in the released scripts, in tokens.
    """

    title: str
    read: Callable[[Path, Mapping[str, str]], TaskData]
    source: str
    score: Callable[[TaskData, Mapping[str, str]], Score | None] | None = None
    submit: Callable[[TaskData, Mapping[str, str], Path], list[Path]] | None = None
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_new_tokens: int = 128


class MissingFileError(UserError):
    """A benchmark's file is missing. `run.read_tasks` adds where to get it.

    Attributes:
        path: The missing file or folder.
    """

    def __init__(self, path: Path):
        super().__init__(f"there is no {path}")
        self.path = path


def find_file(*paths: Path) -> Path:
    """The first path that exists; MissingFileError names the first path where none does."""
    for path in paths:
        if path.exists():
            return path
    raise MissingFileError(paths[0])


def open_images(folder: Path) -> ImageStore:
    """The images in a folder of a benchmark."""
    return ImageStore(folder, TASK_ACCESS)


def read_json(path: Path):
    """The value of a JSON file.

    Raises:
        UserError: The file is missing or is not JSON.
    """
    text = read_text_file(find_file(path), "utf-8-sig")  # some editors begin a file with a mark
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None


def read_records(path: Path, *keys: str) -> list[dict]:
    """The records of a JSON Lines file, each with its place as `source`.

    Args:
        path: The file.
        keys: What every record must have.

    Raises:
        UserError: The file is missing or empty, or a line is not a record with these keys.
    """
    records = []
    for number, line in iterate_lines(find_file(path)):
        try:
            record = parse_line(line)
        except UserError as error:
            problem = f"{error}; download the file again"
            raise RecordError(f"{path} line {number}", problem) from None
        is_record = isinstance(record, dict)
        missing = [key for key in keys if not is_record or key not in record]
        if missing:
            problem = f"there is no {', '.join(missing)}; is it the file of this benchmark?"
            raise RecordError(f"{path} line {number}", problem)
        records.append({**record, "source": f"{path.name} line {number}"})
    if not records:
        raise UserError(f"{path} holds no question; download it again")
    return records


def read_llava_questions(path: Path, *, group_key: str | None = None) -> list[Question]:
    """The questions of one of LLaVA's question files.

    `facts` holds `question_id` as it stands there. An id that appears again (TextVQA's are those of
    its images) gets a number.

    Args:
        path: A JSON Lines file with question_id, image and text.
        group_key: The record's key that names the group.
    """
    questions = []
    counts: dict[str, int] = {}
    for record in read_records(path, "question_id", "image", "text"):
        name = str(record["question_id"])
        counts[name] = counts.get(name, 0) + 1
        question = Question(
            id=name if counts[name] == 1 else f"{name}#{counts[name]}",
            text=record["text"],
            image=record["image"],
            facts={"question_id": record["question_id"]},
            group=record.get(group_key) if group_key else None,
            source=record["source"],
        )
        questions.append(question)
    return questions
