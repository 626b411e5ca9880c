"""Which records share a step: rows packed with several short records, and batches of alike length
and kind.

Plans are made from lengths alone, before anything is opened, and by the seed: every process makes the same, and a resumed run, too.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset, Sampler

from ..schema import UserError

# steps whose records are sorted by length together: enough to be alike, few enough to stay random
WINDOW = 50
OPEN_ROWS = (
    64  # rows that a record is tried in, so that packing takes time in proportion to the records
)


def pack_rows(
    lengths: Sequence[int],
    images: Sequence[int],
    room: int,
    *,
    max_images: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Numbers of records in rows of at most `room` tokens, and of at most max_images image tokens;
    each record once.

    lengths, images: tokens and image tokens of every record. Records with and without pictures are
    not mixed, so that steps of text alone stay so. A record that is longer than the room has a row
    of its own. Longest first, into the first row it fits.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)  # records of one length are in no order of the file
    rows: list[list[int]] = []
    for pictured in (True, False):
        kept: list[list] = []  # [row, tokens left, image tokens left]
        for i in sorted(
            (i for i in order if bool(images[i]) == pictured), key=lambda i: -lengths[i]
        ):
            fits = (slot for slot in kept if lengths[i] <= slot[1] and images[i] <= slot[2])
            slot = next(fits, None)
            if slot is None:
                slot = [[], room, math.inf if max_images is None else max_images]
                rows.append(slot[0])
                kept = [*kept[-OPEN_ROWS + 1 :], slot]
            slot[0].append(i)
            slot[1] -= lengths[i]
            slot[2] -= images[i]
    return rows


def in_rows(data, model, stage):
    """The stage's data as it is or, where the stage packs, in rows; ValueError where a record is
    too long for a row.

    A finished model counts positions in its own way, so an upgraded one is refused.
    """
    if stage.pack is None:
        return data
    if not model.supports_packing:
        raise UserError(
            f"pack is {stage.pack}, but {type(model.base).__name__} is a finished model, which"
            " counts positions in its own way; remove pack"
        )
    lengths = data.lengths
    if (longest := max(lengths)) > stage.pack:
        record = data.examples[lengths.index(longest)]
        raise UserError(
            f"{record.source or record.id}: the record has {longest} tokens, but pack={stage.pack}"
            " makes rows of so many; raise pack, or set max_length to cut records"
        )
    return PackedDataset(
        data,
        pack_rows(lengths, data.num_image_tokens, stage.pack, max_images=stage.max_image_tokens),
    )


class PackedDataset(Dataset):
    """Training data in rows: an item is the list of a row's items."""

    def __init__(self, data, rows: Sequence[Sequence[int]]):
        self.data, self.rows = data, rows

    def __getattr__(self, name: str):
        if name in ("data", "rows"):  # not there yet, while a worker unpacks this
            raise AttributeError(name)
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        of_items = self.data.lengths
        return [sum(of_items[i] for i in row) for row in self.rows]

    @property
    def num_image_tokens(self) -> list[int]:
        """Image tokens of every row."""
        of_items = self.data.num_image_tokens
        return [sum(of_items[i] for i in row) for row in self.rows]

    def __getitems__(self, rows: Sequence[int]) -> list[list[dict]]:
        """The rows of a batch, for a DataLoader; an error takes the place of an item."""
        return [self.data.__getitems__(self.rows[row]) for row in rows]

    def __getitem__(self, row: int) -> list[dict]:
        return [self.data[i] for i in self.rows[row]]


@torch.no_grad()
def check_packing(model, collator, data: PackedDataset) -> None:
    """Raise ValueError where the language model lets a record see the one before it in its row, or
    counts positions on.

    Two records are packed, and packed again with other words in the first, which must change
    nothing in the second; and the second must come out as it does alone. Not every architecture
    keeps packed records apart, and most that do not are silent.
    """
    row = next((row for row in data.rows if len(row) > 1), None)
    if row is None:
        return
    shortest = sorted(row, key=lambda i: len(data.data.examples[i].messages))[:2]
    first, second = (data.data[i] for i in shortest)
    start, image = len(first["input_ids"]), model.config.image_token_id
    ids = first["input_ids"]
    changed = torch.where(
        ids == image, ids, torch.where((ids + 1) % image == 0, 1, (ids + 1) % image)
    )
    was_training = model.training
    model.eval()
    one, other, alone = (
        model(
            **{k: _moved(v, model.device) for k, v in collator([items]).items() if k != "labels"},
            use_cache=False,
        ).logits
        for items in ([first, second], [{**first, "input_ids": changed}, second], [second])
    )
    model.train(was_training)
    alone = alone[:, : len(second["input_ids"])]
    seen = (one - other)[:, start:].abs().max().item()
    moved = ((one[:, start:] - alone).abs().max() / alone.std()).item()
    if seen > 0 or moved > 0.05:
        raise UserError(
            f"{type(model.language_model).__name__} does not keep packed records apart "
            + (
                f"(a record changes what the next one says, by {seen:.2g})"
                if seen
                else "(positions of the second go on)"
            )
            + "; remove pack, or take a language model that builds its mask from restarting"
            " positions, such as Llama or Qwen"
        )


def _moved(value, device):
    return (
        {key: x.to(device) for key, x in value.items()}
        if isinstance(value, dict)
        else value.to(device)
    )


class LengthGroupedSampler(Sampler):
    """Numbers of items in an order whose steps are of alike length, and of pictures or of text
    alone; every item once an epoch.

    step: items of a step over all processes. Steps come in random order. What is left of each kind
    at the end shares the last steps, and the very last one is filled up with the epoch's first
    items, so that the order is the same for any number of processes.
    grouped: without it the order is merely random. mixture: (items, weight) of sources that follow
    one another; an epoch then has as many items as before, each source its share of them, and goes
    through a source anew once all of it has been seen.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        pictured: Sequence[bool],
        step: int,
        *,
        seed: int = 0,
        grouped: bool = True,
        mixture: Sequence[tuple[int, float]] | None = None,
    ):
        self.lengths, self.pictured, self.step = lengths, pictured, step
        self.seed, self.grouped, self.mixture, self.epoch = seed, grouped, mixture, 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew for this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.step) * self.step

    def __iter__(self) -> Iterator[int]:
        shuffled = random.Random(f"{self.seed} {self.epoch}")
        order = self._chosen()
        shuffled.shuffle(order)
        if self.grouped:
            steps, rest = [], []
            for kind in (True, False):
                alike = [i for i in order if bool(self.pictured[i]) == kind]
                whole = len(alike) // self.step * self.step
                rest += alike[whole:]
                for start in range(0, whole, WINDOW * self.step):
                    window = sorted(
                        alike[start : min(start + WINDOW * self.step, whole)],
                        key=lambda i: -self.lengths[i],
                    )
                    steps += [
                        window[at : at + self.step] for at in range(0, len(window), self.step)
                    ]
            shuffled.shuffle(steps)
            order = [i for one in steps for i in one] + rest
        while len(order) < len(self):
            order += order[: len(self) - len(order)]
        return iter(order)

    def _chosen(self) -> list[int]:
        """The epoch's items: all, or every source's share of the mixture, taken where the epoch
        before left off.
        """
        if self.mixture is None:
            return list(range(len(self.lengths)))
        total, first, chosen = sum(weight for _, weight in self.mixture), 0, []
        edges = [0.0, *itertools.accumulate(weight / total for _, weight in self.mixture)]
        marks = [round(edge * len(self.lengths)) for edge in edges]
        for number, (size, _) in enumerate(self.mixture):
            share = marks[number + 1] - marks[number]
            for turn in range(self.epoch * share // size, -(-(self.epoch + 1) * share // size)):
                items = list(range(first, first + size))
                random.Random(f"{self.seed} {number} {turn}").shuffle(items)
                start, end = (
                    self.epoch * share - turn * size,
                    (self.epoch + 1) * share - turn * size,
                )
                chosen += items[max(start, 0) : max(min(end, size), 0)]
            first += size
        return chosen
