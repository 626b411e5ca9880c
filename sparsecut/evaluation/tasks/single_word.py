"""GQA, POPE and MME, which ask for one word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...data.images import Pictures
from ...schema import UserError
from .single_word_metrics import gqa, is_no, mme, pope, yes_or_no
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
)

POPE_SPLITS = ("random", "popular", "adversarial")
YES_NO = "Please answer yes or no."


def read_gqa(root: Path, options: Mapping[str, str]) -> TaskData:
    """The balanced test-dev split, whose answers are public; choices, if there, give validity and
    plausibility.
    """
    folder = root / "gqa"
    file, truth = (
        folder / "llava_gqa_testdev_balanced.jsonl",
        folder / "data" / "testdev_balanced_questions.json",
    )
    choices = folder / "data" / "testdev_balanced_choices.json"
    facts = read_json(truth)
    questions = []
    for q in llava_questions(file):
        if q.id not in facts:
            raise UserError(
                f"{q.source} asks question {q.id}, which {truth.name} does not hold; download both"
                " again"
            )
        kind = facts[q.id]["types"]["structural"]
        questions.append(
            replace(q, reference=facts[q.id]["answer"], group=kind, facts={"truth": facts[q.id]})
        )
    files = [file, truth, *([choices] if choices.exists() else [])]
    more = {"choices": read_json(choices) if choices.exists() else None}
    return TaskData(questions, Pictures(the_file(folder / "data" / "images")), files, more)


def score_gqa(asked: TaskData, answers: Mapping[str, str]) -> Score:
    """GQA's scores of answers in small letters without full stops at the end, as
    convert_gqa_for_eval.py hands them over.
    """
    said = {q.id: answers[q.id].rstrip(".").lower() for q in asked.questions}
    truth = {q.id: q.facts["truth"] for q in asked.questions}
    given = [{"questionId": key, "prediction": text} for key, text in said.items()]
    found = gqa(truth, given, asked.facts["choices"])
    return Score(
        {"accuracy": found["accuracy"]},
        found,
        {key: float(said[key] == one["answer"]) for key, one in truth.items()},
    )


def read_pope(root: Path, options: Mapping[str, str]) -> TaskData:
    """POPE on COCO: one split or all three. Labels are in the official files, in the order of
    LLaVA's questions.
    """
    folder, questions, files = root / "pope", [], []
    file = folder / "llava_pope_test.jsonl"
    every = llava_questions(file, group=lambda one: one.get("category"))
    for split in POPE_SPLITS if options["split"] == "all" else (options["split"],):
        truth = folder / "coco" / f"coco_pope_{split}.json"
        labels = read_lines(truth, "image", "text", "label")
        mine = [q for q in every if q.group == split]
        if len(mine) != len(labels):
            raise UserError(
                f"{file} asks {len(mine)} {split} questions, {truth} has {len(labels)}; download"
                " both again"
            )
        for q, label in zip(mine, labels, strict=True):
            if q.image != label["image"] or not q.text.startswith(label["text"]):
                raise UserError(
                    f"{q.source} is not what {label['source']} asks; download both files again"
                )
            questions.append(
                replace(q, reference=label["label"], facts={**q.facts, "label": label["label"]})
            )
        files.append(truth)
    return TaskData(questions, Pictures(the_file(folder / "val2014")), [file, *files])


def score_pope(asked: TaskData, answers: Mapping[str, str]) -> Score:
    """F1 in per cent, averaged over the splits asked, and everything by split."""
    splits = {}
    for split in dict.fromkeys(q.group for q in asked.questions):
        mine = [q for q in asked.questions if q.group == split]
        splits[split] = pope([q.facts for q in mine], [{"answer": answers[q.id]} for q in mine])
    means = {
        key: 100 * sum(one[key] for one in splits.values()) / len(splits)
        for key in ("f1", "accuracy", "yes_ratio")
    }
    each = {
        q.id: float(is_no(answers[q.id]) == (q.facts["label"] == "no")) for q in asked.questions
    }
    return Score(
        {"F1": means["f1"], "accuracy": means["accuracy"], "yes": means["yes_ratio"]}, splits, each
    )


def read_mme(root: Path, options: Mapping[str, str]) -> TaskData:
    """All fourteen tasks, the questions of a picture after each other; the truth lies beside the
    pictures.
    """
    folder = root / "MME"
    file, release = folder / "llava_mme.jsonl", the_file(folder / "MME_Benchmark_release_version")
    truth: dict[str, dict] = {}
    questions: dict[str, list[Question]] = {}
    for q in llava_questions(file):
        task, _, picture = str(q.facts["question_id"]).partition("/")
        if task not in truth:
            truth[task] = _mme_truth(release / task)
        key, plain = Path(picture).stem, _squeezed(q.text.replace(SHORT, ""))
        plain = plain if YES_NO in plain else f"{plain} {YES_NO}"
        if (key, plain) not in truth[task]:
            raise UserError(
                f"{q.source} asks {plain!r}, which the files of {release / task} do not; download"
                " both again"
            )
        facts = {
            "task": task,
            "picture": picture,
            "truth": truth[task][key, plain],
            "question": plain,
        }
        named = replace(
            q, facts=facts, unit=f"{task}/{picture}", group=task, reference=facts["truth"]
        )
        pair = questions.setdefault(named.unit, [])
        if plain not in [other.facts["question"] for other in pair]:  # some are in the file twice
            pair.append(named)
    for unit, pair in questions.items():
        if len(pair) != 2:
            raise UserError(
                f"{file} asks {len(pair)} questions of {unit}, but MME asks two of a picture;"
                " download it again"
            )
    return TaskData([q for pair in questions.values() for q in pair], Pictures(release), [file])


def _mme_truth(folder: Path) -> dict[tuple[str, str], str]:
    """(name of the picture, question) -> yes or no, from the text files beside the pictures or in a
    folder of their own.
    """
    apart = folder / "questions_answers_YN"
    files = sorted((apart if apart.is_dir() else the_file(folder)).glob("*.txt"))
    lines = [
        (f.stem, line.strip().split("\t"))
        for f in files
        for line in f.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    for name, parts in lines:
        if len(parts) != 2:
            raise UserError(
                f"{folder}/{name}.txt has a line that is not a question, a tab and an answer;"
                " download it again"
            )
    return {(name, _squeezed(parts[0])): parts[1] for name, parts in lines}


def _squeezed(text: str) -> str:
    """With single blanks: the release's questions and LLaVA's differ in them."""
    return " ".join(text.split())


def score_mme(asked: TaskData, answers: Mapping[str, str]) -> Score:
    """Totals of perception (2000 at most) and cognition (800 at most), and every task."""
    results: dict[str, list] = {}
    for q in asked.questions:
        row = [q.facts["picture"], q.facts["question"], q.facts["truth"], answers[q.id]]
        results.setdefault(q.facts["task"], []).append(row)
    found = mme(results)
    each = {
        q.id: float(yes_or_no(answers[q.id]) == q.facts["truth"].lower()) for q in asked.questions
    }
    return Score(
        {"perception": found["perception_total"], "cognition": found["cognition_total"]},
        found,
        each,
    )


def submit_mme(asked: TaskData, answers: Mapping[str, str], folder: Path) -> list[Path]:
    """A text file for each task, as MME's eval_tool takes them: picture, question, truth and
    answer, between tabs.
    """
    rows: dict[str, list[str]] = {}
    for q in asked.questions:
        cells = q.facts["picture"], q.facts["question"], q.facts["truth"], _squeezed(answers[q.id])
        rows.setdefault(q.facts["task"], []).append("\t".join(cells) + "\n")
    place = folder / "mme_results"
    place.mkdir(exist_ok=True)
    for task, lines in rows.items():
        (place / f"{task}.txt").write_text("".join(lines), encoding="utf-8")
    return [place]


WORD_TASKS = {
    "gqa": Task(
        "GQA",
        read_gqa,
        f"{EVAL_ZIP}, and put GQA's images and testdev_balanced_questions.json into gqa/data",
        score_gqa,
    ),
    "pope": Task(
        "POPE",
        read_pope,
        f"{EVAL_ZIP}, and put POPE's coco folder and COCO's val2014 into pope/",
        score_pope,
        options={"split": ("all", *POPE_SPLITS)},
    ),
    "mme": Task(
        "MME",
        read_mme,
        f"{EVAL_ZIP}, and put MME_Benchmark_release_version, which MME's authors give on request,"
        " into MME/",
        score_mme,
        submit_mme,
    ),
}
