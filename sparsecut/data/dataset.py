"""Checked examples as the items of a dataset."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..audio import Clip
from ..prompts import get_medium
from ..schema import UserError
from ..waits import show_step
from .cached_features import read_cached_grids
from .encoding import GRIDS, ExampleEncoder
from .errors import RecordError
from .examples import Example
from .feature_cache import VisionFeatureCache
from .labels import IGNORED
from .length_limits import NO_LIMITS
from .prepared_batches import raise_errors as raise_errors

CACHED_TOKENS = 20_000_000  # token ids that stay in memory between epochs, at most some 160 MB
MAX_BROKEN = 100  # broken records in a row that others replace


class TrainingData(Dataset):
    """Examples as items.

    An item is what the encoder makes of an example: `encode` and `encode_images` together. With a
    feature cache it has `vision_states` in place of pixels. Images are opened for each item; token
    ids stay in memory, up to a limit.

    Attributes:
        examples: The examples, all of them checked.
        encoder: Encodes them.
        feature_cache: Vision features of all their images.
        tap_views: The taps that are read from it -> number of views (`get_tap_views`).
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoder: ExampleEncoder,
        *,
        feature_cache: VisionFeatureCache | None = None,
        tap_views: dict[int, int] | None = None,
    ):
        self.examples = list(examples)
        self.encoder = encoder
        self.feature_cache = feature_cache
        self.tap_views = tap_views
        self._encoded: dict[int, dict] = {}
        self._room = CACHED_TOKENS

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        example = self.examples[index]
        try:
            return self._add_images(self._encode(index), example)
        except RecordError as error:
            if not example.skip:
                raise
            return self._replace_broken(error, self._list_replacements(index))

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Return the items of a batch, for a DataLoader; an error becomes an item {"error": error}.

        A worker process would pass on only the text of an error. `Collator` raises it or, with
        defer_errors, passes it on to `raise_errors`.
        """
        return [self._get_item_or_error(index) for index in indices]

    def _get_item_or_error(self, index: int) -> dict:
        try:
            return self[index]
        except UserError as error:
            return {"error": error}

    def make_item(self, example: Example, replacements: Iterable[Example] = ()) -> dict:
        """Return the item of an example that need not be one of this dataset.

        Args:
            example: The example.
            replacements: Taken in its place where it is broken and may be skipped. The item's
                "broken" then lists the errors of the records that it replaces.

        Raises:
            RecordError: The example is bad.
            UserError: Too many examples in a row are broken.
        """
        try:
            return self._add_images(self.encoder.encode(example), example)
        except RecordError as error:
            if not example.skip:
                raise
            return self._replace_broken(error, replacements)

    def _replace_broken(self, first: RecordError, replacements: Iterable[Example]) -> dict:
        """The item of the first good replacement; its "broken" lists the errors of all others."""
        broken = [first]
        for example in itertools.islice(replacements, MAX_BROKEN):
            try:
                item = self._add_images(self.encoder.encode(example), example)
            except RecordError as error:
                if not example.skip:
                    raise
                broken.append(error)
            else:
                return {**item, "broken": broken}
        raise UserError(f"{len(broken)} records were broken, one after another, the first: {first}")

    def _list_replacements(self, index: int) -> Iterator[Example]:
        """Replacement candidates, best first: as many images, no more tokens.

        Then those with fewer images, and texts. A candidate never has more images, nor more tokens
        of images, so that a limit on image tokens holds.
        """
        others = [*range(index + 1, len(self)), *range(index)]
        num_images = len(self.examples[index].images)
        most = self._count_image_tokens(index)
        length = self._get_length(index)
        for i in others:
            is_alike = len(self.examples[i].images) == num_images
            if is_alike and self._get_length(i) <= length and self._count_image_tokens(i) <= most:
                yield self.examples[i]
        for i in others:
            has_fewer = len(self.examples[i].images) < num_images
            if has_fewer and self._count_image_tokens(i) <= most:
                yield self.examples[i]

    def _add_images(self, encoded: dict, example: Example) -> dict:
        if self.feature_cache is None:
            return {
                **encoded,
                **self.encoder.encode_images(example.load_images(self.encoder.processor)),
            }
        if not example.images:
            return dict(encoded)
        item = {**encoded, "vision_states": self.feature_cache.read(example, self.tap_views)}
        grids = read_cached_grids(self.feature_cache, [example])
        return item if grids is None else {**item, GRIDS: torch.tensor(grids[0])}

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every item, as `ExampleEncoder.get_lengths` counts them."""
        with show_step("measuring records", len(self)) as step:
            encoded = [self._encode(i) for i in step.count(range(len(self)))]
        return self.encoder.get_lengths(encoded)

    @property
    def num_image_tokens(self) -> list[int]:
        """Image tokens of every item; images where only a batch shows their tokens."""
        return [self._count_image_tokens(i) for i in range(len(self))]

    def _count_image_tokens(self, index: int) -> int:
        # Images of different sizes have different numbers of tokens.
        if getattr(self.encoder.processor, "is_any_size", False):
            return self.encoder.count_image_tokens(self._encode(index))
        return len(self.examples[index].images) * self.encoder.tokens_per_image

    def _get_length(self, index: int) -> int:
        return self.encoder.get_length(self._encode(index))

    def _encode(self, index: int) -> dict:
        if index in self._encoded:
            return self._encoded[index]
        encoded = self.encoder.encode(self.examples[index])
        self._room -= self.encoder.get_length(encoded)
        if self._room >= 0:
            self._encoded[index] = encoded
        return encoded


def make_blank_item(
    encoder: ExampleEncoder,
    feature_cache: VisionFeatureCache | None = None,
    tap_views: dict[int, int] | None = None,
) -> dict:
    """Return an item with one grey image and no target.

    Where weights are sharded all processes must run the same modules. So a batch of texts alone
    needs an image that shows nothing. Arguments are those of `TrainingData`.
    """
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "."}]
    medium = get_medium(encoder.processor)
    image = Image.new("RGB", (64, 64), "grey")
    file = io.BytesIO()
    image.save(file, "png")
    example = Example("blank", [file.getvalue()], turns, source="the blank image", medium=medium)
    unlimited = dataclasses.replace(encoder, limits=NO_LIMITS)
    item = unlimited.encode(example)
    if "labels" in item:
        item["labels"] = torch.full_like(item["labels"], IGNORED)
    if feature_cache is None:
        if medium == "audio":
            image = Clip(np.zeros(1000, np.float32), 16_000)
        return {**item, **encoder.encode_images([image])}
    if feature_cache.grids is None:
        return {**item, "vision_states": feature_cache.make_blank(tap_views)}
    grid = encoder.processor.choose_grid(image.height, image.width)
    states = feature_cache.make_blank(tap_views, grid)
    return {**item, "vision_states": states, GRIDS: torch.tensor([grid])}


def get_blank_image_inputs(item: dict, encoder: ExampleEncoder) -> dict[str, Tensor]:
    """Return what the model's `get_image_features` takes of a blank item's image."""
    unlimited = dataclasses.replace(encoder, limits=NO_LIMITS)
    return unlimited.get_image_inputs(item)
