"""Answers judged: without the thoughts before them, which the predictions keep."""

from __future__ import annotations

import logging

from ..chat_templates.thoughts import Answer, find_answer, find_open_thought, strip_thoughts
from .exact_match import METRICS

logger = logging.getLogger(__name__)


def judge(record: dict, answer: Answer, metric: str | None) -> dict:
    """The fields that an answer adds to a record: itself, and whether it is correct.

    `prediction` is all that the model has written. Where it has thoughts, `answer` is the rest,
    which is judged. Thoughts of the reference do not count either.

    Args:
        record: A line of predictions.jsonl, of which `reference` is read.
        answer: The model's answer.
        metric: A key of `exact_match.METRICS`. None leaves the answer unjudged.
    """
    reference = strip_thoughts(record["reference"])
    correct = METRICS[metric](answer.text, reference) if metric else None
    fields = {"prediction": answer.raw, "correct": correct}
    return fields if answer.text == answer.raw else {**fields, "answer": answer.text}


def get_answer(record: dict) -> str:
    """The answer in a line of predictions.jsonl, without thoughts, as it is scored and shown."""
    if isinstance(record.get("answer"), str):
        return record["answer"]
    text = record["prediction"]
    # Lines of older versions hold thoughts, but no answer without them.
    place = find_answer(text, find_open_thought(record["prompt"]))
    if place == 0:
        return text
    return "" if place is None else text[place:].strip()


def warn_of_unfinished(num_unfinished: int) -> None:
    """Warn of answers that are empty because the model was still thinking."""
    if num_unfinished:
        logger.warning(
            "%d answers end inside of a thought, so they are empty; raise max_new_tokens, or switch"
            " thinking off (chat_template_kwargs, where the chat template has such an argument)",
            num_unfinished,
        )
