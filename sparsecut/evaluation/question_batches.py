"""Questions in batches, and what `generate` takes of each: images or their cached features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import BatchFeature

from ..data.cached_features import read_cached_grids
from ..data.examples import Example
from ..data.feature_cache import check_encoder, get_tap_views
from ..data.prepared_batches import prepare_batches
from ..prompts import encode_prompts, prepare_inputs
from ..schema import UserError


@dataclass(frozen=True)
class PromptBatch:
    """Questions that are answered at once.

    Attributes:
        indices: Their places among all records.
        prompts: Their rendered prompts.
        examples: Their examples, for the images.
    """

    indices: list[int]
    prompts: list[str]
    examples: list[Example]


def split_batches(
    records: Sequence[dict], examples: Sequence[Example], lengths: Sequence[int], batch_size: int
) -> list[PromptBatch]:
    """Return batches of the questions that have no answer yet, the longest prompts first.

    Args:
        records: All questions, as lines of predictions.jsonl.
        examples: Their examples.
        lengths: The tokens of their prompts.
        batch_size: Questions of a batch.
    """
    pending = [i for i, record in enumerate(records) if record["prediction"] is None]
    # Prompts of like length together, the longest first: memory runs out early or never.
    pending.sort(key=lambda i: -lengths[i])
    batches = []
    for start in range(0, len(pending), batch_size):
        indices = pending[start : start + batch_size]
        prompts = [records[i]["prompt"] for i in indices]
        batches.append(PromptBatch(indices, prompts, [examples[i] for i in indices]))
    return batches


def prepare_all_inputs(
    model: Any, processor: Any, batches: list[PromptBatch], feature_cache: Any, workers: int
) -> Iterator[dict]:
    """Return the inputs of `generate` for every batch, made from images or cached features.

    Args:
        model: The model that answers.
        processor: Its processor.
        batches: The questions.
        feature_cache: A `VisionFeatureCache`, or None to prepare images.
        workers: Processes that prepare images.

    Returns:
        An iterator over the inputs of the batches, on the model's device.

    Raises:
        UserError: An image is broken, or the cache is not for this model.
    """
    if feature_cache is None:
        return _prepare_inputs(model, processor, batches, workers)
    return _prepare_cached_inputs(model, processor, batches, feature_cache)


def _prepare_inputs(
    model: Any, processor: Any, batches: list[PromptBatch], workers: int
) -> Iterator[dict]:
    """The inputs of `generate` for every batch, on the model's device."""
    for inputs in prepare_batches(partial(_encode_batch, processor), batches, workers):
        yield BatchFeature(inputs).to(model.device)


def _encode_batch(processor: Any, batch: PromptBatch) -> dict:
    """The inputs of `generate` for a batch; UserError for a broken image."""
    opened: dict = {}  # several questions may be about one image
    images = []
    for example in batch.examples:
        row = []
        for number, name in enumerate(example.images):
            key = id(example.store), name
            if key not in opened:
                opened[key] = example.load_image(number, processor)
            row.append(opened[key])
        images.append(row)
    return dict(encode_prompts(processor, batch.prompts, images))


def _prepare_cached_inputs(
    model: Any, processor: Any, batches: list[PromptBatch], feature_cache: Any
) -> Iterator[dict]:
    """The inputs of `generate` for every batch, with cached features in place of pixels."""
    if not model.supports_feature_cache:
        raise UserError(
            "the vision features of an upgraded model cannot be cached; evaluate it without"
            " feature_cache"
        )
    check_encoder(feature_cache, model, processor)
    views = get_tap_views(model.plan, model.config.vision_depth)
    for batch in batches:
        with_images = [example for example in batch.examples if example.images]
        if not with_images:
            no_images = [[] for _ in batch.examples]
            yield prepare_inputs(model, processor, batch.prompts, no_images)
            continue
        grids = read_cached_grids(feature_cache, batch.examples)
        inputs = prepare_inputs(model, processor, batch.prompts, None, grids)
        features = read_features(feature_cache, with_images, views, model.device)
        all_grids = None if grids is None else list(itertools.chain(*grids))
        outputs = model.encode_for_prompts(inputs, vision_states=features, image_grids=all_grids)
        inputs["mm_encoder_outputs"] = {"image": outputs}
        yield inputs


def read_features(
    feature_cache: Any, examples: Sequence[Example], views: dict[int, int], device: torch.device
) -> dict[int, torch.Tensor]:
    """Read the cached vision features of examples, tap -> [images of all examples, V, N, D].

    Args:
        feature_cache: A `VisionFeatureCache`, or what is read like one.
        examples: Examples with images.
        views: The number of views of every tap.
        device: Where the features are needed.
    """
    cached = [feature_cache.read(example, views) for example in examples]
    features = {}
    for tap in views:
        features[tap] = torch.cat([taps[tap] for taps in cached]).to(device)
    return features
