"""The processor of a recipe's model, where its files are on this machine: it counts tokens."""

from __future__ import annotations

from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from ..absent_videos import read_without_videos
from ..building import resolve
from ..config.recipe import Recipe, Stage
from ..config.yaml_io import expand_path
from ..data.encoding import ExampleEncoder, FixedExampleEncoder, example_encoder
from ..data.examples import Example
from ..data.unknown_records import UnknownCount
from ..processing import SparseCutProcessor
from ..schema import UserError

# What loading raises where a file is absent, or where a part takes no images.
ABSENT = (UserError, OSError, ValueError, TypeError, AttributeError, KeyError, ImportError)
MOST_RECORDS = 1000  # of a source that are counted; the others are taken to be like them


def read_local_processor(recipe: Recipe) -> Any | None:
    """Read the processor of a recipe's model from this machine; no hub is asked.

    Args:
        recipe: The recipe.

    Returns:
        The processor; every image is one token of it. None where its files are not here.
    """
    model = recipe.model
    here = {"local_files_only": True}
    try:
        if model.base is not None:
            with read_without_videos():
                return AutoProcessor.from_pretrained(expand_path(model.base), **here)
        vision, language = expand_path(model.vision), expand_path(model.language)
        tokenizer = AutoTokenizer.from_pretrained(resolve(language, "language"), **here)
        images = AutoImageProcessor.from_pretrained(resolve(vision, "vision"), **here)
        if "<image>" not in tokenizer.get_added_vocab():
            tokenizer.add_special_tokens(
                {"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False
            )
        return SparseCutProcessor(images, tokenizer, num_image_tokens=1)
    except ABSENT:
        return None


def make_counter(processor: Any | None, stage: Stage) -> ExampleEncoder | None:
    """What counts the tokens of a stage's records; None without a processor."""
    return None if processor is None else example_encoder(processor, stage.template)


def count_text_tokens(
    encoder: ExampleEncoder, examples: list[Example], unknown: UnknownCount
) -> list[int] | None:
    """Count the text tokens of some records, spread over all of them.

    Args:
        encoder: Of the model's processor.
        examples: The records.
        unknown: Records whose words the tokenizer does not know are counted in it.

    Returns:
        The tokens of every n-th record without those of its images, n as small as
        `MOST_RECORDS` allows. None where one cannot be encoded, which training will say.
    """
    chosen = examples[:: get_step(len(examples))]
    try:
        items = [encoder.encode(example) for example in chosen]
        for example, item in zip(chosen, items, strict=True):
            unknown.add(example, encoder.find_unknown(example, item))
        lengths = encoder.get_lengths(items)
        if isinstance(encoder, FixedExampleEncoder):
            image_tokens = [encoder.count_image_tokens(item) for item in items]
        else:
            image_tokens = [len(example.images) for example in chosen]
        return [length - images for length, images in zip(lengths, image_tokens, strict=True)]
    except ABSENT:
        return None


def get_step(number: int) -> int:
    """Which of so many records are counted: every n-th."""
    return max(1, -(-number // MOST_RECORDS))
