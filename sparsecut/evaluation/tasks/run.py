"""Ask a model the questions of benchmarks, on one process or several, and write what the benchmarks
say of the answers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...data.examples import IMAGE, Example
from ...data.jsonl import write_json_lines
from ...schema import UserError, nearest
from ..evaluator import evaluate
from ..output_dir import PREDICTIONS, RESULT, SETTINGS, read_lines, write_json
from ..scoring import Z95, wilson_interval
from .multiple_choice import CHOICE_TASKS
from .open_ended import TEXT_TASKS
from .single_word import WORD_TASKS
from .task import MissingFileError, Question, Score, Task, TaskData

TASKS: dict[str, Task] = {
    name: {**TEXT_TASKS, **WORD_TASKS, **CHOICE_TASKS}[name]
    for name in (
        *("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn"),
        *("seed", "llava_bench", "mmvet"),
    )
}


@dataclass(frozen=True)
class Chosen:
    """A task with its options, and what it asks of the files below a root folder."""

    name: str
    options: Mapping[str, str]
    asked: TaskData
    limit: int | None = None

    @property
    def task(self) -> Task:
        """What the name means."""
        return TASKS[self.name]

    @property
    def label(self) -> str:
        """The name and the options that are not the first ones, as a folder is called:
        textvqa-ocr-off.
        """
        own = [f"{k}-{v}" for k, v in self.options.items() if v != self.task.options[k][0]]
        return "-".join([self.name, *own, *([f"limit-{self.limit}"] if self.limit else [])])


def parse_tasks(text: str) -> list[tuple[str, dict[str, str]]]:
    """Names with options as typed, "pope:split=random,textvqa:ocr=off", each with all its options;
    "all" is every task.

    Raises ValueError for a name, an option or a value that does not exist, and for a task that is
    asked twice.
    """
    typed = [part.strip() for part in text.split(",") if part.strip()]
    typed = list(TASKS) if typed == ["all"] else typed
    if not typed:
        raise UserError(f"no task is named; allowed are {', '.join(TASKS)}, or all")
    found = []
    for part in typed:
        name, *pairs = part.split(":")
        if name not in TASKS:
            raise UserError(
                f"there is no task {name!r}{nearest(name, TASKS)}; allowed are {', '.join(TASKS)},"
                " or all"
            )
        options = {key: values[0] for key, values in TASKS[name].options.items()}
        keys = [pair.partition("=")[0] for pair in pairs]
        if twice := [key for key in options if keys.count(key) > 1]:
            raise UserError(f"{part} says {twice[0]} twice; say it once, or name the task twice")
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key not in options:
                known = (
                    ", ".join(f"{k}={'|'.join(v)}" for k, v in TASKS[name].options.items())
                    or "none"
                )
                raise UserError(
                    f"{name} has no option {key!r}{nearest(key, options)}; its options are: {known}"
                )
            if value not in TASKS[name].options[key]:
                allowed = TASKS[name].options[key]
                raise UserError(
                    f"{name}:{key}={value} is not known{nearest(value, allowed)}; allowed are"
                    f" {', '.join(allowed)}"
                )
            options[key] = value
        if (name, options) in found:
            raise UserError(f"{part} is named twice; leave one out")
        found.append((name, options))
    return found


def read_tasks(text: str, root: str | Path, limit: int | None = None) -> list[Chosen]:
    """The tasks named, their files read and their pictures looked for, so that what is missing is
    told before anything is asked.

    limit: at most about so many questions of each, a choice that is the same for every model; what
    belongs together stays together.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}; give --root, the folder that holds gqa/, pope/, textvqa/"
            " and so on"
        )
    chosen = []
    for name, options in parse_tasks(text):
        try:
            asked = TASKS[name].read(root, options)
        except MissingFileError as error:
            raise UserError(
                f"{name} needs {error.path}, which is not there; {TASKS[name].source}"
                " (docs/benchmarks.md)"
            ) from None
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise UserError(
                f"the files of {name} below {root} are not what they should be"
                f" ({type(error).__name__}: {error}); download them again"
            ) from error
        chosen.append(
            Chosen(name, options, replace(asked, questions=_limited(asked.questions, limit)), limit)
        )
    for one in chosen:
        for example in examples_of(one.asked):
            example.check_pictures()
    return chosen


def _limited(questions: Sequence[Question], limit: int | None) -> Sequence[Question]:
    """Whole units, in the order of a hash of their names, until there are enough questions."""
    if limit is None or limit >= len(questions):
        return questions
    units: dict[str, int] = {}
    for q in questions:
        units[q.unit or q.id] = units.get(q.unit or q.id, 0) + 1
    kept, total = set(), 0
    for unit in sorted(units, key=lambda name: hashlib.sha1(name.encode()).digest()):
        if total >= limit:
            break
        kept.add(unit)
        total += units[unit]
    return [q for q in questions if (q.unit or q.id) in kept]


def examples_of(asked: TaskData) -> list[Example]:
    """The questions as they are put to a model: the picture before the prompt, as the released
    scripts do.
    """
    return [
        Example(
            q.id,
            [] if q.image is None else [q.image],
            [
                {"role": "user", "content": q.text if q.image is None else f"{IMAGE}\n{q.text}"},
                {"role": "assistant", "content": q.reference},
            ],
            group=q.group,
            source=q.source,
            store=asked.pictures,
        )
        for q in asked.questions
    ]


def part_of(text: str | None) -> tuple[int, int]:
    """(number from 0, how many) of "2/4", or of this process among those that torchrun started; (0,
    1) where there is one.
    """
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    number, _, many = text.partition("/")
    if not (number.isdigit() and many.isdigit() and 1 <= int(number) <= int(many)):
        raise UserError(
            f"--part is {text!r}, but must be a number of a number of parts, as 1/4 to 4/4"
        )
    return int(number) - 1, int(many)


def run_task(
    model,
    processor,
    chosen: Chosen,
    out: str | Path,
    *,
    part: tuple[int, int] = (0, 1),
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    resume: bool = True,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict | None:
    """Ask a part of a task's questions into `out`/label; the result once all parts are answered, or
    None.

    An interrupted run goes on where it stopped. The folder holds predictions.jsonl (prompt, answer
    and worth of each question), result.json (scores, options, prompts' files, decoding settings,
    versions) and, where there is one, the official submission.
    max_new_tokens: None for what the released scripts allow. Raises ValueError as `evaluate` does.
    """
    number, many = part
    folder = Path(out) / chosen.label
    place = folder if many == 1 else folder / f"part-{number + 1}-of-{many}"
    longest = max_new_tokens or chosen.task.max_new_tokens
    examples = examples_of(chosen.asked)[number::many]
    if not examples:
        raise UserError(
            f"{chosen.label} asks {len(chosen.asked.questions)} questions, too few for {many}"
            " processes; use fewer"
        )
    settings = {
        "batch_size": batch_size,
        "max_new_tokens": longest,
        "resume": resume,
        "workers": workers,
        "progress": progress,
    }
    evaluate(model, processor, examples, out=place, metric=None, **settings)
    if many == 1:
        return finish(chosen, folder, [place])
    places = [folder / f"part-{i + 1}-of-{many}" for i in range(many)]
    return (
        finish(chosen, folder, places) if all((one / RESULT).is_file() for one in places) else None
    )


def finish(chosen: Chosen, folder: Path, places: Sequence[Path]) -> dict:
    """Put the parts' answers together, score them, and write predictions, submission and result
    into the folder.
    """
    settings = [json.loads((place / SETTINGS).read_text(encoding="utf-8")) for place in places]
    if any(one != settings[0] for one in settings):
        raise UserError(
            f"the parts in {folder} were answered by different models or settings; give another"
            " output folder, or start over (--fresh)"
        )
    said = {line["id"]: line for place in places for line in read_lines(place / PREDICTIONS)}
    if missing := [q.id for q in chosen.asked.questions if q.id not in said]:
        raise UserError(
            f"the parts in {folder} hold no answer to {len(missing)} questions, such as"
            f" {missing[0]}: some were asked other questions; start over (--fresh) with all parts,"
            " or give another output folder"
        )
    lines = [said[q.id] for q in chosen.asked.questions]
    answers = {line["id"]: line["prediction"] for line in lines}
    score = chosen.task.score(chosen.asked, answers) if chosen.task.score else None
    lines = [{**line, "correct": score.each[line["id"]] if score else None} for line in lines]
    submitted = (
        chosen.task.submit(chosen.asked, answers, folder)
        if chosen.task.submit and not chosen.limit
        else []
    )
    first = json.loads((places[0] / RESULT).read_text(encoding="utf-8"))
    result = {
        "task": chosen.name,
        "title": chosen.task.title,
        "options": dict(chosen.options),
        "main": dict(score.main) if score else None,
        "share_right": _share(score),
        "scores": score.details if score else None,
        "submission": [path.name for path in submitted],
        **{
            k: v
            for k, v in first.items()
            if k not in ("num_kept", "seconds", "metric", "num_examples")
        },
        "num_examples": len(lines),
        "limit": chosen.limit,
        "pictures": str(chosen.asked.pictures.path) if chosen.asked.pictures else None,
        "question_files": {str(file): _digest(file) for file in chosen.asked.files},
    }
    write_json_lines(folder / PREDICTIONS, lines)
    write_json(folder / RESULT, result)
    return result


def _share(score: Score | None) -> dict | None:
    """Mean worth of a question with its 95 % interval over questions, as shares of 1."""
    if score is None:
        return None
    values = list(score.each.values())
    mean = sum(values) / len(values)
    if set(values) <= {0, 1}:
        return {"value": mean, "interval": wilson_interval(round(sum(values)), len(values))}
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values))
    return {
        "value": mean,
        "interval": [max(0.0, mean - Z95 * spread), min(1.0, mean + Z95 * spread)],
    }


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return "sha256:" + hashlib.file_digest(data, "sha256").hexdigest()


def table(results: Sequence[dict]) -> str:
    """Results as lines of text: task, number of questions, scores, and the file to submit where the
    score is given elsewhere.
    """
    rows = [("task", "questions", "scores")]
    for one in results:
        options = "".join(f":{key}={value}" for key, value in one["options"].items())
        scores = ", ".join(f"{name} {value:.2f}" for name, value in (one["main"] or {}).items())
        if one["share_right"] and len(one["main"]) == 1:
            low, high = (100 * bound for bound in one["share_right"]["interval"])
            scores += f" ({low:.1f} to {high:.1f})"
        files = ", ".join(one["submission"])
        if not scores:
            scores = (
                f"to be scored elsewhere: {files}"
                if files
                else "no score and no file of a part of the questions"
            )
        rows.append((one["task"] + options, f"{one['num_examples']:,}", scores))
    width = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(
        f"{name:{width[0]}}  {number:>{width[1]}}  {scores}" for name, number, scores in rows
    )
