"""The tasks ScienceQA, MMBench (English and Chinese) and SEED-Bench, whose answers are letters."""

from __future__ import annotations

import base64
import binascii
import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path

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
    find_file,
    open_images,
    read_json,
    read_llava_questions,
)

LETTER_CN = "\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002"
# Characters of base64; a shorter cell is the index of the row that has the image.
SHORTEST_IMAGE = 64
# Columns of the table that a submission leaves out.
LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")


def read_scienceqa(root: Path, options: Mapping[str, str]) -> TaskData:
    """The test split, or its questions with an image."""
    folder = root / "scienceqa"
    question_file = folder / "llava_test_CQM-A.json"
    problem_file = folder / "problems.json"
    split_file = folder / "pid_splits.json"
    problems = read_json(problem_file)
    splits = read_json(split_file)
    test_ids = set(splits["test"])
    questions = []
    for number, record in enumerate(read_json(question_file)):
        key = str(record["id"])
        source = f"{question_file.name} record {number}"
        if key not in problems or key not in test_ids:
            raise UserError(
                f"problem {key} of {source} is not in the test split in {folder};"
                " download both again"
            )
        if options["part"] == "image" and record.get("image") is None:
            continue
        problem = problems[key]
        text = record["conversations"][0]["value"].replace("<image>", "").strip()
        question = Question(
            id=key,
            text=f"{text}\n{LETTER}",
            image=record.get("image"),
            facts={"problem": problem},
            reference=LETTERS[problem["answer"]],
            group=problem["subject"],
            source=source,
        )
        questions.append(question)
    images = open_images(find_file(folder / "images" / "test"))
    return TaskData(questions, images, [question_file, problem_file, split_file])


def score_scienceqa(data: TaskData, answers: Mapping[str, str]) -> Score:
    """Accuracy of questions with an image (the paper's ScienceQA-IMG) and of all, in per cent."""
    problems = {}
    predictions = []
    for question in data.questions:
        prediction = {
            "question_id": question.id,
            "text": answers[question.id],
            "prompt": "" if question.image is None else "<image>",
        }
        problems[question.id] = question.facts["problem"]
        predictions.append(prediction)
    details = scienceqa(problems, predictions)
    parsed = details["llava"].pop("parsed_index")
    main = {}
    if details["llava"]["img_accuracy"] is not None:
        main["image accuracy"] = details["llava"]["img_accuracy"]
    main["accuracy"] = details["llava"]["accuracy"]
    per_question = {}
    for key, problem in problems.items():
        per_question[key] = float(parsed[key] == problem["answer"])
    return Score(main, details, per_question)


def read_mmbench(
    root: Path, options: Mapping[str, str], *, files: Mapping[str, str], instruction: str
) -> TaskData:
    """All rows of a split's table, or with circular=off the first row of each question.

    Args:
        root: The folder with the benchmarks.
        options: `split` and `circular`.
        files: Names of the tables by split.
        instruction: The last line of every prompt.
    """
    split = options["split"]
    if split == "test" and importlib.util.find_spec("openpyxl") is None:
        raise UserError(
            "answers to MMBench's test split are submitted as .xlsx; install openpyxl"
            " (sparsecut[tasks]) first"
        )
    file = find_file(root / "mmbench" / files[split], root / "mmbench_cn" / files[split])
    all_rows = _read_mmbench_table(file)
    images = {row["index"]: row["image"] for row in all_rows}
    unrotated = [row for row in all_rows if int(row["index"]) < ROTATIONS]
    is_circular = options["circular"] == "on"
    if is_circular and len(unrotated) == len(all_rows):
        raise UserError(
            f"{file} holds no rotated rows (index over a million); ask each question once, as"
            " circular=off"
        )
    rows = all_rows if is_circular else unrotated
    questions = []
    for row in rows:
        facts = {key: cell for key, cell in row.items() if key != "image" and not is_empty(cell)}
        source = f"{file.name} index {row['index']}"
        question = Question(
            id=row["index"],
            text=_build_mmbench_prompt(row, instruction),
            image=_decode_mmbench_image(row, images, source),
            facts=facts,
            unit=str(int(row["index"]) % ROTATIONS),
            reference=facts.get("answer", ""),
            group=row.get("category"),
            source=source,
        )
        questions.append(question)
    return TaskData(questions, None, [file], {"circular": is_circular, "columns": list(rows[0])})


def _read_mmbench_table(file: Path) -> list[dict]:
    """The rows of a table, all cells as text.

    Cells are empty where pandas takes them for empty ("None" and "NA" too), as in the released
    script.
    """
    import pandas

    try:
        rows = pandas.read_table(file, dtype=str).to_dict("records")
    except ValueError as error:
        raise UserError(f"{file} cannot be read as a table ({error}); download it again") from None
    columns = rows[0] if rows else {}
    missing = [name for name in ("index", "question", "A", "image") if name not in columns]
    if missing:
        raise UserError(
            f"{file} has no column {', '.join(missing)}; is it MMBench's table? Download it again"
        )
    for row in rows:
        if not str(row["index"]).isdigit():
            raise UserError(
                f"{file} has a row whose index is {row['index']!r}, which is not a number; its"
                " columns are out of place: download it again"
            )
    return rows


def _build_mmbench_prompt(row: Mapping, instruction: str) -> str:
    """Hint, question and the options A to D up to the first empty one, as in model_vqa_mmbench.py
    of LLaVA.
    """
    hint = row.get("hint")
    lines = [] if _is_none(hint) else [hint]
    lines.append(row["question"])
    for letter in "ABCD":
        option = row.get(letter)
        if _is_none(option):
            break
        lines.append(f"{letter}. {option}")
    return "\n".join([*lines, instruction])


def _is_none(cell) -> bool:
    return is_empty(cell) or cell.lower() in ("nan", "none")


def _decode_mmbench_image(row: Mapping, images: Mapping[str, str], source: str) -> bytes:
    """The bytes of a row's image; a short cell names the row that has it."""
    cell = row["image"]
    is_index = not is_empty(cell) and len(cell) < SHORTEST_IMAGE
    if is_index:
        cell = images.get(cell)
    try:
        return base64.b64decode(cell, validate=True)
    except (TypeError, binascii.Error):
        raise UserError(f"{source} has no image in base64; download the table again") from None


def score_mmbench(data: TaskData, answers: Mapping[str, str]) -> Score | None:
    """Circular accuracy, or plain accuracy of the first rows, in per cent.

    None where the table has no answers (test split).
    """
    rows = [question.facts for question in data.questions]
    if not all("answer" in row for row in rows):
        return None
    predictions = [answers[question.id] for question in data.questions]
    details = mmbench(rows, predictions)
    inferred = details.pop("inferred")
    per_question = {}
    for question, letter in zip(data.questions, inferred, strict=True):
        is_right = letter == question.facts["answer"]
        per_question[question.id] = float(is_right)
    plain = {"plain accuracy": 100 * details["vanilla_accuracy"]}
    if data.facts["circular"]:
        circular = 100 * details["circular_accuracy"]["Overall"]
        return Score({"circular accuracy": circular, **plain}, details, per_question)
    details = {
        "vanilla_accuracy": details["vanilla_accuracy"],
        "by_category": details["circular_accuracy"],
    }
    return Score(plain, details, per_question)


def submit_mmbench(data: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the table that MMBench's server takes: the rows with a column `prediction`, as .xlsx.

    Without the package openpyxl nothing is written.
    """
    import pandas

    if importlib.util.find_spec("openpyxl") is None:
        return []
    columns = [name for name in data.facts["columns"] if name not in LEFT_OUT]
    rows = []
    predictions = []
    for question in data.questions:
        rows.append({name: question.facts.get(name) for name in columns})
        predictions.append(answers[question.id])
    table = pandas.DataFrame(rows)
    table["index"] = table["index"].astype(int)
    place = min(6, len(columns))
    table.insert(place, "prediction", predictions)
    file = folder / "mmbench_submission.xlsx"
    table.to_excel(file, index=False, engine="openpyxl")
    return [file]


def read_seed(root: Path, options: Mapping[str, str]) -> TaskData:
    """SEED-Bench: images, the middle frames of videos, or both."""
    folder = root / "seed_bench"
    question_file = folder / "llava-seed-bench.jsonl"
    truth_file = folder / "SEED-Bench.json"
    truth = read_json(truth_file)
    type_names = {number: name for name, number in truth["question_type"].items()}
    by_id = {str(record["question_id"]): record for record in truth["questions"]}
    questions = []
    for question in read_llava_questions(question_file):
        if question.id not in by_id:
            raise UserError(
                f"question {question.id} of {question.source} is not in {truth_file.name};"
                " download both again"
            )
        record = by_id[question.id]
        if options["part"] not in ("all", record["data_type"]):
            continue
        question = Question(
            id=question.id,
            text=question.text,
            image=question.image,
            facts={"truth": record},
            reference=record["answer"],
            group=type_names[record["question_type_id"]],
            source=question.source,
        )
        questions.append(question)
    if not questions:
        raise UserError(
            f"{question_file} holds no {options['part']} questions; download it again, or take"
            " all, as seed:part=all"
        )
    facts = {"question_type": truth["question_type"]}
    return TaskData(questions, open_images(folder), [question_file, truth_file], facts)


def score_seed(data: TaskData, answers: Mapping[str, str]) -> Score:
    """Answers that are exactly the right letter, in per cent, of images, of videos and of all."""
    truth = []
    predictions = []
    per_question = {}
    for question in data.questions:
        record = question.facts["truth"]
        answer = answers[question.id]
        truth.append(record)
        predictions.append({"question_id": question.id, "text": answer})
        per_question[question.id] = float(answer == record["answer"])
    details = seed(data.facts["question_type"], truth, predictions)
    main = {}
    for name in ("image", "video", "total"):
        if details[name] is not None:
            main[name] = details[name]
    return Score(main, details, per_question)


def submit_seed(data: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write what SEED-Bench's leaderboard takes."""
    rows = []
    for question in data.questions:
        number = question.facts["truth"]["question_id"]
        rows.append({"question_id": number, "prediction": answers[question.id]})
    return [write_json_lines(folder / "seed_submission.jsonl", rows)]


def _build_mmbench_task(title: str, dev: str, test: str, instruction: str) -> Task:
    return Task(
        title=title,
        read=partial(read_mmbench, files={"dev": dev, "test": test}, instruction=instruction),
        source=(
            f"put {dev} from MMBench's site"
            " (download.openmmlab.com/mmclassification/datasets/mmbench) into mmbench/"
        ),
        score=score_mmbench,
        submit=submit_mmbench,
        options={"split": ("dev", "test"), "circular": ("on", "off")},
        max_new_tokens=1024,
    )


MULTIPLE_CHOICE_TASKS = {
    "scienceqa": Task(
        title="ScienceQA",
        read=read_scienceqa,
        source=(
            f"{EVAL_ZIP}, and put problems.json, pid_splits.json and images of ScienceQA into"
            " scienceqa/"
        ),
        score=score_scienceqa,
        options={"part": ("all", "image")},
        max_new_tokens=1024,
    ),
    "mmbench": _build_mmbench_task(
        "MMBench", "mmbench_dev_20230712.tsv", "mmbench_test_20230712.tsv", LETTER
    ),
    "mmbench_cn": _build_mmbench_task(
        "MMBench-CN", "mmbench_dev_cn_20231003.tsv", "mmbench_test_cn_20231003.tsv", LETTER_CN
    ),
    "seed": Task(
        title="SEED-Bench",
        read=read_seed,
        source=(
            f"{EVAL_ZIP}, and put SEED-Bench.json, SEED-Bench-image and SEED-Bench-video-image into"
            " seed_bench/"
        ),
        score=score_seed,
        submit=submit_seed,
        options={"part": ("all", "image", "video")},
    ),
}
