"""A few questions with the heat maps of a model's own answers, for a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from ..data.examples import Example
from ..schema import UserError
from .heat_maps import HeatMaps, answer_example, make_heat_maps


@dataclass
class MappedQuestion:
    """One question and where the model looked to answer it.

    Attributes:
        question: The last question, without placeholders.
        reference: The right answer, if the record has one.
        images: Its images, upright.
        maps: The maps of the model's own answer.
    """

    question: str
    reference: str | None
    images: list[Image.Image]
    maps: HeatMaps


def map_questions(
    model,
    processor,
    examples: Sequence[Example],
    number: int,
    *,
    max_new_tokens: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[MappedQuestion], str]:
    """Make the maps of some questions, evenly chosen among those with images.

    Args:
        model: A SparseCut model.
        processor: Its processor.
        examples: Questions.
        number: How many of them.
        max_new_tokens: The longest answer, in tokens.
        progress: Called with the number of finished questions, and of all.

    Returns:
        The questions, and why there are fewer than asked for; "" where there are not.
    """
    with_images = [example for example in examples if example.images]
    count = min(number, len(with_images))
    chosen = [with_images[place * len(with_images) // count] for place in range(count)]
    mapped, reason = [], ""
    for done, example in enumerate(chosen, start=1):
        try:
            mapped.append(_map_question(model, processor, example, max_new_tokens))
        except UserError as error:
            reason = str(error)
        progress(done, count)
    return mapped, reason


def _map_question(model, processor, example: Example, max_new_tokens: int) -> MappedQuestion:
    *question, last = example.messages
    reference = last["content"] if last["role"] == "assistant" else None
    asked = replace(example, messages=question) if reference is not None else example
    answered = answer_example(model, processor, asked, max_new_tokens)
    text = answered.messages[-2]["content"].replace("<image>", "").strip()
    maps = make_heat_maps(model, processor, answered)
    return MappedQuestion(text, reference, example.load_images(), maps)
