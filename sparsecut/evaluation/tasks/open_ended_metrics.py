"""Scores of VQAv2, VizWiz and TextVQA, and how their evaluators normalize answers.

The rules are those of the evaluators that leaderboards use, oddities included, so that a score can
be compared with published ones: VQA (github.com/GT-Vision-Lab/VQA, vqaEval.py) and M4C
(github.com/facebookresearch/mmf, m4c_evaluators.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from ...schema import UserError

ARTICLES = ("a", "an", "the")
DIGITS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Words that get the apostrophe they lack, or one of several.
WITH_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't"
    " haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't"
    " mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've"
    " should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've"
    " someone'll someone's something'd something'd've something'll that's there'd there'd've"
    " there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't"
    " what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's"
    " who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've"
    " you'd you'd've you'll you're you've"
)


def _build_contractions() -> dict[str, str]:
    """The words with an apostrophe by their forms that lack one."""
    contractions = {}
    for word in WITH_APOSTROPHES.split():
        for i, character in enumerate(word):
            if character == "'":
                contractions[word[:i] + word[i + 1 :]] = word
    contractions["somebody'd"] = "somebodyd"  # the wrong way round in both evaluators
    return contractions


CONTRACTIONS = _build_contractions()


def normalize_vqa(answer: str) -> str:
    """An answer as the VQA evaluator compares it, for example "The two dogs." as "2 dogs"."""
    return _normalize_words(_remove_punctuation(_join_lines(answer)))


def normalize_textvqa(answer: str) -> str:
    """An answer as the M4C evaluator compares it.

    LLaVA's submissions for VQAv2 and VizWiz are normalized in this way, too.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _normalize_words(_remove_punctuation(_join_lines(text)))


def _join_lines(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _remove_punctuation(text: str) -> str:
    """Replace punctuation by a space, or by nothing where it stands beside a space.

    Where a comma stands between digits, all punctuation is removed.
    """
    has_number = bool(COMMA_IN_NUMBER.search(text))
    result = text
    for mark in PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if has_number or is_beside_space else " ")
    # Both evaluators pass re.UNICODE, which is 32, as the count.
    return PERIOD.sub("", result, count=32)


def _normalize_words(text: str) -> str:
    """Write numbers as digits, leave out articles, and add missing apostrophes."""
    words = []
    for word in text.lower().split():
        word = DIGITS.get(word, word)
        if word not in ARTICLES:
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def vqa(annotations: Sequence[Mapping], predictions: Sequence[Mapping]) -> dict:
    """VQA accuracy (Antol et al., 2015).

    An answer scores min(1, n / 3) where n references are equal to it, averaged over the ways to
    leave one reference out. Text is normalized only where the references differ.

    Args:
        annotations: `question_id`, `question_type`, `answer_type` and `answers`
            ([{"answer", ...}]) of every question.
        predictions: `question_id` and `answer` of every question.

    Returns:
        `accuracy` (overall, perQuestionType, perAnswerType) and `per_question`, in per cent with
        two decimals.

    Raises:
        UserError: A question has no prediction.
    """
    answers = {prediction["question_id"]: prediction["answer"] for prediction in predictions}
    check_all_answered([annotation["question_id"] for annotation in annotations], answers)
    scores: dict = {}
    by_question_type: dict[str, list[float]] = {}
    by_answer_type: dict[str, list[float]] = {}
    for annotation in annotations:
        question_id = annotation["question_id"]
        score = score_vqa_answer(answers[question_id], annotation["answers"])
        scores[question_id] = score
        by_question_type.setdefault(annotation["question_type"], []).append(score)
        by_answer_type.setdefault(annotation["answer_type"], []).append(score)
    return {
        "accuracy": {
            "overall": _compute_percentage(list(scores.values())),
            "perQuestionType": _compute_percentages(by_question_type),
            "perAnswerType": _compute_percentages(by_answer_type),
        },
        "per_question": {str(key): _compute_percentage([score]) for key, score in scores.items()},
    }


def score_vqa_answer(answer: str, references: Sequence[Mapping]) -> float:
    """VQA's score of one answer against a question's references [{"answer", ...}], 0 to 1."""
    answer = _join_lines(answer)
    references = [{**item, "answer": _join_lines(item["answer"])} for item in references]
    if len({item["answer"] for item in references}) > 1:
        answer = normalize_vqa(answer)
        references = [{**item, "answer": normalize_vqa(item["answer"])} for item in references]
    return _leave_one_out(answer, references, lambda reference: reference["answer"])


def _leave_one_out(answer: str, references: Sequence, get_text: Callable) -> float:
    scores = []
    for left_out in references:
        others = [reference for reference in references if reference != left_out]
        num_equal = sum(get_text(reference) == answer for reference in others)
        scores.append(min(1, num_equal / 3))
    return sum(scores) / len(scores)


def textvqa(predictions: Sequence[Mapping]) -> dict:
    """TextVQA accuracy (Singh et al., 2019), with accuracy and ANLS as ST-VQA defines them.

    Args:
        predictions: `pred_answer` and `gt_answers` (ten texts) of every question.

    Returns:
        `textvqa_accuracy`, `per_question`, `stvqa_accuracy` and `stvqa_anls`, each 0 to 1.

    Raises:
        UserError: There is no question, or one has not ten references.
    """
    check_all_answered(predictions, list(predictions))
    scores = []
    matches = []
    similarities = []
    for prediction in predictions:
        answer = prediction["pred_answer"]
        references = prediction["gt_answers"]
        scores.append(score_textvqa_answer(answer, references))
        normalized = {normalize_textvqa(reference) for reference in references}
        matches.append(normalize_textvqa(answer) in normalized)
        similarities.append(max(anls(answer, reference) for reference in references))
    return {
        "textvqa_accuracy": sum(scores) / len(scores),
        "per_question": scores,
        "stvqa_accuracy": sum(matches) / len(matches),
        "stvqa_anls": sum(similarities) / len(similarities),
    }


def score_textvqa_answer(answer: str, references: Sequence[str]) -> float:
    """TextVQA's score of one answer against ten reference texts, 0 to 1.

    Raises:
        UserError: There are not ten references.
    """
    if len(references) != 10:
        raise UserError(
            f"TextVQA scores against 10 reference answers, but there are {len(references)}:"
            f" {references!r}"
        )
    numbered = [(i, normalize_textvqa(reference)) for i, reference in enumerate(references)]
    return _leave_one_out(normalize_textvqa(answer), numbered, lambda reference: reference[1])


def anls(text: str, other: str) -> float:
    """Normalized Levenshtein similarity of two texts, 0 where below 0.5 (Biten et al., 2019)."""
    text = text.lower().strip()
    other = other.lower().strip()
    length = max(len(text), len(other))
    similarity = 1 - edit_distance(text, other) / length if length else 1.0
    return similarity if similarity >= 0.5 else 0.0


def edit_distance(text: str, other: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements of a character."""
    previous = list(range(len(other) + 1))
    for i, a in enumerate(text, start=1):
        current = [i]
        for j, b in enumerate(other, start=1):
            deleted = previous[j] + 1
            inserted = current[j - 1] + 1
            replaced = previous[j - 1] + (a != b)
            current.append(min(deleted, inserted, replaced))
        previous = current
    return previous[-1]


def _compute_percentages(scores: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: _compute_percentage(values) for name, values in scores.items()}


def _compute_percentage(values: Sequence[float]) -> float:
    return round(100 * float(sum(values)) / len(values), 2)


def mean(values: Sequence[float], factor: float = 1.0) -> float:
    """The mean of numbers times a factor; 0 where there are none."""
    return factor * sum(values) / len(values) if values else 0.0


def check_all_answered(questions: Sequence, answers: Mapping) -> None:
    """Raise UserError unless there is a question, and an answer to each."""
    if not questions:
        raise UserError("there is nothing to score: the list of questions is empty")
    missing = [question for question in questions if question not in answers]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(questions)} questions have no prediction, such as"
            f" {missing[:3]}; answer all"
        )
