"""What a question's text alone gives away: the commonest answer to it in training.

A question whose text was never trained on gets the commonest answer of all. text_baseline.json in a
study's folder holds these answers to the questions of the test split.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..data.examples import IMAGE, Example
from ..evaluation.exact_match import exact_match, normalize
from ..schema import write_text_file

TEXT_BASELINE = "text_baseline.json"


def write_text_baseline(out: Path, trained: Iterable[Example], asked: Sequence[Example]) -> None:
    """Answer the questions by their text, and write the answers and which are right.

    Args:
        out: The study's folder.
        trained: All records of training.
        asked: The questions of the evaluation, in order.
    """
    counts: dict[str, Counter] = {}
    overall: Counter = Counter()
    for example in trained:
        for question, answer in _list_pairs(example):
            counts.setdefault(question, Counter())[answer] += 1
            overall[answer] += 1

    answers = []
    correct = []
    for example in asked:
        *_, (question, reference) = _list_pairs(example)
        known = counts.get(question, overall)
        answer = known.most_common(1)[0][0] if known else ""
        answers.append(answer)
        correct.append(exact_match(answer, reference))

    result = {"ids": [example.id for example in asked], "answers": answers, "correct": correct}
    write_text_file(out / TEXT_BASELINE, json.dumps(result))


def _list_pairs(example: Example) -> Iterator[tuple[str, str]]:
    """(question, answer) of every turn, as they are compared."""
    question = ""
    for message in example.messages:
        if message["role"] == "user":
            question = normalize(message["content"].replace(IMAGE, ""))
        elif message["role"] == "assistant":
            yield question, normalize(message["content"])
