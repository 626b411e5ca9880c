"""Answers as text: the normalisation of the VQA and TextVQA evaluators, and the scores that rest on
it.

The rules are those of the evaluators that leaderboards use, oddities included, because a score is compared with published ones:
VQA (github.com/GT-Vision-Lab/VQA, vqaEval.py) and M4C (github.com/facebookresearch/mmf, m4c_evaluators.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ...schema import UserError

ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Words that are given the apostrophe they lack: where there are several apostrophes, one of them.
APOSTROPHES = (
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
CONTRACTIONS = {
    w[:i] + w[i + 1 :]: w for w in APOSTROPHES.split() for i, c in enumerate(w) if c == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in both evaluators


def vqa_text(answer: str) -> str:
    """An answer as the VQA evaluator compares it, for example "The two dogs." as "2 dogs"."""
    return _words(_punctuation(_one_line(answer)))


def textvqa_text(answer: str) -> str:
    """An answer as the M4C evaluator compares it; also what VQAv2 and VizWiz submissions of LLaVA
    hold.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(_one_line(text)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(text: str) -> str:
    """Marks beside a blank vanish, others become one; all vanish where a comma stands between
    digits.
    """
    vanish = bool(COMMA_IN_NUMBER.search(text))
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if vanish or mark + " " in text or " " + mark in text else " ")
    return PERIOD.sub(
        "", out, count=32
    )  # both evaluators hand over re.UNICODE, which is 32, as the count


def _words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa(annotations: Sequence[Mapping], predictions: Sequence[Mapping]) -> dict:
    """VQA accuracy: an answer is worth min(1, n/3) for n equal references, averaged over the ways
    to leave one reference out.

    annotations: `question_id`, `question_type`, `answer_type` and `answers` [{"answer", ...}] of
    each question; predictions: `question_id` and `answer`. Text is normalised only where the
    references are not all the same. Returns `accuracy` (overall, perQuestionType, perAnswerType)
    and `per_question`, in per cent of two decimals. Raises ValueError for a question without a
    prediction.
    """
    answers = {one["question_id"]: one["answer"] for one in predictions}
    check_all_answered([one["question_id"] for one in annotations], answers)
    worth: dict = {}
    kinds: dict[str, dict[str, list[float]]] = {"perQuestionType": {}, "perAnswerType": {}}
    for one in annotations:
        value = worth[one["question_id"]] = vqa_score(answers[one["question_id"]], one["answers"])
        for kind, key in (("perQuestionType", "question_type"), ("perAnswerType", "answer_type")):
            kinds[kind].setdefault(one[key], []).append(value)
    shares = {
        kind: {name: _percent(values) for name, values in by.items()} for kind, by in kinds.items()
    }
    return {
        "accuracy": {"overall": _percent(list(worth.values())), **shares},
        "per_question": {str(key): _percent([value]) for key, value in worth.items()},
    }


def vqa_score(answer: str, references: Sequence[Mapping]) -> float:
    """What an answer is worth against the references [{"answer", ...}] of a question, 0 to 1."""
    answer = _one_line(answer)
    references = [{**one, "answer": _one_line(one["answer"])} for one in references]
    if len({one["answer"] for one in references}) > 1:
        answer = vqa_text(answer)
        references = [{**one, "answer": vqa_text(one["answer"])} for one in references]
    return _leaving_one_out(answer, references, lambda one: one["answer"])


def _leaving_one_out(answer: str, references: Sequence, text_of) -> float:
    worth = []
    for left_out in references:
        equal = [one for one in references if one != left_out and text_of(one) == answer]
        worth.append(min(1, len(equal) / 3))
    return sum(worth) / len(worth)


def textvqa(predictions: Sequence[Mapping]) -> dict:
    """TextVQA accuracy, with ST-VQA accuracy and ANLS on the same pairs, all shares of 1.

    predictions: `pred_answer` and `gt_answers` (ten texts) of each question. Returns
    `textvqa_accuracy`, `per_question`, `stvqa_accuracy` and `stvqa_anls`.
    """
    check_all_answered(predictions, list(predictions))
    each = [textvqa_score(one["pred_answer"], one["gt_answers"]) for one in predictions]
    among = [
        textvqa_text(p["pred_answer"]) in {textvqa_text(a) for a in p["gt_answers"]}
        for p in predictions
    ]
    alike = [
        max(anls(one["pred_answer"], answer) for answer in one["gt_answers"]) for one in predictions
    ]
    return {
        "textvqa_accuracy": sum(each) / len(each),
        "per_question": each,
        "stvqa_accuracy": sum(among) / len(among),
        "stvqa_anls": sum(alike) / len(alike),
    }


def textvqa_score(answer: str, references: Sequence[str]) -> float:
    """What an answer is worth against ten reference texts, 0 to 1; ValueError unless there are
    ten.
    """
    if len(references) != 10:
        raise UserError(
            f"TextVQA scores against 10 reference answers, but there are {len(references)}:"
            f" {references!r}"
        )
    numbered = list(enumerate(textvqa_text(one) for one in references))
    return _leaving_one_out(textvqa_text(answer), numbered, lambda one: one[1])


def anls(one: str, other: str) -> float:
    """Normalised Levenshtein similarity of two texts, 0 where it is below a half (Biten et al.
    2019, ST-VQA).
    """
    one, other = one.lower().strip(), other.lower().strip()
    longest = max(len(one), len(other))
    alike = 1 - edit_distance(one, other) / longest if longest else 1.0
    return alike if alike >= 0.5 else 0.0


def edit_distance(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of a character that make one text the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def _percent(values: Sequence[float]) -> float:
    return round(100 * float(sum(values)) / len(values), 2)


def mean(values: Sequence[float], times: float = 1.0) -> float:
    """The mean of numbers times a factor; 0 of none."""
    return times * sum(values) / len(values) if values else 0.0


def check_all_answered(asked: Sequence, answered: Mapping) -> None:
    """Raise ValueError unless there is a question, and a prediction for each."""
    if not asked:
        raise UserError("there is nothing to score: the list of questions is empty")
    if missing := [one for one in asked if one not in answered]:
        raise UserError(
            f"{len(missing)} of {len(asked)} questions have no prediction, such as {missing[:3]};"
            " answer all"
        )
