"""Scores of MMBench, SEED-Bench and ScienceQA, which ask for an option's letter.

Each function returns what the benchmark's own script computes from the same input.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence

from ...schema import UserError
from .open_ended_metrics import mean

LETTERS = string.ascii_uppercase
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
REFUSED = "Z"  # VLMEvalKit's letter for a refusal
BRACKETS_AND_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
ROTATIONS = 1_000_000  # a row whose index is larger is a rotation of the row index % ROTATIONS


def mmbench(rows: Sequence[Mapping], predictions: Sequence[str]) -> dict:
    """MMBench: circular and plain accuracy, 0 to 1, with options read without a judge.

    Source: multiple_choice.py of VLMEvalKit. In circular accuracy a question counts only where all
    rotations of its options are answered rightly.

    Args:
        rows: `index`, `answer`, options A, B, ... and, for the table, `category` and `l2-category`.
            A row whose index exceeds a million is a rotation of the row index % 1,000,000.
        predictions: The answer to every row, in the same order.

    Returns:
        `circular_accuracy` (Overall, then by category), `circular_hit` by question,
        `vanilla_accuracy` over all rows, and `inferred`. The last is the option read from each
        answer; None, which is wrong, where no option could be read.

    Raises:
        UserError: There is no row, or not one answer for each.
    """
    if len(rows) != len(predictions) or not rows:
        raise UserError(
            f"there are {len(rows)} rows and {len(predictions)} answers; give one answer for each"
            " row, and at least one row"
        )
    inferred = []
    right = []
    hits: dict[int, bool] = {}
    for row, prediction in zip(rows, predictions, strict=True):
        letter = infer_option(prediction, get_options(row))
        inferred.append(letter)
        right.append(letter == row["answer"])
        number = int(row["index"]) % ROTATIONS
        hits[number] = hits.get(number, True) and right[-1]
    unrotated = [row for row in rows if int(row["index"]) < ROTATIONS]
    return {
        "circular_accuracy": _tabulate_hits(unrotated, hits),
        "circular_hit": {str(int(row["index"])): int(hits[int(row["index"])]) for row in unrotated},
        "vanilla_accuracy": mean(right),
        "inferred": inferred,
    }


def _tabulate_hits(rows: Sequence[Mapping], hits: Mapping[int, bool]) -> dict[str, float]:
    """Circular accuracy overall, by coarse category and by category."""
    scores = [float(hits[int(row["index"])]) for row in rows]
    table = {"Overall": mean(scores)}
    for level in ("l2-category", "category"):
        by_category: dict[str, list[float]] = {}
        for row, score in zip(rows, scores, strict=True):
            category = row.get(level)
            if category:
                by_category.setdefault(category, []).append(score)
        for category in sorted(by_category):
            name = ABBREVIATIONS.get(category, category)
            table[name] = mean(by_category[category])
    return table


def get_options(row: Mapping) -> dict[str, str]:
    """The options of a row by letter, without columns that are missing or empty."""
    options = {}
    for letter in LETTERS:
        if letter in row and not is_empty(row[letter]):
            options[letter] = str(row[letter])
    return options


def is_empty(value) -> bool:
    """Whether a cell of a table holds nothing."""
    is_nan = value != value
    return value is None or is_nan or value == ""


def infer_option(answer: str, options: Mapping[str, str]) -> str | None:
    """Read the letter of the option that an answer names, as VLMEvalKit does without a judge.

    First by its letter as one of the last four words, then by "answer is X", then by the text of a
    single option in the answer.

    Returns:
        The letter, "Z" for a refusal, or None where no option or several are named.
    """
    answer = str(answer)
    if any(refusal in answer for refusal in REFUSALS):
        return REFUSED
    words = answer.translate(BRACKETS_AND_MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED
    match = ANSWER_IS.search(answer)
    if match and match[1].upper() in options:
        return match[1].upper()
    if len(answer) > 2 * sum(len(str(text)) for text in options.values()):
        return None
    contained = [letter for letter, text in options.items() if str(text).lower() in answer.lower()]
    return contained[0] if len(contained) == 1 else None


def seed(
    question_type: Mapping[str, int], questions: Sequence[Mapping], predictions: Sequence[Mapping]
) -> dict:
    """SEED-Bench: answers that are exactly the right letter, in per cent.

    Source: LLaVA's convert_seed_for_submission.py, where "A." is wrong, and so is a question
    without a prediction.

    Args:
        question_type: Numbers of the types by name.
        questions: `question_id`, `answer`, `question_type_id` and `data_type` of every question.
        predictions: `question_id` and `text` of every question.

    Returns:
        `per_type` by name; `total`, `image` and `video`, None where there is no such question.
    """
    answers = {}
    for prediction in predictions:
        answers[str(prediction["question_id"])] = prediction["text"]
    names = {number: name for name, number in question_type.items()}
    all_right = []
    by_type: dict[int, list[bool]] = {}
    by_kind: dict[str, list[bool]] = {"image": [], "video": []}
    for question in questions:
        answer = answers.get(str(question["question_id"]))
        right = answer == question["answer"]
        all_right.append(right)
        by_type.setdefault(question["question_type_id"], []).append(right)
        by_kind.setdefault(question["data_type"], []).append(right)
    return {
        "per_type": {names[number]: mean(by_type[number], 100) for number in sorted(by_type)},
        "total": mean(all_right, 100) if all_right else None,
        "image": mean(by_kind["image"], 100) if by_kind["image"] else None,
        "video": mean(by_kind["video"], 100) if by_kind["video"] else None,
    }


def scienceqa(problems: Mapping[str, Mapping], predictions: Sequence[Mapping]) -> dict:
    """ScienceQA: accuracy as in LLaVA's script, and the official groups, in per cent.

    Source: eval_science_qa.py of LLaVA and evaluate_acc.py of ScienceQA. A question without a
    prediction is wrong.

    Args:
        problems: The questions by id, as in problems.json.
        predictions: `question_id`, `text` and `prompt` of every question. `<image>` in the prompt
            tells that an image was shown.

    Returns:
        `llava`: total, correct, accuracy, img_accuracy (None without images) and parsed_index,
        which is the choice read from each answer, -1 for none. `official_by_group`: accuracy by
        group, without groups that have no question.
    """
    by_id = {str(prediction["question_id"]): prediction for prediction in predictions}
    parsed = {}
    right = {}
    right_with_image = []
    for key, problem in problems.items():
        parsed[key] = -1
        if key in by_id:
            parsed[key] = read_choice(by_id[key]["text"], len(problem["choices"]))
        right[key] = parsed[key] == problem["answer"]
        if key in by_id and "<image>" in by_id[key]["prompt"]:
            right_with_image.append(right[key])
    groups = {}
    for name, is_member in _get_scienceqa_groups(problems).items():
        members = [right[key] for key, problem in problems.items() if is_member(problem)]
        if members:
            groups[name] = mean(members, 100)
    return {
        "llava": {
            "total": len(right),
            "correct": sum(right.values()),
            "accuracy": mean(list(right.values()), 100),
            "img_accuracy": mean(right_with_image, 100) if right_with_image else None,
            "parsed_index": parsed,
        },
        "official_by_group": groups,
    }


def _get_scienceqa_groups(problems: Mapping[str, Mapping]) -> dict[str, Callable]:
    """The official groups, each as a predicate on problems."""

    def has(key: str, *values: str) -> Callable:
        return lambda problem: problem[key] in values

    grades = [f"grade{number}" for number in range(1, 13)]
    groups = {
        "natural": has("subject", "natural science"),
        "social": has("subject", "social science"),
        "language": has("subject", "language science"),
        "has_text": lambda problem: bool(problem["hint"]),
        "has_image": lambda problem: bool(problem["image"]),
        "no_context": lambda problem: not problem["hint"] and not problem["image"],
        "grade_1_6": has("grade", *grades[:6]),
        "grade_7_12": has("grade", *grades[6:]),
        "average": lambda problem: True,
    }
    for topic in sorted({problem["topic"] for problem in problems.values()}):
        groups[topic] = has("topic", topic)
    return groups


def read_choice(text: str, num_choices: int) -> int:
    """Read the choice, from 0, as LLaVA's script does for ScienceQA; -1 where it reads none.

    It reads "B", "B. ..." and a single "The answer is B.".
    """
    letters = list(LETTERS[:5])
    starts_with_letter = text[:1] in letters
    ends_after_letter = len(text) == 1 or text[1:3] == ". "
    letter = ""
    if starts_with_letter and ends_after_letter:
        letter = text[0]
    else:
        named = re.findall(r"The answer is ([A-Z]).", text)
        if len(named) == 1:
            letter = named[0]
    if letter not in letters[:num_choices]:
        return -1
    return letters.index(letter)
