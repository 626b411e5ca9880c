"""The tasks GQA, POPE and MME, whose answers are one word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...schema import UserError, read_text_file
from .single_word_metrics import gqa, is_no, mme, pope, read_yes_or_no
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

POPE_SPLITS = ("random", "popular", "adversarial")
YES_NO = "Please answer yes or no."


def read_gqa(root: Path, options: Mapping[str, str]) -> TaskData:
    """The balanced test-dev split, whose answers are public.

    With testdev_balanced_choices.json, validity and plausibility are scored too.
    """
    folder = root / "gqa"
    question_file = folder / "llava_gqa_testdev_balanced.jsonl"
    truth_file = folder / "data" / "testdev_balanced_questions.json"
    choices_file = folder / "data" / "testdev_balanced_choices.json"
    truth = read_json(truth_file)
    questions = []
    for question in read_llava_questions(question_file):
        if question.id not in truth:
            raise UserError(
                f"question {question.id} of {question.source} is not in {truth_file.name};"
                " download both again"
            )
        facts = truth[question.id]
        kind = facts["types"]["structural"]
        questions.append(
            replace(question, reference=facts["answer"], group=kind, facts={"truth": facts})
        )
    files = [question_file, truth_file]
    choices = None
    if choices_file.exists():
        files.append(choices_file)
        choices = read_json(choices_file)
    images = open_images(find_file(folder / "data" / "images"))
    return TaskData(questions, images, files, {"choices": choices})


def score_gqa(data: TaskData, answers: Mapping[str, str]) -> Score:
    """GQA's scores of answers in lower case without final full stops.

    That is how LLaVA's convert_gqa_for_eval.py writes them for GQA's eval.py.
    """
    truth = {}
    predictions = []
    per_question = {}
    for question in data.questions:
        facts = question.facts["truth"]
        answer = answers[question.id].rstrip(".").lower()
        truth[question.id] = facts
        predictions.append({"questionId": question.id, "prediction": answer})
        per_question[question.id] = float(answer == facts["answer"])
    details = gqa(truth, predictions, data.facts["choices"])
    return Score({"accuracy": details["accuracy"]}, details, per_question)


def read_pope(root: Path, options: Mapping[str, str]) -> TaskData:
    """POPE on COCO, one split or all three.

    The labels are in the official files, in the order of LLaVA's questions.
    """
    folder = root / "pope"
    question_file = folder / "llava_pope_test.jsonl"
    by_split: dict[str, list[Question]] = {}
    for question in read_llava_questions(question_file, group_key="category"):
        by_split.setdefault(question.group, []).append(question)
    splits = POPE_SPLITS if options["split"] == "all" else (options["split"],)
    questions = []
    files = [question_file]
    for split in splits:
        truth_file = folder / "coco" / f"coco_pope_{split}.json"
        labels = read_records(truth_file, "image", "text", "label")
        in_split = by_split.get(split, [])
        if len(in_split) != len(labels):
            raise UserError(
                f"{question_file} holds {len(in_split)} {split} questions, but {truth_file} has"
                f" {len(labels)}; download both again"
            )
        for question, label in zip(in_split, labels, strict=True):
            questions.append(_add_pope_label(question, label))
        files.append(truth_file)
    return TaskData(questions, open_images(find_file(folder / "val2014")), files)


def _add_pope_label(question: Question, label: Mapping) -> Question:
    """A question with its label; UserError where the label is of another question."""
    if question.image != label["image"] or not question.text.startswith(label["text"]):
        raise UserError(
            f"{question.source} is not the question of {label['source']}; download both files again"
        )
    facts = {**question.facts, "label": label["label"]}
    return replace(question, reference=label["label"], facts=facts)


def score_pope(data: TaskData, answers: Mapping[str, str]) -> Score:
    """POPE's scores by split; the main ones are means over the splits, in per cent."""
    by_split: dict[str, list[Question]] = {}
    per_question = {}
    for question in data.questions:
        by_split.setdefault(question.group, []).append(question)
        label_is_no = question.facts["label"] == "no"
        answer_is_no = is_no(answers[question.id])
        per_question[question.id] = float(answer_is_no == label_is_no)
    details = {}
    for split, questions in by_split.items():
        labels = [question.facts for question in questions]
        predictions = [{"answer": answers[question.id]} for question in questions]
        details[split] = pope(labels, predictions)
    main = {}
    for name, key in (("F1", "f1"), ("accuracy", "accuracy"), ("yes", "yes_ratio")):
        total = sum(scores[key] for scores in details.values())
        main[name] = 100 * total / len(details)
    return Score(main, details, per_question)


def read_mme(root: Path, options: Mapping[str, str]) -> TaskData:
    """All fourteen tasks of MME, the two questions of an image one after the other.

    The truth is in text files beside the images.
    """
    question_file = root / "MME" / "llava_mme.jsonl"
    release = find_file(root / "MME" / "MME_Benchmark_release_version")
    truth: dict[str, dict] = {}  # by task
    pairs: dict[str, list[Question]] = {}  # by image
    for question in read_llava_questions(question_file):
        name = str(question.facts["question_id"])
        task, _, _ = name.partition("/")
        if task not in truth:
            truth[task] = _read_mme_truth(release / task)
        question = _add_mme_truth(question, task, truth[task], release)
        pair = pairs.setdefault(question.unit, [])  # the file repeats some questions
        texts = [other.facts["question"] for other in pair]
        if question.facts["question"] not in texts:
            pair.append(question)
    questions = []
    for unit, pair in pairs.items():
        if len(pair) != 2:
            raise UserError(
                f"{question_file} holds {len(pair)} questions about {unit}, but MME has two about"
                " every image; download it again"
            )
        questions += pair
    return TaskData(questions, open_images(release), [question_file])


def _add_mme_truth(question: Question, task: str, truth: dict, release: Path) -> Question:
    """A question with its truth, and with its text as in the release."""
    name = str(question.facts["question_id"])
    _, _, image = name.partition("/")
    text = question.text.replace(SHORT, "")
    text = _join_words(text)
    if YES_NO not in text:
        text = f"{text} {YES_NO}"
    key = (Path(image).stem, text)
    if key not in truth:
        raise UserError(
            f"the question {text!r} in {question.source} is not in the files of {release / task};"
            " download both again"
        )
    facts = {"task": task, "image": image, "truth": truth[key], "question": text}
    unit = f"{task}/{image}"
    return replace(question, facts=facts, unit=unit, group=task, reference=truth[key])


def _read_mme_truth(folder: Path) -> dict[tuple[str, str], str]:
    """Yes or no by (name of the image, question).

    The text files are beside the images or in a folder of their own.
    """
    separate = folder / "questions_answers_YN"
    if not separate.is_dir():
        separate = find_file(folder)
    truth = {}
    for file in sorted(separate.glob("*.txt")):
        for line in read_text_file(file).splitlines():
            if not line.strip():
                continue
            cells = line.strip().split("\t")
            if len(cells) != 2:
                raise UserError(
                    f"{file} has a line that is not a question, a tab and an answer; download it"
                    " again"
                )
            question, answer = cells
            truth[file.stem, _join_words(question)] = answer
    return truth


def _join_words(text: str) -> str:
    """With single spaces, in which the release's questions differ from LLaVA's."""
    return " ".join(text.split())


def score_mme(data: TaskData, answers: Mapping[str, str]) -> Score:
    """MME's totals of perception (at most 2000) and cognition (at most 800), and every task."""
    rows: dict[str, list] = {}
    per_question = {}
    for question in data.questions:
        facts = question.facts
        task = facts["task"]
        truth = facts["truth"]
        answer = answers[question.id]
        rows.setdefault(task, []).append([facts["image"], facts["question"], truth, answer])
        is_right = read_yes_or_no(answer) == truth.lower()
        per_question[question.id] = float(is_right)
    details = mme(rows)
    main = {"perception": details["perception_total"], "cognition": details["cognition_total"]}
    return Score(main, details, per_question)


def submit_mme(data: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """Write a text file for each task, as MME's eval_tool takes them.

    A line is image, question, truth and answer, with tabs between them.
    """
    lines: dict[str, list[str]] = {}
    for question in data.questions:
        facts = question.facts
        answer = _join_words(answers[question.id])
        cells = [facts["image"], facts["question"], facts["truth"], answer]
        task_lines = lines.setdefault(facts["task"], [])
        task_lines.append("\t".join(cells) + "\n")
    results = folder / "mme_results"
    results.mkdir(exist_ok=True)
    for task, task_lines in lines.items():
        (results / f"{task}.txt").write_text("".join(task_lines), encoding="utf-8")
    return [results]


SINGLE_WORD_TASKS = {
    "gqa": Task(
        title="GQA",
        read=read_gqa,
        source=(
            f"{EVAL_ZIP}, and put GQA's images and testdev_balanced_questions.json into gqa/data"
        ),
        score=score_gqa,
    ),
    "pope": Task(
        title="POPE",
        read=read_pope,
        source=f"{EVAL_ZIP}, and put POPE's coco folder and COCO's val2014 into pope/",
        score=score_pope,
        options={"split": ("all", *POPE_SPLITS)},
    ),
    "mme": Task(
        title="MME",
        read=read_mme,
        source=(
            f"{EVAL_ZIP}, and put MME_Benchmark_release_version, which MME's authors give on"
            " request, into MME/"
        ),
        score=score_mme,
        submit=submit_mme,
    ),
}
