"""Examples for an upgraded model, encoded by its base's own processor.

The processor expands placeholders, pads, and names the inputs. Training uses the ids that the same
text and images have at inference. The answers are found by their characters in the text whose
placeholders the processor has expanded. The processor itself says which characters became which.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from ..prompts import run_processor, takes_suffix
from ..schema import UserError
from .errors import RecordError
from .examples import Example
from .labels import IGNORED
from .length_limits import NO_LIMITS, Limits
from .rendering import Span, render_example
from .unknown_records import KnowsUnknownToken, UnknownText, find_unknown_text

# Inputs with one value for each token, [B, L].
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
NEAR_LIMIT = 0.5  # records longer than this fraction of a limit, as estimated, are measured


@dataclass(frozen=True)
class NativeExampleEncoder(KnowsUnknownToken):
    """Encodes examples with an upgraded model's own processor, which prepares whole batches.

    Attributes are those of `ExampleEncoder`. An item holds the example, its text, the spans of the
    text that are targets, and its images.
    """

    processor: object
    template: str = "chat"
    limits: Limits = NO_LIMITS

    # Image tokens are known only once a batch is prepared: images are counted in their place.
    tokens_per_image: ClassVar[int] = 1
    # Some records are prepared as a whole, which uses several threads already.
    checks_in_parallel: ClassVar[bool] = False

    def check(
        self, example: Example, *, open_images: bool = False, is_first: bool = False
    ) -> UnknownText | None:
        """Raise RecordError where a model cannot be trained on the example.

        Preparing all images would take as long as an epoch's preparation. So only the first record
        is prepared and, with open_images, those near a limit. `build_batch` refuses what is too
        long after all.
        """
        encoded = self.encode(example)
        if is_first or open_images:
            images = example.load_images()
            if is_first or self._is_near_limit(encoded["text"], images):
                self.build_batch([{**encoded, **self.encode_images(images)}])
        return self.find_unknown(example, encoded)

    def find_unknown(self, example: Example, encoded: dict) -> UnknownText | None:
        """Return where an example that was encoded has words that the tokenizer does not know."""
        if self.unknown_id is None:
            return None
        return find_unknown_text(self.processor, encoded["text"], encoded["spans"], self.unknown_id)

    def _is_near_limit(self, text: str, images: list[Image.Image]) -> bool:
        max_length = self.limits.max_length or math.inf
        model_limit = self.limits.model_limit or math.inf
        estimate = estimate_length(self.processor, text, images)
        return estimate > NEAR_LIMIT * min(max_length, model_limit)

    def encode(self, example: Example) -> dict:
        """Return the example, its text, and the spans of it that are targets.

        Raises:
            RecordError: The example cannot be rendered.
        """
        try:
            if self.template == "plain":
                raise UserError(
                    "template 'plain' leaves out the prompt format, which a pretrained VLM needs;"
                    " use template: chat"
                )
            text, spans = render_example(example, self.processor, self.template, add_end_token=True)
        except UserError as error:
            raise RecordError(example.place, str(error)) from None
        return {"example": example, "text": text, "spans": spans}

    def encode_images(self, images: list[Image.Image]) -> dict:
        """Return the images as they are: the processor takes those of a batch together."""
        return {"images": images}

    def get_length(self, encoded: dict) -> int:
        """Return 0, as the length is known only in a batch."""
        return 0

    def get_lengths(self, encoded: Sequence[dict]) -> list[int]:
        """Return the tokens of each text, with one token for each image."""
        texts = [item["text"] for item in encoded]
        return [len(ids) for ids in self.processor.tokenizer(texts)["input_ids"]]

    def build_batch(self, items: Sequence[dict], pad_to: int = 1) -> dict[str, Tensor]:
        """Return the processor's inputs for some items, padded on the right, and labels [B, L].

        Args:
            items: Items of a dataset.
            pad_to: Has no effect, as the processor pads.

        Raises:
            RecordError: The processor refuses the batch, or a record exceeds a limit.
        """
        texts = [item["text"] for item in items]
        spans = [item["spans"] for item in items]
        images = [item["images"] for item in items]
        examples = [item["example"] for item in items]
        try:
            features = _label_batch(self.processor, texts, spans, images)
        except ValueError as error:  # processors refuse images and texts in this way
            places = ", ".join(example.place for example in examples[:3])
            problem = f"{type(self.processor).__name__} refuses: {error}"
            raise RecordError(places, problem) from error
        self._check_rows(features, examples)
        return self._cut(features)

    def _check_rows(self, features: dict[str, Tensor], examples: list[Example]) -> None:
        for row, example in enumerate(examples):
            is_token = features["attention_mask"][row] > 0
            ids = features["input_ids"][row][is_token].tolist()
            labels = features["labels"][row][is_token].tolist()
            try:
                self.limits.check(ids, labels, self.processor.image_token_ids)
            except UserError as error:
                raise RecordError(example.place, str(error)) from None

    def _cut(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        cut = dict(features)
        for name in PER_TOKEN:
            if name in features:
                cut[name] = features[name][:, : self.limits.max_length]
        return cut

    def get_image_inputs(self, item: dict) -> dict[str, Tensor]:
        """Return the processor's inputs for the item's images."""
        batch = self.build_batch([item])
        return {name: value for name, value in batch.items() if name not in PER_TOKEN}


def _label_batch(
    processor, texts: list[str], spans: list[list[Span]], images: list[list[Image.Image]]
) -> dict[str, Tensor]:
    """The processor's inputs for a batch, and labels by the spans' characters."""
    if takes_suffix(processor):
        return _label_suffixes(processor, texts, spans, images)
    recorder, calls = _record_expansions(processor)
    features = dict(
        run_processor(recorder, texts, images, padding_side="right", return_offsets_mapping=True)
    )
    offsets = torch.as_tensor(features.pop("offset_mapping"))
    original, replacements = calls[0] if calls else (texts, [[] for _ in texts])
    _check_unchanged(texts, original, offsets if not calls else None)
    ids = features["input_ids"]
    is_target = torch.zeros_like(ids, dtype=torch.bool)
    for row, row_spans in enumerate(spans):
        for span in move_spans(row_spans, replacements[row]):
            is_target[row] |= _find_covered(offsets[row], span)
    is_target &= features["attention_mask"] > 0
    return {**features, "labels": ids.masked_fill(~is_target, IGNORED)}


def _label_suffixes(
    processor, texts: list[str], spans: list[list[Span]], images: list[list[Image.Image]]
) -> dict[str, Tensor]:
    """The inputs of a processor that takes question and answer apart and makes labels itself."""
    prefixes, suffixes = [], []
    for text, ((start, _),) in zip(texts, spans, strict=True):
        prefixes.append(text[:start])
        suffixes.append(text[start:])
    features = run_processor(processor, prefixes, images, padding_side="right", suffix=suffixes)
    return {**features, "labels": torch.as_tensor(features["labels"])}


def _record_expansions(processor) -> tuple[object, list[tuple[list[str], list]]]:
    """A copy of the processor, and a list that its next call extends.

    Each entry holds the texts before the processor expanded placeholders, and for each text which
    characters became which.
    """
    recorder = copy.copy(processor)
    calls = []

    def expand(texts, *args, **kwargs):
        original = list(texts)
        texts, replacements = processor.get_text_with_replacements(texts, *args, **kwargs)
        calls.append((original, replacements))
        return texts, replacements

    recorder.get_text_with_replacements = expand
    return recorder, calls


def _check_unchanged(texts: list[str], original: list[str], offsets: Tensor | None) -> None:
    """Raise UserError where the processor changed texts before it expanded placeholders.

    Args:
        texts: The texts that the processor was called with.
        original: The texts in which it expanded placeholders.
        offsets: [B, L, 2], the characters of each token where it expanded nothing.
    """
    is_changed = original != texts
    if offsets is not None:
        is_changed |= any(offsets[row].max() > len(text) for row, text in enumerate(texts))
    if is_changed:
        raise UserError(
            "it changes texts before it expands placeholders, so it is not known where answers"
            " stand"
        )


def _find_covered(offsets: Tensor, span: Span) -> Tensor:
    """Which tokens, bool [L], a span covers a character of; offsets: [L, 2]."""
    start, end = offsets[:, 0], offsets[:, 1]
    first, last = span
    covered = (start < last) & (end > first)
    # Some tokenizers give whitespace no width. A token at (0, 0) does not come from the text.
    covered_without_width = (start >= first) & (start < last) & (end > 0)
    return torch.where(start < end, covered, covered_without_width)


def move_spans(spans: list[Span], replacements: list[dict]) -> list[Span]:
    """Return the spans of a text as they lie once its placeholders have been replaced.

    Args:
        spans: Spans of the text before.
        replacements: For each placeholder, in order, its "span" before and its "new_span".
    """
    ends = [replacement["span"][1] for replacement in replacements]
    new_ends = [replacement["new_span"][1] for replacement in replacements]

    def move(place: int) -> int:
        shift = 0
        for end, new_end in zip(ends, new_ends, strict=True):
            if end <= place:
                shift = new_end - end
        return place + shift

    return [(move(first), move(last)) for first, last in spans]


def estimate_length(processor, text: str, images: list[Image.Image]) -> float:
    """Return about how many tokens a text and its images take, by the processor's own quick rule.

    Infinite where the processor has no such rule.
    """
    num_text_tokens = len(processor.tokenizer(text)["input_ids"])
    if not images:
        return num_text_tokens
    sizes = [(image.height, image.width) for image in images]
    try:
        estimate = processor._get_num_multimodal_tokens(image_sizes=sizes)
    except (AttributeError, TypeError, KeyError, ValueError):
        return math.inf
    return num_text_tokens + sum(estimate["num_image_tokens"])
