"""Scores of MMBench, SEED-Bench and ScienceQA, which ask for an option's letter: each equals the
benchmark's own script.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from ...schema import UserError
from .open_ended_metrics import mean

LETTERS = string.ascii_uppercase
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
VERBOSE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
ABBREVIATED = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
ROTATIONS = 1_000_000  # an index above is a rotation of the row with what is left of it


def mmbench(rows: Sequence[Mapping], predictions: Sequence[str]) -> dict:
    """MMBench: the option read from each answer, circular and plain accuracy, of 1 (VLMEvalKit,
    multiple_choice.py, without a judge).

    rows: `index`, `answer`, options A, B, ... and, for the table, `category` and `l2-category`;
    rows whose index exceeds a million are rotations of that row modulo a million. predictions: an
    answer for each row, in order. A question is hit only where all its rotations are. Returns
    `circular_accuracy` (Overall, then categories), `circular_hit` by question, `vanilla_accuracy`
    over all rows, and `inferred` (None where no option could be read, which counts as wrong).
    """
    if len(rows) != len(predictions) or not rows:
        raise UserError(
            f"there are {len(rows)} rows and {len(predictions)} answers; give as many of both, at"
            " least one"
        )
    read = [
        infer_option(said, options_of(row)) for row, said in zip(rows, predictions, strict=True)
    ]
    right = [found == row["answer"] for found, row in zip(read, rows, strict=True)]
    hit: dict[int, bool] = {}
    for row, good in zip(rows, right, strict=True):
        number = int(row["index"]) % ROTATIONS
        hit[number] = hit.get(number, True) and good
    main = [row for row in rows if int(row["index"]) < ROTATIONS]
    table = {"Overall": mean([float(hit[int(row["index"])]) for row in main])}
    for level in ("l2-category", "category"):
        for name in sorted({row[level] for row in main if row.get(level)}):
            members = [float(hit[int(row["index"])]) for row in main if row.get(level) == name]
            table[ABBREVIATED.get(name, name)] = mean(members)
    return {
        "circular_accuracy": table,
        "circular_hit": {str(int(row["index"])): int(hit[int(row["index"])]) for row in main},
        "vanilla_accuracy": mean(right),
        "inferred": read,
    }


def options_of(row: Mapping) -> dict[str, str]:
    """The options of a row by letter; columns that are missing or empty are none."""
    return {c: str(row[c]) for c in LETTERS if c in row and not is_empty(row[c])}


def is_empty(value) -> bool:
    """Whether a cell of a table holds nothing."""
    return value is None or value != value or value == ""


def infer_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names, "Z" for a refusal, None where it names none or
    several.

    First by its letter, standing alone among the last four words, then by "answer is X", then by
    the option's text in the answer.
    """
    answer = str(answer)
    if any(refusal in answer for refusal in REFUSALS):
        return "Z"
    words = answer.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    verbose = VERBOSE.search(answer)
    if verbose and verbose[1].upper() in choices:
        return verbose[1].upper()
    if len(answer) > 2 * sum(len(str(text)) for text in choices.values()):
        return None
    inside = [letter for letter, text in choices.items() if str(text).lower() in answer.lower()]
    return inside[0] if len(inside) == 1 else None


def seed(
    question_type: Mapping[str, int], questions: Sequence[Mapping], predictions: Sequence[Mapping]
) -> dict:
    """SEED-Bench: share of answers that are exactly the right letter, in per cent: per type, in
    total, of images and of videos.

    As LLaVA's convert_seed_for_submission.py: "A." is wrong, and so is a question without
    prediction. total, image or video is None where there is no such question.
    """
    said = {str(one["question_id"]): one["text"] for one in predictions}
    right = [said.get(str(one["question_id"])) == one["answer"] for one in questions]
    names = {number: name for name, number in question_type.items()}
    types = sorted({one["question_type_id"] for one in questions})

    def of(key: str, value) -> list[bool]:
        return [r for r, one in zip(right, questions, strict=True) if one[key] == value]

    kinds = {kind: of("data_type", kind) for kind in ("image", "video")}
    return {
        "per_type": {names[number]: mean(of("question_type_id", number), 100) for number in types},
        "total": mean(right, 100) if right else None,
        **{kind: mean(found, 100) if found else None for kind, found in kinds.items()},
    }


def scienceqa(problems: Mapping[str, Mapping], predictions: Sequence[Mapping]) -> dict:
    """ScienceQA: accuracy and accuracy of questions with a picture (LLaVA's eval_science_qa.py),
    and the official groups, in per cent.

    problems: by id, as in problems.json, of the questions asked; predictions: `question_id`, `text`
    and `prompt`, whose <image> says whether a picture was shown. A question without prediction is
    wrong. Returns `llava` (with parsed_index: the choice read from each answer, -1 for none) and
    `official_by_group` (evaluate_acc.py; groups without a question are left out).
    """
    said = {str(one["question_id"]): one for one in predictions}
    read = {
        k: read_choice(said[k]["text"], len(p["choices"])) if k in said else -1
        for k, p in problems.items()
    }
    right = {key: read[key] == problem["answer"] for key, problem in problems.items()}
    shown = [right[key] for key in problems if key in said and "<image>" in said[key]["prompt"]]
    groups = {
        name: [right[key] for key, problem in problems.items() if belongs(problem)]
        for name, belongs in _science_groups(problems).items()
    }
    return {
        "llava": {
            "total": len(right),
            "correct": sum(right.values()),
            "accuracy": mean(list(right.values()), 100),
            "img_accuracy": mean(shown, 100) if shown else None,
            "parsed_index": read,
        },
        "official_by_group": {name: mean(values, 100) for name, values in groups.items() if values},
    }


def _science_groups(problems: Mapping[str, Mapping]) -> dict:
    def one_of(key: str, *values: str):
        return lambda problem: problem[key] in values

    grades = [f"grade{number}" for number in range(1, 13)]
    return {
        **{
            name: one_of("subject", f"{name} science") for name in ("natural", "social", "language")
        },
        "has_text": lambda problem: bool(problem["hint"]),
        "has_image": lambda problem: bool(problem["image"]),
        "no_context": lambda problem: not problem["hint"] and not problem["image"],
        "grade_1_6": one_of("grade", *grades[:6]),
        "grade_7_12": one_of("grade", *grades[6:]),
        "average": lambda problem: True,
        **{
            topic: one_of("topic", topic)
            for topic in sorted({problem["topic"] for problem in problems.values()})
        },
    }


def read_choice(text: str, num_choices: int) -> int:
    """The choice, from 0, that ScienceQA's script of LLaVA reads from "B", "B. ..." or one "The
    answer is B."; -1 for none.
    """
    options = LETTERS[:5]
    if text in tuple(options) or (text[:1] in tuple(options) and text[1:3] == ". "):
        found = text[0]
    else:
        named = re.findall(r"The answer is ([A-Z]).", text)
        found = named[0] if len(named) == 1 else "none"
    return options.index(found) if found in tuple(options[:num_choices]) else -1
