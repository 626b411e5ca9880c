"""Packing and grouping: rows of several short records, and batches of similar records.

Both are planned from lengths alone, before anything is opened, and by the seed. So every process
makes the same plan, and a resumed run does too.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..schema import UserError
from .dataset import TrainingData
from .native_encoding import NativeExampleEncoder
from .native_packing import count_tokens

# Steps whose records are sorted by length together: enough for similar ones, few enough to stay
# random.
WINDOW = 50
# Rows that a record is tried in, so that packing takes time in proportion to the records.
OPEN_ROWS = 64
MAX_DEVIATION = 0.05  # of the logits of a packed record, in standard deviations


@dataclass
class _Row:
    """A row that is being filled.

    Attributes:
        tokens_left: Tokens that still fit.
        images_left: Image tokens that still fit.
        records: Numbers of its records.
    """

    tokens_left: float
    images_left: float
    records: list[int] = field(default_factory=list)

    def fits(self, num_tokens: int, num_image_tokens: int) -> bool:
        return num_tokens <= self.tokens_left and num_image_tokens <= self.images_left

    def add(self, record: int, num_tokens: int, num_image_tokens: int) -> None:
        self.records.append(record)
        self.tokens_left -= num_tokens
        self.images_left -= num_image_tokens


def pack_rows(
    lengths: Sequence[int],
    images: Sequence[int],
    row_length: int,
    *,
    max_images: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Return numbers of records in rows, each record once.

    The longest records come first, each into the first row that it fits. A record that is longer
    than a row gets a row to itself. Records with and without images do not share a row, so that
    steps of text alone stay so.

    Args:
        lengths: Tokens of every record.
        images: Image tokens of every record.
        row_length: Tokens of a row.
        max_images: Image tokens of a row.
        seed: Gives the order of records of one length.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: -lengths[i])
    rows: list[_Row] = []
    for has_images in (True, False):
        open_rows: list[_Row] = []
        for i in order:
            if bool(images[i]) != has_images:
                continue
            row = next((row for row in open_rows if row.fits(lengths[i], images[i])), None)
            if row is None:
                row = _Row(row_length, math.inf if max_images is None else max_images)
                rows.append(row)
                open_rows = [*open_rows[-OPEN_ROWS + 1 :], row]
            row.add(i, lengths[i], images[i])
    return [row.records for row in rows]


def pack_dataset(data: TrainingData, model, stage) -> TrainingData | PackedDataset:
    """Return a stage's data as it is or, where the stage packs, in rows.

    Raises:
        UserError: The model cannot take packed rows, or a record is too long for a row.
    """
    if stage.pack is None:
        return data
    if not model.supports_packing:
        raise UserError(
            f"pack is {stage.pack}, but {type(model.base).__name__} takes no positions from"
            " outside, which keep the records of a row apart; remove pack"
        )
    lengths, image_tokens = count_record_tokens(data)
    longest = max(lengths)
    if longest > stage.pack:
        record = data.examples[lengths.index(longest)]
        raise UserError(
            f"{record.place}: the record has {longest} tokens, but pack={stage.pack} makes rows of"
            " that many; raise pack, or set max_length to cut records"
        )
    rows = pack_rows(lengths, image_tokens, stage.pack, max_images=stage.max_image_tokens)
    return PackedDataset(data, rows)


def count_record_tokens(data: TrainingData) -> tuple[list[int], list[int]]:
    """Return the tokens of every record, and how many of them are its images'.

    Raises:
        UserError: An upgraded model's processor does not tell them.
    """
    if isinstance(data.encoder, NativeExampleEncoder):
        return count_tokens(data.encoder, data.examples)
    return data.lengths, data.num_image_tokens


class PackedDataset(Dataset):
    """Training data in rows: an item is the list of a row's items.

    Attributes:
        data: The training data.
        rows: The numbers of each row's items.
    """

    def __init__(self, data: TrainingData, rows: Sequence[Sequence[int]]):
        self.data = data
        self.rows = rows
        self.examples = data.examples
        self.encoder = data.encoder
        self.feature_cache = data.feature_cache
        self.tap_views = data.tap_views

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[dict]:
        return [self.data[i] for i in self.rows[row]]

    def __getitems__(self, rows: Sequence[int]) -> list[list[dict]]:
        """Return the rows of a batch, for a DataLoader, as `TrainingData.__getitems__` does."""
        return [self.data.__getitems__(self.rows[row]) for row in rows]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return self._sum_rows(self.data.lengths)

    @property
    def num_image_tokens(self) -> list[int]:
        """Image tokens of every row."""
        return self._sum_rows(self.data.num_image_tokens)

    def _sum_rows(self, counts: Sequence[int]) -> list[int]:
        sums = []
        for row in self.rows:
            sums.append(sum(counts[i] for i in row))
        return sums


@torch.no_grad()
def check_packing(model, collator, data: PackedDataset) -> None:
    """Check that the model keeps packed records apart, with two records that share a row.

    The second must not change with the first, and must come out as it does alone. Not every
    architecture does so, and most that do not are silent.

    Raises:
        UserError: The model mixes packed records.
    """
    row = next((row for row in data.rows if len(row) > 1), None)
    if row is None:
        return
    shortest = sorted(row, key=lambda i: len(data.examples[i].messages))[:2]
    first, second = (data.data[i] for i in shortest)
    was_training = model.training
    model.eval()
    packed = collator([[first, second]])
    start, length = (_count_tokens(item, collator) for item in (first, second))
    changed = _change_text(packed, start, model, collator.encoder.processor)
    both = _compute_logits(model, packed)[:, start:]
    both_changed = _compute_logits(model, changed)[:, start:]
    alone = _compute_logits(model, collator([[second]]))
    model.train(was_training)
    both, both_changed, alone = both[:, :length], both_changed[:, :length], alone[:, :length]
    leak = (both - both_changed).abs().max().item()
    deviation = ((both - alone).abs().max() / alone.std()).item()
    if not (leak > 0 or deviation > MAX_DEVIATION):
        return
    reason = "positions of the second go on"
    if leak > 0:
        reason = f"a record changes the outputs of the next one, by {leak:.2g}"
    language = model.language_backbone() if model.is_upgrade else model.language_model
    raise UserError(
        f"{type(language).__name__} does not keep packed records apart ({reason});"
        " remove pack, or take a language model that builds its mask from restarting positions,"
        " such as Llama or Qwen"
    )


def _count_tokens(item: dict, collator) -> int:
    """The tokens of an item; an upgraded model's processor shows them in a batch alone."""
    if "input_ids" in item:
        return len(item["input_ids"])
    return collator([[item]])["input_ids"].shape[1]


def _change_text(packed: dict, end: int, model, processor) -> dict:
    """A packed row whose tokens up to `end` are others, where they are no image's."""
    image_token_id = model.config.image_token_id
    media = torch.tensor([image_token_id, *getattr(processor, "image_token_ids", ())])
    ids = packed["input_ids"].clone()
    first = ids[:, :end]
    other = (first + 1) % image_token_id
    other = torch.where((other == 0) | torch.isin(other, media), 1, other)
    ids[:, :end] = torch.where(torch.isin(first, media), first, other)
    return {**packed, "input_ids": ids}


def _compute_logits(model, batch: dict) -> Tensor:
    inputs = {}
    for name, value in batch.items():
        if name != "labels" or model.plan.needs_prompt:
            inputs[name] = _move(value, model.device)
    return model(**inputs, use_cache=False).logits


def _move(value, device):
    if isinstance(value, dict):
        return {key: tensor.to(device) for key, tensor in value.items()}
    return value.to(device)


class LengthGroupedSampler(Sampler):
    """Numbers of items in an order whose steps are similar; every item once an epoch.

    The items of a step have similar lengths, and all or none have images. Steps come in random
    order. What is left of each kind shares the last steps. The very last one is filled up with the
    epoch's first items, so that the order is the same for any number of processes.

    Attributes:
        lengths: Tokens of every item.
        has_images: Whether an item has images (or their number).
        step: Items of a step over all processes.
        seed: Seed of the order.
        grouped: Whether steps are similar; otherwise the order is merely random.
        mixture: (items, weight) of sources that follow one another. An epoch then has as many items
            as before, each source its fraction of them. A source that has been seen whole starts
            anew.
        epoch: The number of the epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        has_images: Sequence[bool],
        step: int,
        *,
        seed: int = 0,
        grouped: bool = True,
        mixture: Sequence[tuple[int, float]] | None = None,
    ):
        self.lengths = lengths
        self.has_images = has_images
        self.step = step
        self.seed = seed
        self.grouped = grouped
        self.mixture = mixture
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew for this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.step) * self.step

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed} {self.epoch}")
        order = self._choose_items()
        generator.shuffle(order)
        if self.grouped:
            order = self._group(order, generator)
        while len(order) < len(self):
            order += order[: len(self) - len(order)]
        return iter(order)

    def _group(self, order: list[int], generator: random.Random) -> list[int]:
        """The order with similar items in each step, and the rest of each kind at the end."""
        steps, rest = [], []
        for kind in (True, False):
            items = [i for i in order if bool(self.has_images[i]) == kind]
            num_whole = len(items) // self.step * self.step
            rest += items[num_whole:]
            items = items[:num_whole]
            for window in _split(items, WINDOW * self.step):
                window.sort(key=lambda i: -self.lengths[i])
                steps += _split(window, self.step)
        generator.shuffle(steps)
        return [*itertools.chain(*steps), *rest]

    def _choose_items(self) -> list[int]:
        """The epoch's items: all, or every source's fraction of the mixture."""
        if self.mixture is None:
            return list(range(len(self.lengths)))
        total = sum(weight for _, weight in self.mixture)
        fractions = [weight / total for _, weight in self.mixture]
        ends = [round(end * len(self.lengths)) for end in itertools.accumulate(fractions)]
        chosen = []
        first_item, begin = 0, 0
        for number, (size, _) in enumerate(self.mixture):
            chosen += self._take(number, first_item, size, ends[number] - begin)
            first_item += size
            begin = ends[number]
        return chosen

    def _take(self, number: int, first_item: int, size: int, count: int) -> list[int]:
        """The epoch's `count` items of a source, where the epoch before has left off.

        Args:
            number: The source's number.
            first_item: Its first item.
            size: Its items.
            count: Items that it gives to each epoch.
        """
        taken = []
        start = self.epoch * count
        end = start + count
        for turn in range(start // size, -(-end // size)):  # each time through the source
            items = list(range(first_item, first_item + size))
            random.Random(f"{self.seed} {number} {turn}").shuffle(items)
            offset = turn * size
            taken += items[max(start - offset, 0) : max(min(end - offset, size), 0)]
        return taken


def _split(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
