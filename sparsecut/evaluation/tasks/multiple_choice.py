"""ScienceQA, MMBench (English and Chinese) and SEED-Bench, which ask for an option's letter."""

from __future__ import annotations

import base64
import binascii
import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ...data.images import Pictures
from ...data.jsonl import write_json_lines
from ...schema import UserError
from .multiple_choice_metrics import LETTERS, ROTATIONS, is_empty, mmbench, scienceqa, seed
from .task import (
    EVAL_ZIP,
    LETTER,
    Question,
    Score,
    Task,
    TaskData,
    llava_questions,
    read_json,
    the_file,
)

LETTER_CN = "\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002"
SHORTEST_PICTURE = (
    64  # characters of base64; a shorter cell is the index of the row that holds the picture
)
DROPPED = (
    "hint",
    "category",
    "source",
    "image",
    "comment",
    "l2-category",
)  # columns that a submission leaves out


def read_scienceqa(root: Path, options: Mapping[str, str]) -> TaskData:
    """The test split, or its questions with a picture."""
    folder = root / "scienceqa"
    file, truth, splits = (
        folder / "llava_test_CQM-A.json",
        folder / "problems.json",
        folder / "pid_splits.json",
    )
    problems, test = read_json(truth), set(read_json(splits)["test"])
    questions = []
    for number, one in enumerate(read_json(file)):
        key, source = str(one["id"]), f"{file.name} record {number}"
        if key not in problems or key not in test:
            raise UserError(
                f"{source} asks problem {key}, which is not of the test split in {folder}; download"
                " again"
            )
        text = one["conversations"][0]["value"].replace("<image>", "").strip()
        problem, image = problems[key], one.get("image")
        if image is None and options["part"] == "image":
            continue
        facts = {"problem": problem}
        right = LETTERS[problem["answer"]]
        questions.append(
            Question(key, f"{text}\n{LETTER}", image, facts, "", right, problem["subject"], source)
        )
    return TaskData(
        questions, Pictures(the_file(folder / "images" / "test")), [file, truth, splits]
    )


def score_scienceqa(asked: TaskData, answers: Mapping[str, str]) -> Score:
    """Accuracy of questions with a picture (the paper's ScienceQA-IMG) and of all, in per cent."""
    problems = {q.id: q.facts["problem"] for q in asked.questions}
    shown = {q.id: "<image>" if q.image is not None else "" for q in asked.questions}
    said = [
        {"question_id": q.id, "text": answers[q.id], "prompt": shown[q.id]} for q in asked.questions
    ]
    found = scienceqa(problems, said)
    read = found["llava"].pop("parsed_index")
    main = {
        "image accuracy": found["llava"]["img_accuracy"],
        "accuracy": found["llava"]["accuracy"],
    }
    each = {key: float(read[key] == problem["answer"]) for key, problem in problems.items()}
    return Score({name: value for name, value in main.items() if value is not None}, found, each)


def read_mmbench(
    root: Path, options: Mapping[str, str], *, names: Mapping[str, str], last: str
) -> TaskData:
    """All rows of the table, rotations too, or with circular=off the first of each question."""
    import pandas

    name = names[options["split"]]
    if options["split"] == "test" and importlib.util.find_spec("openpyxl") is None:
        raise UserError(
            "answers to MMBench's test split are submitted as .xlsx; install openpyxl"
            " (sparsecut[tasks]) first"
        )
    file = the_file(root / "mmbench" / name, root / "mmbench_cn" / name)
    # As text, and with pandas' own idea of empty cells: it is what the released script reads,
    # "None" and "NA" included.
    try:
        rows = pandas.read_table(file, dtype=str).to_dict("records")
    except ValueError as error:  # pandas' own are such
        raise UserError(f"{file} cannot be read as a table ({error}); download it again") from None
    missing = [
        column for column in ("index", "question", "A", "image") if column not in (rows or [{}])[0]
    ]
    if missing:
        raise UserError(
            f"{file} has no column {', '.join(missing)}; is it MMBench's table? download it again"
        )
    if odd := [row["index"] for row in rows if not str(row["index"]).isdigit()]:
        raise UserError(
            f"{file} has a row whose index is {odd[0]!r}, no number; its columns are out of place:"
            " download it again"
        )
    pictures = {row["index"]: row["image"] for row in rows}
    if options["circular"] == "off":
        rows = [row for row in rows if int(row["index"]) < ROTATIONS]
    elif all(int(row["index"]) < ROTATIONS for row in rows):
        raise UserError(
            f"{file} holds no rotated rows (index over a million); ask each once, as circular=off"
        )
    questions = []
    for row in rows:
        source = f"{file.name} index {row['index']}"
        unit, kind = str(int(row["index"]) % ROTATIONS), row.get("category")
        facts = {key: value for key, value in row.items() if key != "image" and not is_empty(value)}
        truth = facts.get("answer", "")
        text, picture = _mmbench_text(row, last), _picture(row, pictures, source)
        questions.append(Question(row["index"], text, picture, facts, unit, truth, kind, source))
    return TaskData(
        questions, None, [file], {"circular": options["circular"] == "on", "columns": list(rows[0])}
    )


def _mmbench_text(row: Mapping, last: str) -> str:
    """Hint, question and the options A to D up to the first empty one, as model_vqa_mmbench.py
    writes them.
    """
    hint = row.get("hint")
    lines = [] if is_empty(hint) or hint.lower() in ("nan", "none") else [hint]
    lines.append(row["question"])
    for letter in "ABCD":
        option = row.get(letter)
        if is_empty(option) or option.lower() in ("nan", "none"):
            break
        lines.append(f"{letter}. {option}")
    return "\n".join([*lines, last])


def _picture(row: Mapping, pictures: Mapping[str, str], source: str) -> bytes:
    """The bytes of a row's picture; a short cell names the row that has it."""
    cell = row["image"]
    if not is_empty(cell) and len(cell) < SHORTEST_PICTURE:
        cell = pictures.get(cell)
    try:
        return base64.b64decode(cell, validate=True)
    except (TypeError, binascii.Error):
        raise UserError(f"{source} has no picture in base64; download the table again") from None


def score_mmbench(asked: TaskData, answers: Mapping[str, str]) -> Score | None:
    """Circular accuracy, or plain accuracy of the first rows, in per cent; None where the table has
    no answers (test split).
    """
    if not all("answer" in q.facts for q in asked.questions):
        return None
    rows = [q.facts for q in asked.questions]
    found = mmbench(rows, [answers[q.id] for q in asked.questions])
    read = found.pop("inferred")
    each = {q.id: float(r == q.facts["answer"]) for q, r in zip(asked.questions, read, strict=True)}
    plain = {"plain accuracy": 100 * found["vanilla_accuracy"]}
    if not asked.facts["circular"]:
        return Score(
            plain,
            {
                "vanilla_accuracy": found["vanilla_accuracy"],
                "by_category": found["circular_accuracy"],
            },
            each,
        )
    return Score(
        {"circular accuracy": 100 * found["circular_accuracy"]["Overall"], **plain}, found, each
    )


def submit_mmbench(asked: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """The table that MMBench's server takes: the rows with a column `prediction`, as .xlsx, which
    needs the package openpyxl.
    """
    import pandas

    if importlib.util.find_spec("openpyxl") is None:
        return []
    columns = [name for name in asked.facts["columns"] if name not in DROPPED]
    rows = pandas.DataFrame(
        [{name: q.facts.get(name) for name in columns} for q in asked.questions]
    )
    rows["index"] = rows["index"].astype(int)
    rows.insert(min(6, len(columns)), "prediction", [answers[q.id] for q in asked.questions])
    path = folder / "mmbench_submission.xlsx"
    rows.to_excel(path, index=False, engine="openpyxl")
    return [path]


def read_seed(root: Path, options: Mapping[str, str]) -> TaskData:
    """SEED-Bench: pictures, the middle frames of videos, or both."""
    folder = root / "seed_bench"
    file, truth = folder / "llava-seed-bench.jsonl", folder / "SEED-Bench.json"
    facts = read_json(truth)
    known = {str(one["question_id"]): one for one in facts["questions"]}
    names = {number: name for name, number in facts["question_type"].items()}
    questions = []
    for q in llava_questions(file):
        if q.id not in known:
            raise UserError(
                f"{q.source} asks question {q.id}, which {truth.name} does not hold; download both"
                " again"
            )
        one = known[q.id]
        if options["part"] in ("all", one["data_type"]):
            more = {"truth": one}
            kind = names[one["question_type_id"]]
            questions.append(
                Question(q.id, q.text, q.image, more, "", one["answer"], kind, q.source)
            )
    if not questions:
        raise UserError(
            f"{file} holds no {options['part']} questions; download it again, or ask seed:part=all"
        )
    return TaskData(
        questions, Pictures(folder), [file, truth], {"question_type": facts["question_type"]}
    )


def score_seed(asked: TaskData, answers: Mapping[str, str]) -> Score:
    """Share of exactly right letters, in per cent, of images, of videos and of all."""
    truth = {q.id: q.facts["truth"] for q in asked.questions}
    found = seed(
        asked.facts["question_type"],
        list(truth.values()),
        [{"question_id": k, "text": answers[k]} for k in truth],
    )
    main = {name: found[name] for name in ("image", "video", "total") if found[name] is not None}
    return Score(
        main, found, {key: float(answers[key] == one["answer"]) for key, one in truth.items()}
    )


def submit_seed(asked: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """What SEED-Bench's leaderboard takes."""
    rows = [
        {"question_id": q.facts["truth"]["question_id"], "prediction": answers[q.id]}
        for q in asked.questions
    ]
    return [write_json_lines(folder / "seed_submission.jsonl", rows)]


def _mmbench(title: str, dev: str, test: str, last: str) -> Task:
    return Task(
        title,
        partial(read_mmbench, names={"dev": dev, "test": test}, last=last),
        f"put {dev} from MMBench's site (download.openmmlab.com/mmclassification/datasets/mmbench)"
        " into mmbench/",
        score_mmbench,
        submit_mmbench,
        {"split": ("dev", "test"), "circular": ("on", "off")},
        max_new_tokens=1024,
    )


CHOICE_TASKS = {
    "scienceqa": Task(
        "ScienceQA",
        read_scienceqa,
        f"{EVAL_ZIP}, and put problems.json, pid_splits.json and images of ScienceQA into"
        " scienceqa/",
        score_scienceqa,
        options={"part": ("all", "image")},
        max_new_tokens=1024,
    ),
    "mmbench": _mmbench("MMBench", "mmbench_dev_20230712.tsv", "mmbench_test_20230712.tsv", LETTER),
    "mmbench_cn": _mmbench(
        "MMBench-CN", "mmbench_dev_cn_20231003.tsv", "mmbench_test_cn_20231003.tsv", LETTER_CN
    ),
    "seed": Task(
        "SEED-Bench",
        read_seed,
        f"{EVAL_ZIP}, and put SEED-Bench.json, SEED-Bench-image and SEED-Bench-video-image into"
        " seed_bench/",
        score_seed,
        submit_seed,
        {"part": ("all", "image", "video")},
    ),
}
