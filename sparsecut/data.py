"""What a stage learns from: checked examples, one item each for a DataLoader, and batches for the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .base_labels import PER_TOKEN, encode_batch, num_tokens_about
from .labels import IGNORED, TOO_LONG, encode, written
from .prompting import is_fixed
from .records import Example, choose, read_examples, read_source

__all__ = ["Collator", "Example", "TrainingData", "check_examples", "choose", "encode", "read_examples", "read_source"]
CACHED_TOKENS = 20_000_000  # token ids kept from one epoch to the next: at most some 160 MB
PICTURED = ("pictures", "pixel_values", "vision_states")  # where an item has its pictures
NEAR = 0.5  # of a limit: records this long by estimate are measured
logger = logging.getLogger(__name__)


def check_examples(
    examples: Sequence[Example],
    processor,
    *,
    template: str = "chat",
    max_length: int | None = None,
    limit: int | None = None,
    open_pictures: bool = False,
    problems: list[str] | None = None,
) -> list[Example]:
    """The examples that a model can be trained on: all are written once, and with open_pictures every picture is opened.

    max_length: cut there; limit: what the language model can take, longer records are refused. Raises ValueError at the first bad
    record or, where a list of problems is given, notes a sentence there and leaves the record out.
    """
    good = []
    for example in examples:
        try:
            of_stage = template, max_length, limit
            _check(example, processor, *of_stage, open_pictures=open_pictures, first=not good)
            good.append(example)
        except ValueError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return good


def _check(example, processor, template, max_length, limit, *, open_pictures: bool, first: bool) -> None:
    """Raise ValueError naming the record that cannot be learned from.

    How many tokens pictures take is known to a base's processor only once it has prepared them, which for all would take as long as
    an epoch's preparation: the first record and those near a limit are prepared, and the collator refuses what still is too long.
    """
    bound = min(max_length or math.inf, limit or math.inf)
    if is_fixed(processor):
        length = len(encode(example, processor, template, max_length=max_length)["input_ids"])
        if limit is not None and length > limit:
            raise ValueError(f"{example.source}: {TOO_LONG.format(length=length, limit=limit)}")
        if open_pictures:
            example.pictures()
    else:
        text, _ = written(example, processor, template)
        if first or (open_pictures and num_tokens_about(processor, text, example.pictures()) > NEAR * bound):
            encode_batch([example], processor, template, max_length=max_length, limit=limit)


class TrainingData(Dataset):
    """Examples as items: input_ids [L], labels [L] and, where there are pictures, pixel_values [n, 1 + tiles^2, 3, S, S].

    For a base's own processor an item is the example with its pictures open, as only a whole batch can be prepared.

    Pictures are opened when an item is asked for; token ids of what has been seen are kept, up to a limit. states, views: kept
    states of the encoder, and which of them the plan reads (`states.views_of`); items then have vision_states, not pixels.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor,
        *,
        template: str = "chat",
        max_length: int | None = None,
        states=None,
        views: dict[int, int] | None = None,
    ):
        self.examples, self.processor = list(examples), processor
        self.states, self.views = states, views
        self.template, self.max_length = template, max_length
        self._encoded: dict[int, dict[str, Tensor]] = {}
        self._room = CACHED_TOKENS

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        example = self.examples[index]
        if not is_fixed(self.processor):
            return {"example": example, "pictures": example.pictures()}
        item = dict(self._tokens(index))
        if example.images and self.states is not None:
            item["vision_states"] = self.states.read(example, self.views)
        elif example.images:
            item["pixel_values"] = self.processor.pixels(example.pictures())
        return item

    def _tokens(self, index: int) -> dict[str, Tensor]:
        if index in self._encoded:
            return self._encoded[index]
        encoded = encode(self.examples[index], self.processor, self.template, max_length=self.max_length)
        item = {name: torch.tensor(values, dtype=torch.int32) for name, values in encoded.items()}
        self._room -= len(item["input_ids"])
        if self._room >= 0:
            self._encoded[index] = item
        return item


def blank_item(processor, *, template: str = "chat", states=None, views: dict[int, int] | None = None) -> dict:
    """An item with one grey picture and nothing to learn; arguments as `TrainingData` takes them.

    Where weights are sharded all processes must run the same modules, so a batch of texts alone needs a picture that shows nothing.
    """
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "."}]
    example = Example("blank", ["grey"], turns, source="the blank picture")
    picture = Image.new("RGB", (64, 64), "grey")
    if not is_fixed(processor):
        return {"example": example, "pictures": [picture]}
    item = {name: torch.tensor(ids) for name, ids in encode(example, processor, template).items()}
    item["labels"].fill_(IGNORED)
    if states is None:
        return {**item, "pixel_values": processor.pixels([picture])}
    return {**item, "vision_states": states.blank(views)}


def picture_inputs(item: dict, processor) -> dict[str, Tensor]:
    """What `get_image_features` takes of the pictures of a blank item."""
    if "example" not in item:
        return {"pixel_values": item["pixel_values"]}
    batch = encode_batch([item["example"]], processor, pictures=[item["pictures"]])
    return {name: value for name, value in batch.items() if name not in PER_TOKEN}


class Collator:
    """Items to a batch: input_ids, attention_mask and labels [B, L] padded on the right, pixel_values [pictures, ...].

    Pictures of all items follow one another in reading order; a batch without any has no pixel_values. Items with kept states
    give vision_states instead: tap -> [pictures, V, N, D]. A base's own processor names its inputs itself; template, max_length and
    limit (what the language model takes) are those of the stage, which only here are known to be kept.

    blank: an item with a picture that follows those of a batch without one, where the engine needs it; none of its tokens is learned.
    """

    def __init__(self, processor, *, template: str = "chat", max_length: int | None = None, limit: int | None = None):
        token = processor.tokenizer.pad_token_id
        self.pad_token_id = processor.tokenizer.eos_token_id if token is None else token
        self.processor = processor
        self.settings = {"template": template, "max_length": max_length, "limit": limit}
        self.blank: dict | None = None

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        if self.blank is None or any(len(item.get(key, ())) for item in items for key in PICTURED):
            return self._batch(items)
        batch = self._batch([*items, self.blank])
        batch["labels"][-1] = IGNORED
        return batch

    def _batch(self, items: list[dict]) -> dict[str, Tensor]:
        if "example" in items[0]:
            pictures = [item["pictures"] for item in items]
            return encode_batch([item["example"] for item in items], self.processor, pictures=pictures, **self.settings)
        if all(len(item["labels"]) == 0 or (item["labels"][1:] == IGNORED).all() for item in items):
            raise ValueError("no item of the batch has a token to learn: all labels are masked")
        shape = len(items), max(len(item["input_ids"]) for item in items)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            batch["input_ids"][row, :length] = item["input_ids"]
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = item["labels"]
        pictures = [item["pixel_values"] for item in items if "pixel_values" in item]
        if pictures:
            batch["pixel_values"] = torch.cat(pictures)
        if kept := [item["vision_states"] for item in items if "vision_states" in item]:
            batch["vision_states"] = {tap: torch.cat([states[tap] for states in kept]) for tap in kept[0]}
        return batch
