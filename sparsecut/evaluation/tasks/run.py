"""Run benchmark tasks: ask a model, in one process or several, and write the scores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...config.folder_lock import lock_folder
from ...data.examples import IMAGE, Example
from ...drawing import text_table
from ...schema import UserError, nearest, read_json_file
from ..exact_match import describe_drawn
from ..intervals import estimate_interval, list_images
from ..judging import get_answer
from ..output_dir import RESULT, check_ours, write_result
from .multiple_choice import MULTIPLE_CHOICE_TASKS
from .open_ended import OPEN_ENDED_TASKS
from .parts import read_parts
from .single_word import SINGLE_WORD_TASKS
from .task import MissingFileError, Question, Score, Task, TaskData

# In the order of the paper's table.
TASKS: dict[str, Task] = {
    "vqav2": OPEN_ENDED_TASKS["vqav2"],
    "gqa": SINGLE_WORD_TASKS["gqa"],
    "vizwiz": OPEN_ENDED_TASKS["vizwiz"],
    "scienceqa": MULTIPLE_CHOICE_TASKS["scienceqa"],
    "textvqa": OPEN_ENDED_TASKS["textvqa"],
    "pope": SINGLE_WORD_TASKS["pope"],
    "mme": SINGLE_WORD_TASKS["mme"],
    "mmbench": MULTIPLE_CHOICE_TASKS["mmbench"],
    "mmbench_cn": MULTIPLE_CHOICE_TASKS["mmbench_cn"],
    "seed": MULTIPLE_CHOICE_TASKS["seed"],
    "llava_bench": OPEN_ENDED_TASKS["llava_bench"],
    "mmvet": OPEN_ENDED_TASKS["mmvet"],
}


@dataclass(frozen=True)
class SelectedTask:
    """A task with its options, and its data.

    Attributes:
        name: A key of `TASKS`.
        options: The value of every option.
        data: The questions to ask.
        limit: About how many questions were selected; None for all.
    """

    name: str
    options: Mapping[str, str]
    data: TaskData
    limit: int | None = None

    @property
    def task(self) -> Task:
        """The task by its name."""
        return TASKS[self.name]

    @property
    def label(self) -> str:
        """The folder's name: the task and what is not the default, such as textvqa-ocr-off."""
        parts = [self.name]
        for key, value in self.options.items():
            default = self.task.options[key][0]
            if value != default:
                parts.append(f"{key}-{value}")
        if self.limit:
            parts.append(f"limit-{self.limit}")
        return "-".join(parts)


# ---- names and options


def parse_tasks(text: str) -> list[tuple[str, dict[str, str]]]:
    """Parse task names with options, such as "pope:split=random,textvqa:ocr=off".

    Args:
        text: Names with commas between them, or "all".

    Returns:
        (name, value of every option) of each task.

    Raises:
        UserError: A name, an option or a value does not exist, or a task is named twice.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError(f"no task is named; allowed are {', '.join(TASKS)}, or all")
    if parts == ["all"]:
        parts = list(TASKS)
    tasks = []
    for part in parts:
        task = _parse_task(part)
        if task in tasks:
            raise UserError(f"{part} is named twice; leave one out")
        tasks.append(task)
    return tasks


def _parse_task(text: str) -> tuple[str, dict[str, str]]:
    """(name, value of every option) of "name:key=value:key=value"."""
    name, *pairs = text.split(":")
    if name not in TASKS:
        raise UserError(
            f"there is no task {name!r}{nearest(name, TASKS)}; allowed are {', '.join(TASKS)}, or"
            " all"
        )
    allowed = TASKS[name].options
    options = {key: values[0] for key, values in allowed.items()}
    seen = set()
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in allowed:
            known = ", ".join(f"{k}={'|'.join(values)}" for k, values in allowed.items())
            raise UserError(
                f"{name} has no option {key!r}{nearest(key, allowed)}; its options are:"
                f" {known or 'none'}"
            )
        if key in seen:
            raise UserError(f"{text} gives {key} twice; give it once, or name the task twice")
        if value not in allowed[key]:
            raise UserError(
                f"{name}:{key} is {value!r}{nearest(value, allowed[key])}, but allowed are"
                f" {', '.join(allowed[key])}"
            )
        seen.add(key)
        options[key] = value
    return name, options


def parse_part(text: str | None) -> tuple[int, int]:
    """Parse which part of the questions this process answers.

    Args:
        text: Such as "2/4". None takes the process's rank among those that torchrun started.

    Returns:
        (index of the part, from 0; number of parts), which is (0, 1) for a single process.

    Raises:
        UserError: The text does not name a part.
    """
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    number, _, count = text.partition("/")
    is_valid = number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)
    if not is_valid:
        raise UserError(
            f"--part is {text!r}, but must be a number and the number of parts, as 1/4 to 4/4"
        )
    return int(number) - 1, int(count)


# ---- data


def read_tasks(text: str, root: str | Path, limit: int | None = None) -> list[SelectedTask]:
    """Read the data of tasks, and check that every image is there.

    Args:
        text: Names and options, as for `parse_tasks`.
        root: The folder with the benchmarks, LLaVA's playground/data/eval.
        limit: About how many questions of each task to select. The selection is the same for every
            model, and the questions of a unit stay together.

    Raises:
        UserError: A name or option does not exist, or a file is missing or broken.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; give --root, the folder that holds gqa/, pope/, textvqa/"
            " and so on"
        )
    selected = []
    for name, options in parse_tasks(text):
        data = _read_task(name, options, root)
        data = replace(data, questions=_select_questions(data.questions, limit))
        selected.append(SelectedTask(name, options, data, limit))
    for task in selected:
        for example in build_examples(task.data):
            example.check_images()
    return selected


def _read_task(name: str, options: Mapping[str, str], root: Path) -> TaskData:
    """The data of one task; UserError where a file is missing or broken."""
    try:
        return TASKS[name].read(root, options)
    except MissingFileError as error:
        raise UserError(
            f"{name} needs {error.path}, which is not there; {TASKS[name].source}"
            " (docs/benchmarks.md)"
        ) from None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        # The readers take the structure of the official files for granted.
        raise UserError(
            f"the files of {name} below {root} do not have the expected structure"
            f" ({type(error).__name__}: {error}); download them again"
        ) from error


def _select_questions(questions: Sequence[Question], limit: int | None) -> Sequence[Question]:
    """Whole units, in the order of a hash of their names, until there are enough questions."""
    if limit is None or limit >= len(questions):
        return questions
    units: dict[str, list[Question]] = {}
    for question in questions:
        name = question.unit or question.id
        units.setdefault(name, []).append(question)
    selected_ids: set[str] = set()
    for name in sorted(units, key=lambda name: hashlib.sha1(name.encode()).digest()):
        if len(selected_ids) >= limit:
            break
        selected_ids.update(question.id for question in units[name])
    return [question for question in questions if question.id in selected_ids]


def build_examples(data: TaskData) -> list[Example]:
    """The questions as examples, the image before the prompt as in the released scripts."""
    examples = []
    for question in data.questions:
        has_image = question.image is not None
        text = f"{IMAGE}\n{question.text}" if has_image else question.text
        example = Example(
            question.id,
            [question.image] if has_image else [],
            [
                {"role": "user", "content": text},
                {"role": "assistant", "content": question.reference},
            ],
            group=question.group,
            source=question.source,
            store=data.images,
        )
        examples.append(example)
    return examples


# ---- answers and scores


def run_task(
    model,
    processor,
    selected: SelectedTask,
    out: str | Path,
    *,
    part: tuple[int, int] = (0, 1),
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    resume: bool = True,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict | None:
    """Answer a part of a task's questions, and score the task once all parts are answered.

    The folder `out`/label gets predictions.jsonl (prompt, answer and score of each question) and
    result.json (scores, options, question files, settings, versions). It also gets the file to
    submit where the benchmark has a server. An interrupted run resumes.

    Args:
        model: A SparseCut model.
        processor: Its processor.
        selected: The task and its data.
        out: The folder that gets a folder for the task.
        part: (index, number of parts) of the questions; see `parse_part`.
        batch_size: Questions that are answered at once.
        max_new_tokens: The longest answer; None takes that of the released scripts.
        resume: Whether to reuse answers that are there.
        workers: Processes that prepare images.
        progress: Called with the number of answered questions and the number of all.

    Returns:
        What result.json holds, or None where other parts are not answered yet.

    Raises:
        UserError: As `evaluate`; or the parts do not belong together, or are too many.
    """
    folder = Path(out) / selected.label
    part_folders = _list_part_folders(folder, part[1])
    own_folder = part_folders[part[0]]
    examples = _select_part(selected, part)
    check_ours(folder)
    from ..evaluator import evaluate  # names and files of tasks are checked without a model library

    with lock_folder(own_folder):
        evaluate(
            model,
            processor,
            examples,
            out=own_folder,
            metric=None,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens or selected.task.max_new_tokens,
            resume=resume,
            workers=workers,
            progress=progress,
        )
        if not all((part_folder / RESULT).is_file() for part_folder in part_folders):
            return None
        return merge_parts(selected, folder, part_folders)


def _list_part_folders(folder: Path, count: int) -> list[Path]:
    """Where the answers of each part are: a task of one part has them in its own folder."""
    if count == 1:
        return [folder]
    return [folder / f"part-{i + 1}-of-{count}" for i in range(count)]


def _select_part(selected: SelectedTask, part: tuple[int, int]) -> list[Example]:
    """The examples of one part of a task; UserError where there is none for it."""
    index, count = part
    examples = build_examples(selected.data)[index::count]
    if not examples:
        raise UserError(
            f"{selected.label} has {len(selected.data.questions)} questions, too few for {count}"
            " processes; use fewer"
        )
    return examples


def merge_parts(selected: SelectedTask, folder: Path, part_folders: Sequence[Path]) -> dict:
    """Score the answers of all parts, and write predictions, submission and result.

    Raises:
        UserError: The parts were answered with different settings, about images that have changed
            since, or lack questions.
    """
    examples = build_examples(selected.data)
    records = read_parts(folder, part_folders, examples)
    answers = {record["id"]: get_answer(record) for record in records}
    task = selected.task
    score = None
    if task.score:
        score = task.score(selected.data, answers)
    for record in records:
        record["correct"] = None
        if score:
            record["correct"] = score.per_question[record["id"]]
    submission = []
    if task.submit and not selected.limit:
        submission = task.submit(selected.data, answers, folder)
    result = _build_result(selected, score, submission, records, part_folders[0])
    write_result(folder, records, result)
    return result


def _build_result(
    selected: SelectedTask,
    score: Score | None,
    submission: Sequence[Path],
    records: Sequence[dict],
    part_folder: Path,
) -> dict:
    """What result.json holds, with the settings of one part's result."""
    left_out = ("num_kept", "seconds", "metric", "num_examples")
    part_result = _read_json(part_folder / RESULT)
    settings = {key: value for key, value in part_result.items() if key not in left_out}
    hashes = {str(file): _hash_file(file) for file in selected.data.files}
    images = selected.data.images
    return {
        "task": selected.name,
        "title": selected.task.title,
        "options": dict(selected.options),
        "main": dict(score.main) if score else None,
        "share_right": _estimate_fraction(records) if score else None,
        "scores": score.details if score else None,
        "submission": [path.name for path in submission],
        **settings,
        "num_examples": len(records),
        "limit": selected.limit,
        "pictures": str(images.path) if images else None,
        "question_files": hashes,
    }


def _estimate_fraction(records: Sequence[dict]) -> dict:
    """The mean score of a question, 0 to 1, with its 95 % interval over images or questions."""
    values = [record["correct"] for record in records]
    return {"value": sum(values) / len(values), **estimate_interval(values, list_images(records))}


def _read_json(file: Path) -> dict:
    return read_json_file(file)


def _hash_file(file: Path) -> str:
    with file.open("rb") as data:
        return "sha256:" + hashlib.file_digest(data, "sha256").hexdigest()


def format_results(results: Sequence[dict]) -> str:
    """Results as a table of text: task, number of questions, and scores.

    A task that is scored elsewhere has the file to submit in place of scores.
    """
    rows = [("task", "questions", "scores")]
    for result in results:
        name = result["task"]
        for key, value in result["options"].items():
            name += f":{key}={value}"
        count = f"{result['num_examples']:,}"
        rows.append((name, count, _format_scores(result)))
    return text_table(rows, align="<><")


def _format_scores(result: dict) -> str:
    """The main scores as text, a single one with its interval."""
    main = result["main"]
    if not main:
        files = ", ".join(result["submission"])
        if files:
            return f"to be scored elsewhere: {files}"
        return "no score, and no file to submit for a selection of the questions"
    text = ", ".join(f"{name} {value:.2f}" for name, value in main.items())
    if len(main) == 1:
        low, high = result["share_right"]["interval"]
        over = describe_drawn(result["share_right"])
        text += f" ({100 * low:.1f} to {100 * high:.1f}, over {over})"
    return text
