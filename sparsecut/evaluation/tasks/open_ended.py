"""VQAv2, VizWiz and TextVQA, which ask for a short text, and MM-Vet and LLaVA-Bench, which ask for
a long one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...data.images import Pictures
from ...data.jsonl import write_json_lines
from ...schema import UserError
from .open_ended_metrics import textvqa, textvqa_text, vqa, vqa_score
from .task import (
    EVAL_ZIP,
    SHORT,
    Question,
    Score,
    Task,
    TaskData,
    llava_questions,
    read_json,
    read_lines,
    the_file,
    write_json,
)

OCR = "Reference OCR token:"  # begins the line of a prompt that names what a text recogniser read


def read_vqav2(root: Path, options: Mapping[str, str]) -> TaskData:
    """test-dev and test from LLaVA's question files, or the validation split from the official
    ones, whose answers are public.
    """
    folder, split = root / "vqav2", options["split"]
    if split == "val":
        return _read_vqav2_val(folder)
    asked = folder / f"llava_vqav2_mscoco_{'test2015' if split == 'test' else 'test-dev2015'}.jsonl"
    whole = folder / "llava_vqav2_mscoco_test2015.jsonl"
    ids = [record["question_id"] for record in read_lines(whole, "question_id")]
    return TaskData(
        llava_questions(asked),
        Pictures(the_file(folder / "test2015")),
        [asked, whole],
        {"submitted": ids},
    )


def _read_vqav2_val(folder: Path) -> TaskData:
    asked, truth = (
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        folder / "v2_mscoco_val2014_annotations.json",
    )
    annotations = {one["question_id"]: one for one in read_json(truth)["annotations"]}
    questions = [
        Question(
            str(one["question_id"]),
            f"{one['question']}\n{SHORT}",
            f"COCO_val2014_{one['image_id']:012d}.jpg",
            {"question_id": one["question_id"], "annotation": annotations[one["question_id"]]},
            reference=annotations[one["question_id"]]["multiple_choice_answer"],
            group=annotations[one["question_id"]]["answer_type"],
            source=f"{asked.name} question {one['question_id']}",
        )
        for one in read_json(asked)["questions"]
    ]
    return TaskData(questions, Pictures(the_file(folder / "val2014")), [asked, truth])


def score_vqav2(asked: TaskData, answers: Mapping[str, str]) -> Score | None:
    """VQA accuracy of the validation split, of answers as a submission holds them; None for test
    splits.
    """
    if "submitted" in asked.facts:
        return None
    said = {q.id: textvqa_text(answers[q.id]) for q in asked.questions}
    truth = {q.id: q.facts["annotation"] for q in asked.questions}
    given = [{"question_id": q.facts["question_id"], "answer": said[q.id]} for q in asked.questions]
    found = vqa(list(truth.values()), given)["accuracy"]
    each = {key: vqa_score(said[key], one["answers"]) for key, one in truth.items()}
    return Score({"accuracy": found["overall"]}, found, each)


def submit_vqav2(asked: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """What eval.ai takes: an answer for every question of the test split, empty where it was not
    asked.
    """
    if "submitted" not in asked.facts:
        return []
    said = {q.facts["question_id"]: textvqa_text(answers[q.id]) for q in asked.questions}
    rows = [
        {"question_id": number, "answer": said.get(number, "")}
        for number in asked.facts["submitted"]
    ]
    return [write_json(folder / "vqav2_submission.json", rows)]


def read_vizwiz(root: Path, options: Mapping[str, str]) -> TaskData:
    """The test split; its prompts allow "Unanswerable"."""
    file = root / "vizwiz" / "llava_test.jsonl"
    return TaskData(llava_questions(file), Pictures(the_file(root / "vizwiz" / "test")), [file])


def submit_vizwiz(asked: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """What eval.ai takes: picture and answer of each question."""
    rows = [{"image": q.image, "answer": textvqa_text(answers[q.id])} for q in asked.questions]
    return [write_json(folder / "vizwiz_submission.json", rows)]


def read_textvqa(root: Path, options: Mapping[str, str]) -> TaskData:
    """The validation split, with or without the line that names what a text recogniser read in the
    picture.
    """
    folder = root / "textvqa"
    file, truth = folder / "llava_textvqa_val_v051_ocr.jsonl", folder / "TextVQA_0.5.1_val.json"
    annotations = {
        (str(one["image_id"]), one["question"].lower()): one for one in read_json(truth)["data"]
    }
    questions = []
    for q in llava_questions(file):
        lines = q.text.split("\n")
        plain = [line for line in lines if not line.startswith(OCR)]
        key = str(q.facts["question_id"]), plain[0].lower()
        if key not in annotations:
            raise UserError(
                f"{q.source} asks {plain[0]!r} of {key[0]}, which {truth.name} does not; download"
                " both again"
            )
        text = "\n".join(plain) if options["ocr"] == "off" else q.text
        answers = annotations[key]["answers"]
        questions.append(
            replace(q, text=text, facts={**q.facts, "answers": answers}, reference=_most(answers))
        )
    if options["ocr"] == "on" and not any(OCR in q.text for q in questions):
        raise UserError(
            f"{file} holds no line that begins with {OCR!r}; ask without, as textvqa:ocr=off"
        )
    return TaskData(questions, Pictures(the_file(folder / "train_images")), [file, truth])


def score_textvqa(asked: TaskData, answers: Mapping[str, str]) -> Score:
    """TextVQA accuracy by the M4C evaluator, in per cent."""
    pairs = [
        {"pred_answer": answers[q.id], "gt_answers": q.facts["answers"]} for q in asked.questions
    ]
    found = textvqa(pairs)
    each = dict(zip([q.id for q in asked.questions], found.pop("per_question"), strict=True))
    return Score({"accuracy": 100 * found["textvqa_accuracy"]}, found, each)


def _most(answers: list[str]) -> str:
    return max(answers, key=answers.count)


def read_mmvet(root: Path, options: Mapping[str, str]) -> TaskData:
    """All questions; the released script and its instructions name the folder differently, either
    is taken.
    """
    folder = the_file(root / "mm-vet", root / "mmvet")
    file = folder / "llava-mm-vet.jsonl"
    return TaskData(llava_questions(file), Pictures(the_file(folder / "images")), [file])


def submit_mmvet(asked: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """What MM-Vet's notebook and evaluation server take."""
    rows = {f"v1_{q.facts['question_id']}": answers[q.id] for q in asked.questions}
    return [write_json(folder / "mmvet_submission.json", rows, indent=2)]


def read_llava_bench(root: Path, options: Mapping[str, str]) -> TaskData:
    """LLaVA-Bench (in the wild); its kinds of question are groups."""
    folder = root / "llava-bench-in-the-wild"
    file = folder / "questions.jsonl"
    return TaskData(
        llava_questions(file, group=lambda one: one.get("category")),
        Pictures(the_file(folder / "images")),
        [file],
    )


def submit_llava_bench(asked: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """What LLaVA's eval_gpt_review_bench.py takes as one of its --answer-list."""
    rows = [
        {
            "question_id": q.facts["question_id"],
            "prompt": q.text,
            "text": answers[q.id],
            "answer_id": q.id,
            "model_id": "sparsecut",
            "metadata": {},
        }
        for q in asked.questions
    ]
    return [write_json_lines(folder / "llava_bench_answers.jsonl", rows)]


TEXT_TASKS = {
    "vqav2": Task(
        "VQAv2",
        read_vqav2,
        f"{EVAL_ZIP}, and put COCO's test2015 (val2014 and the official val files for split=val)"
        " into vqav2/",
        score_vqav2,
        submit_vqav2,
        {"split": ("testdev", "test", "val")},
    ),
    "vizwiz": Task(
        "VizWiz",
        read_vizwiz,
        f"{EVAL_ZIP}, and put VizWiz's test pictures into vizwiz/test",
        submit=submit_vizwiz,
    ),
    "textvqa": Task(
        "TextVQA",
        read_textvqa,
        f"{EVAL_ZIP}, and put TextVQA_0.5.1_val.json and train_images into textvqa/",
        score_textvqa,
        options={"ocr": ("on", "off")},
    ),
    "mmvet": Task(
        "MM-Vet",
        read_mmvet,
        f"{EVAL_ZIP}, and put the images of mm-vet.zip into mm-vet/images",
        submit=submit_mmvet,
        max_new_tokens=1024,
    ),
    "llava_bench": Task(
        "LLaVA-Bench (in the wild)",
        read_llava_bench,
        "put the files of the data set liuhaotian/llava-bench-in-the-wild into"
        " llava-bench-in-the-wild/",
        submit=submit_llava_bench,
        max_new_tokens=1024,
    ),
}
