"""The tasks VQAv2, VizWiz and TextVQA, which ask for a short text, and MM-Vet and LLaVA-Bench."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...data.jsonl import write_json_lines
from ...schema import UserError
from ..output_dir import write_json
from .open_ended_metrics import normalize_textvqa, score_vqa_answer, textvqa, vqa
from .task import (
    EVAL_ZIP,
    SHORT,
    Question,
    Score,
    Task,
    TaskData,
    find_file,
    open_images,
    read_json,
    read_llava_questions,
    read_records,
)

OCR = "Reference OCR token:"  # begins the line of a prompt with text that was read in the image


def read_vqav2(root: Path, options: Mapping[str, str]) -> TaskData:
    """test-dev or test from LLaVA's question files, or the validation split from the official ones.

    Only the validation split has public answers.
    """
    folder = root / "vqav2"
    if options["split"] == "val":
        return _read_vqav2_val(folder)
    test_file = folder / "llava_vqav2_mscoco_test2015.jsonl"
    question_file = test_file
    if options["split"] == "testdev":
        question_file = folder / "llava_vqav2_mscoco_test-dev2015.jsonl"
    # A submission has a row for every question of the test split, answered or not.
    submitted_ids = [record["question_id"] for record in read_records(test_file, "question_id")]
    return TaskData(
        read_llava_questions(question_file),
        open_images(find_file(folder / "test2015")),
        [question_file, test_file],
        {"submitted": submitted_ids},
    )


def _read_vqav2_val(folder: Path) -> TaskData:
    """The validation split, from the official files."""
    question_file = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    truth_file = folder / "v2_mscoco_val2014_annotations.json"
    annotations = {}
    for annotation in read_json(truth_file)["annotations"]:
        annotations[annotation["question_id"]] = annotation
    questions = []
    for record in read_json(question_file)["questions"]:
        number = record["question_id"]
        annotation = annotations[number]
        question = Question(
            id=str(number),
            text=f"{record['question']}\n{SHORT}",
            image=f"COCO_val2014_{record['image_id']:012d}.jpg",
            facts={"question_id": number, "annotation": annotation},
            reference=annotation["multiple_choice_answer"],
            group=annotation["answer_type"],
            source=f"{question_file.name} question {number}",
        )
        questions.append(question)
    images = open_images(find_file(folder / "val2014"))
    return TaskData(questions, images, [question_file, truth_file])


def score_vqav2(data: TaskData, answers: Mapping[str, str]) -> Score | None:
    """VQA accuracy of the validation split, of answers as a submission holds them.

    None for the test splits.
    """
    if "submitted" in data.facts:
        return None
    annotations = []
    predictions = []
    per_question = {}
    for question in data.questions:
        annotation = question.facts["annotation"]
        answer = normalize_textvqa(answers[question.id])
        annotations.append(annotation)
        predictions.append({"question_id": question.facts["question_id"], "answer": answer})
        per_question[question.id] = score_vqa_answer(answer, annotation["answers"])
    details = vqa(annotations, predictions)["accuracy"]
    return Score({"accuracy": details["overall"]}, details, per_question)


def submit_vqav2(data: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write what eval.ai takes: an answer to every question of the test split, empty where it was
    left out.
    """
    if "submitted" not in data.facts:
        return []
    by_number = {}
    for question in data.questions:
        number = question.facts["question_id"]
        by_number[number] = normalize_textvqa(answers[question.id])
    rows = []
    for number in data.facts["submitted"]:
        rows.append({"question_id": number, "answer": by_number.get(number, "")})
    return [write_json(folder / "vqav2_submission.json", rows, indent=None)]


def read_vizwiz(root: Path, options: Mapping[str, str]) -> TaskData:
    """The test split; its prompts allow "Unanswerable"."""
    question_file = root / "vizwiz" / "llava_test.jsonl"
    questions = read_llava_questions(question_file)
    return TaskData(questions, open_images(find_file(root / "vizwiz" / "test")), [question_file])


def submit_vizwiz(data: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write what eval.ai takes: image and answer of each question."""
    rows = []
    for question in data.questions:
        rows.append({"image": question.image, "answer": normalize_textvqa(answers[question.id])})
    return [write_json(folder / "vizwiz_submission.json", rows, indent=None)]


def read_textvqa(root: Path, options: Mapping[str, str]) -> TaskData:
    """The validation split, with or without the line of text that was read in the image."""
    folder = root / "textvqa"
    question_file = folder / "llava_textvqa_val_v051_ocr.jsonl"
    truth_file = folder / "TextVQA_0.5.1_val.json"
    references = {}
    for record in read_json(truth_file)["data"]:
        key = (str(record["image_id"]), record["question"].lower())
        references[key] = record["answers"]
    questions = []
    for question in read_llava_questions(question_file):
        lines = question.text.split("\n")
        lines = [line for line in lines if not line.startswith(OCR)]
        image_id = str(question.facts["question_id"])
        key = (image_id, lines[0].lower())
        if key not in references:
            raise UserError(
                f"the question {lines[0]!r} about {image_id} in {question.source} is not in"
                f" {truth_file.name}; download both again"
            )
        answers = references[key]
        question = replace(
            question,
            text="\n".join(lines) if options["ocr"] == "off" else question.text,
            facts={**question.facts, "answers": answers},
            reference=max(answers, key=answers.count),
        )
        questions.append(question)
    has_ocr = any(OCR in question.text for question in questions)
    if options["ocr"] == "on" and not has_ocr:
        raise UserError(
            f"{question_file} holds no line that begins with {OCR!r}; ask without these lines, as"
            " textvqa:ocr=off"
        )
    images = open_images(find_file(folder / "train_images"))
    return TaskData(questions, images, [question_file, truth_file])


def score_textvqa(data: TaskData, answers: Mapping[str, str]) -> Score:
    """TextVQA accuracy by the M4C evaluator, in per cent."""
    ids = []
    pairs = []
    for question in data.questions:
        answer = answers[question.id]
        ids.append(question.id)
        pairs.append({"pred_answer": answer, "gt_answers": question.facts["answers"]})
    details = textvqa(pairs)
    scores = details.pop("per_question")
    per_question = dict(zip(ids, scores, strict=True))
    return Score({"accuracy": 100 * details["textvqa_accuracy"]}, details, per_question)


def read_mmvet(root: Path, options: Mapping[str, str]) -> TaskData:
    """All questions. The released script names the folder mm-vet, its instructions mmvet."""
    folder = find_file(root / "mm-vet", root / "mmvet")
    question_file = folder / "llava-mm-vet.jsonl"
    questions = read_llava_questions(question_file)
    return TaskData(questions, open_images(find_file(folder / "images")), [question_file])


def submit_mmvet(data: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write what MM-Vet's notebook and evaluation server take."""
    rows = {f"v1_{q.facts['question_id']}": answers[q.id] for q in data.questions}
    return [write_json(folder / "mmvet_submission.json", rows)]


def read_llava_bench(root: Path, options: Mapping[str, str]) -> TaskData:
    """LLaVA-Bench (in the wild); its kinds of question are groups."""
    folder = root / "llava-bench-in-the-wild"
    question_file = folder / "questions.jsonl"
    questions = read_llava_questions(question_file, group_key="category")
    return TaskData(questions, open_images(find_file(folder / "images")), [question_file])


def submit_llava_bench(data: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write what LLaVA's eval_gpt_review_bench.py takes as one of its --answer-list."""
    rows = []
    for question in data.questions:
        row = {
            "question_id": question.facts["question_id"],
            "prompt": question.text,
            "text": answers[question.id],
            "answer_id": question.id,
            "model_id": "sparsecut",
            "metadata": {},
        }
        rows.append(row)
    return [write_json_lines(folder / "llava_bench_answers.jsonl", rows)]


OPEN_ENDED_TASKS = {
    "vqav2": Task(
        title="VQAv2",
        read=read_vqav2,
        source=(
            f"{EVAL_ZIP}, and put COCO's test2015 (val2014 and the official val files for"
            " split=val) into vqav2/"
        ),
        score=score_vqav2,
        submit=submit_vqav2,
        options={"split": ("testdev", "test", "val")},
    ),
    "vizwiz": Task(
        title="VizWiz",
        read=read_vizwiz,
        source=f"{EVAL_ZIP}, and put VizWiz's test images into vizwiz/test",
        submit=submit_vizwiz,
    ),
    "textvqa": Task(
        title="TextVQA",
        read=read_textvqa,
        source=f"{EVAL_ZIP}, and put TextVQA_0.5.1_val.json and train_images into textvqa/",
        score=score_textvqa,
        options={"ocr": ("on", "off")},
    ),
    "mmvet": Task(
        title="MM-Vet",
        read=read_mmvet,
        source=f"{EVAL_ZIP}, and put the images of mm-vet.zip into mm-vet/images",
        submit=submit_mmvet,
        max_new_tokens=1024,
    ),
    "llava_bench": Task(
        title="LLaVA-Bench (in the wild)",
        read=read_llava_bench,
        source=(
            "put the files of the data set liuhaotian/llava-bench-in-the-wild into"
            " llava-bench-in-the-wild/"
        ),
        submit=submit_llava_bench,
        max_new_tokens=1024,
    ),
}
