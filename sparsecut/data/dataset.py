"""What a stage learns from: checked examples, one item each for a DataLoader, and batches for the
model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..prompts import is_fixed
from ..schema import UserError
from .encoding import IGNORED, encode, written
from .errors import RecordError
from .examples import Example, choose, read_examples, read_source
from .native_encoding import PER_TOKEN, encode_batch
from .validation import check_examples

__all__ = [
    "Collator",
    "Example",
    "TrainingData",
    "check_examples",
    "choose",
    "encode",
    "read_examples",
    "read_source",
]
CACHED_TOKENS = 20_000_000  # token ids kept from one epoch to the next: at most some 160 MB
MANY = 100  # broken records in a row that are passed over
PICTURED = ("pictures", "pixel_values", "vision_states")  # where an item has its pictures


class TrainingData(Dataset):
    """Examples as items: input_ids [L], labels [L] and, where there are pictures, pixel_values [n,
    1 + tiles^2, 3, S, S].

    For a base's own processor an item is the example with its pictures open, as only a whole batch
    can be prepared.

    Pictures are opened when an item is asked for; token ids of what has been seen are kept, up to a
    limit. states, views: kept states of the encoder, and which of them the plan reads
    (`states.views_of`); items then have vision_states, not pixels.
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
        return self.item(self.examples[index], self._others(index), index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """The items of a batch, for a DataLoader; an error becomes an item {"error": error}.

        A worker process would hand on only the text of an error. `Collator` raises it or, with
        defer_errors, hands it on to `raise_errors`.
        """
        return [defer_error(self.__getitem__, index) for index in indices]

    def item(
        self,
        example: Example,
        others: Iterable[Example] = (),
        index: int | None = None,
        *,
        check: Callable | None = None,
    ) -> dict:
        """What one example gives or, where its pictures are broken and may be, the first of the
        others whose pictures are not.

        check: raises RecordError for one that cannot be learned from, where none has been checked
        before. The item then has "broken": the RecordError of each record that was passed over.
        """
        broken = []
        for one in itertools.chain([example], itertools.islice(others, MANY)):
            try:
                if check is not None:
                    check(one)
                item = self._item(one, index if one is example else None)
                return {**item, "broken": broken} if broken else item
            except RecordError as error:
                if not one.skip:
                    raise
                broken.append(error)
        raise UserError(
            f"{len(broken)} records were broken, one after another, the first: {broken[0]}"
        )

    def _others(self, index: int) -> Iterator[Example]:
        """Records to take instead, the best first: those that follow, with as many pictures and no
        more tokens, so that a row holds them.

        Then those with fewer pictures, and texts; never any with more, so that a limit on image
        tokens holds.
        """
        images = len(self.examples[index].images)
        for i in self._around(index):
            if len(self.examples[i].images) == images and self._length(i) <= self._length(index):
                yield self.examples[i]
        yield from (
            self.examples[i] for i in self._around(index) if len(self.examples[i].images) < images
        )

    def _around(self, index: int) -> Iterable[int]:
        return itertools.chain(range(index + 1, len(self)), range(index))

    def _length(self, index: int) -> int:
        return len(self._tokens(index)["input_ids"]) if is_fixed(self.processor) else 0

    def _item(self, example: Example, index: int | None) -> dict:
        pictures = [] if self.states is not None else example.pictures()
        if not is_fixed(self.processor):
            return {"example": example, "pictures": pictures}
        item = dict(self._encode(example) if index is None else self._tokens(index))
        if example.images and self.states is not None:
            item["vision_states"] = self.states.read(example, self.views)
        elif pictures:
            item["pixel_values"] = self.processor.pixels(pictures)
        return item

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every item; for a base's own processor those of its text, as pictures count
        only once they are prepared.
        """
        if is_fixed(self.processor):
            return [len(self._tokens(i)["input_ids"]) for i in range(len(self))]
        texts = [written(example, self.processor, self.template)[0] for example in self.examples]
        return [len(ids) for ids in self.processor.tokenizer(texts)["input_ids"]]

    @property
    def num_image_tokens(self) -> list[int]:
        """Image tokens of every item; for a base's own processor the number of pictures."""
        each = self.processor.num_image_tokens if is_fixed(self.processor) else 1
        return [len(example.images) * each for example in self.examples]

    def _tokens(self, index: int) -> dict[str, Tensor]:
        if index in self._encoded:
            return self._encoded[index]
        item = self._encode(self.examples[index])
        self._room -= len(item["input_ids"])
        if self._room >= 0:
            self._encoded[index] = item
        return item

    def _encode(self, example: Example) -> dict[str, Tensor]:
        encoded = encode(example, self.processor, self.template, max_length=self.max_length)
        return {name: torch.tensor(values, dtype=torch.int32) for name, values in encoded.items()}


def defer_error(get_item: Callable, index: int):
    """An item, or {"error": error} where the user's data is at fault."""
    try:
        return get_item(index)
    except UserError as error:
        return {"error": error}


def raise_errors(batches: Iterable[dict]) -> Iterator[dict]:
    """Batches of a DataLoader as they come; raises the error that stands in the place of one."""
    for batch in batches:
        if "error" in batch:
            raise batch["error"]
        yield batch


def blank_item(
    processor, *, template: str = "chat", states=None, views: dict[int, int] | None = None
) -> dict:
    """An item with one grey picture and nothing to learn; arguments as `TrainingData` takes them.

    Where weights are sharded all processes must run the same modules, so a batch of texts alone
    needs a picture that shows nothing.
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
    """Items to a batch: input_ids, attention_mask and labels [B, L] padded on the right,
    pixel_values [pictures, ...].

    Pictures of all items follow one another in reading order; a batch without any has no
    pixel_values. Items with kept states give vision_states instead: tap -> [pictures, V, N, D]. A
    base's own processor names its inputs itself; settings are what `base_labels.encode_batch` is to
    keep of the stage (template, max_length, limit, max_images), which is known only here. Rows of
    items (`batching.Rows`) become one row each, with position_ids [B, L] in the attention_mask's
    place.

    Errors of broken records, whose places others have taken, stand in "broken", which the
    model does not take.
    pad_to: L is a multiple of it, so that few shapes occur and a compiled model is compiled seldom.
    blank: an item with a picture that follows those of a batch without one, where the engine needs
    it; none of its tokens is learned.
    """

    def __init__(
        self, processor, *, pad_to: int | None = None, defer_errors: bool = False, **settings
    ):
        self.defer_errors = defer_errors
        token = processor.tokenizer.pad_token_id
        self.pad_token_id = processor.tokenizer.eos_token_id if token is None else token
        self.processor = processor
        self.settings = settings
        self.blank: dict | None = None
        self.pad_to = pad_to or 1

    def __call__(self, items: list) -> dict:
        packed = isinstance(items[0], list)
        broken = []
        for item in _flat(items) if packed else items:
            if "error" in item:
                return self._fail(item["error"])
            broken += item.get("broken", ())
        try:
            batch = self._whole(items, packed)
        except UserError as error:
            return self._fail(error)
        return {**batch, "broken": broken} if broken else batch

    def _fail(self, error: UserError) -> dict:
        if not self.defer_errors:
            raise error
        return {"error": error}

    def _whole(self, items: list, packed: bool) -> dict[str, Tensor]:
        if packed:
            return self._packed(
                items if self._has_pictures(_flat(items)) else [*items, [self.blank]]
            )
        if self._has_pictures(items):
            return self._batch(items)
        batch = self._batch([*items, self.blank])
        batch["labels"][-1] = IGNORED
        return batch

    def _has_pictures(self, items: list[dict]) -> bool:
        return self.blank is None or any(
            len(item.get(key, ())) for item in items for key in PICTURED
        )

    def _packed(self, rows: list[list[dict]]) -> dict[str, Tensor]:
        """Rows of several items each, [B, L]: position_ids start anew with every item, by which
        attention tells them apart.
        """
        joined = []
        for items in rows:
            labels = torch.cat([item["labels"] for item in items])
            starts = torch.tensor([len(item["labels"]) for item in items]).cumsum(0)[:-1]
            labels[starts] = IGNORED  # no item's first token follows from the item before
            ids = torch.cat([item["input_ids"] for item in items])
            positions = torch.cat([torch.arange(len(item["input_ids"])) for item in items])
            joined.append({"input_ids": ids, "labels": labels, "position_ids": positions})
        batch = self._padded(joined)
        batch["position_ids"] = torch.zeros_like(batch["input_ids"])
        for row, item in enumerate(joined):
            batch["position_ids"][row, : len(item["position_ids"])] = item["position_ids"]
        del batch["attention_mask"]  # transformers looks for restarting positions only without one
        return {**batch, **self._pictures(_flat(rows))}

    def _batch(self, items: list[dict]) -> dict[str, Tensor]:
        if "example" in items[0]:
            pictures = [item["pictures"] for item in items]
            return encode_batch(
                [item["example"] for item in items],
                self.processor,
                pictures=pictures,
                **self.settings,
            )
        return {**self._padded(items), **self._pictures(items)}

    def _padded(self, items: list[dict]) -> dict[str, Tensor]:
        if all(len(item["labels"]) == 0 or (item["labels"][1:] == IGNORED).all() for item in items):
            raise UserError("no item of the batch has a token to learn: all labels are masked")
        longest = max(len(item["input_ids"]) for item in items)
        shape = len(items), -(-longest // self.pad_to) * self.pad_to
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
        return batch

    def _pictures(self, items: list[dict]) -> dict[str, Tensor]:
        found = {}
        pictures = [item["pixel_values"] for item in items if "pixel_values" in item]
        if pictures:
            found["pixel_values"] = torch.cat(pictures)
        if kept := [item["vision_states"] for item in items if "vision_states" in item]:
            found["vision_states"] = {
                tap: torch.cat([states[tap] for states in kept]) for tap in kept[0]
            }
        return found


def _flat(rows: list[list[dict]]) -> list[dict]:
    return [item for row in rows for item in row]
