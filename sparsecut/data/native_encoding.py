"""Batches of a finished model's own processor with labels: its expansion, padding and names of
inputs are its business.

The ids trained on are those that the same text and pictures have at inference. Where the answers stand is known by characters of the
text in which the processor has expanded its placeholders; which characters those became, it says itself.
"""

from __future__ import annotations

import copy
import math

import torch
from PIL import Image
from torch import Tensor

from ..prompts import run_processor, takes_suffix
from ..schema import UserError
from .encoding import IGNORED, check_learned, check_length, written
from .errors import RecordError
from .examples import Example

PER_TOKEN = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "labels",
)  # [B, L] each


def encode_batch(
    examples: list[Example],
    processor,
    template: str = "chat",
    *,
    max_length: int | None = None,
    limit: int | None = None,
    max_images: int | None = None,
    pictures: list[list[Image.Image]] | None = None,
) -> dict[str, Tensor]:
    """What a base's own processor makes of conversations and their pictures, padded on the right,
    and labels [B, L].

    The ids of a conversation are those that its text and pictures have at inference. Labels are
    found by characters of the text in which the processor has expanded the placeholders, so nothing
    is ever tokenised in pieces. limit: longer ones are refused; max_length: longer ones are cut;
    max_images: more image tokens are refused. Raises ValueError naming a record.
    """
    texts, spans = zip(
        *(written(example, processor, template) for example in examples), strict=True
    )
    pictures = pictures if pictures is not None else [example.pictures() for example in examples]
    try:
        features = _labelled(processor, list(texts), list(spans), pictures)
    except ValueError as error:
        places = ", ".join(example.place for example in examples[:3])
        problem = f"{type(processor).__name__} refuses: {error}"
        raise RecordError(places, problem) from error
    mask = features["attention_mask"]
    for row, example in enumerate(examples):
        try:
            check_length(
                features["input_ids"][row][mask[row] > 0].tolist(),
                processor,
                max_length,
                limit,
                max_images,
            )
            check_learned(
                features["labels"][row, :max_length].tolist(), int(mask[row].sum()), max_length
            )
        except UserError as error:
            raise RecordError(example.place, str(error)) from None
    return {
        name: value[:, :max_length] if name in PER_TOKEN else value
        for name, value in features.items()
    }


def _labelled(processor, texts: list[str], spans: list, pictures: list) -> dict[str, Tensor]:
    """The processor's features, and labels by the spans' characters."""
    if takes_suffix(processor):
        cut = [start for ((start, _),) in spans]
        suffixes = [text[start:] for text, start in zip(texts, cut, strict=True)]
        texts = [text[:start] for text, start in zip(texts, cut, strict=True)]
        features = run_processor(processor, texts, pictures, padding_side="right", suffix=suffixes)
        return {**features, "labels": torch.as_tensor(features["labels"])}
    recorder, calls = _recording(processor)
    features = dict(
        run_processor(recorder, texts, pictures, padding_side="right", return_offsets_mapping=True)
    )
    places, ids = torch.as_tensor(features.pop("offset_mapping")), features["input_ids"]
    expanded, replaced = calls[0] if calls else (texts, [[] for _ in texts])
    if expanded != texts or (
        not calls and any(places[row].max() > len(text) for row, text in enumerate(texts))
    ):
        raise UserError(
            "it changes texts before it expands placeholders, so it is not known where answers"
            " stand"
        )
    start, end = places[..., 0], places[..., 1]
    learned = torch.zeros_like(ids, dtype=torch.bool)
    for row, found in enumerate(spans):
        for first, last in moved(found, replaced[row]):
            covers = (start[row] < last) & (end[row] > first)
            # Some tokenizers give a blank no width; (0, 0) is a token that does not come from the
            # text.
            thin = (start[row] >= first) & (start[row] < last) & (end[row] > 0)
            learned[row] |= torch.where(start[row] < end[row], covers, thin)
    learned &= features["attention_mask"] > 0
    return {**features, "labels": ids.masked_fill(~learned, IGNORED)}


def _recording(processor) -> tuple[object, list[tuple[list[str], list]]]:
    """A copy of the processor, and a list for its next call: the texts it expands, and which
    characters of each became which.
    """
    copied, calls = copy.copy(processor), []

    def expand(texts, *args, **kwargs):
        before = list(texts)
        texts, found = processor.get_text_with_replacements(texts, *args, **kwargs)
        calls.append((before, found))
        return texts, found

    copied.get_text_with_replacements = expand
    return copied, calls


def moved(spans: list[tuple[int, int]], replaced: list[dict]) -> list[tuple[int, int]]:
    """Spans of a text as they lie once its placeholders have been replaced (`span` -> `new_span` of
    each).
    """
    gained = [(r["span"][1], r["new_span"][1] - r["span"][1]) for r in replaced]

    def shifted(place: int) -> int:
        return place + [0, *(gain for end, gain in gained if end <= place)][-1]

    return [(shifted(first), shifted(last)) for first, last in spans]


def num_tokens_about(processor, text: str, pictures: list[Image.Image]) -> float:
    """How many tokens a text and its pictures take by the processor's own quick rule; infinite
    where it has none.
    """
    num = len(processor.tokenizer(text)["input_ids"])
    if not pictures:
        return num
    try:
        of_pictures = processor._get_num_multimodal_tokens(
            image_sizes=[(p.height, p.width) for p in pictures]
        )
    except (AttributeError, TypeError, KeyError, ValueError):
        return math.inf
    return num + sum(of_pictures["num_image_tokens"])
