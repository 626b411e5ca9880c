"""Records that are read from shards while training goes on: nothing is indexed or kept, and the
order is the seed's.

Every process and worker walks through the same stream of texts and takes its own share of it; pictures are opened only for that. So the
order depends neither on the number of processes nor of workers, and a resumed run passes over what was seen without opening it.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import IterableDataset, get_worker_info

from ..config.recipe import Source
from ..config.yaml_io import expand_path
from ..prompts import is_fixed
from ..schema import UserError
from .dataset import check_examples
from .encoding import written
from .errors import RecordError
from .examples import Example, example_from
from .images import Pictures
from .readers import files_of, read_records

LAST = 100  # records that went by, which may take a broken one's place
BUFFER = 1000  # records among which the next one is drawn


class Stream(IterableDataset):
    """Items of a stage's streaming sources without end, as `data` (a TrainingData) makes them of
    examples.

    settings: what `check_examples` is to keep of the stage. batch, rank, processes: records of a
    process's micro-batch, which process this is, and of how many; `start`: how many micro-batches
    each has seen. A bad record of a source with on_error "skip" is told of as "broken" in the item
    that comes next, and any other stops the stream.
    """

    def __init__(
        self,
        sources: tuple[Source, ...],
        data,
        settings: dict,
        *,
        seed: int,
        batch: int,
        rank: int,
        processes: int,
    ):
        self.sources, self.data, self.settings, self.seed = sources, data, settings, seed
        self.batch, self.rank, self.processes, self.start = batch, rank, processes, 0

    def __getattr__(self, name: str):
        if name not in ("processor", "template", "states", "views"):
            raise AttributeError(name)
        return getattr(self.data, name)

    def __iter__(self) -> Iterator[dict]:
        """Items for a DataLoader; an error of the user's data becomes a last item {"error": error}.

        A worker process would hand on only the text of an error (`TrainingData.__getitems__`).
        """
        try:
            yield from self._items()
        except UserError as error:
            yield {"error": error}

    def _items(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        whole, place, broken, before = self.batch * self.processes, 0, [], deque(maxlen=LAST)
        own = range(self.rank * self.batch, (self.rank + 1) * self.batch)
        for example in self.examples():
            if isinstance(example, RecordError):
                broken.append(example)
                continue
            step, at = divmod(place, whole)
            place += 1
            if step >= self.start and (step - self.start) % workers == number and at in own:
                item = self.data.item(example, reversed(before), check=self._check)
                told = [*broken, *item.get("broken", ())]
                yield {**item, "broken": told} if told else item
            broken = []  # whoever has the record that follows tells of them
            before.append(example)

    def _check(self, example: Example) -> None:
        check_one(example, self.processor, self.settings)

    def examples(self) -> Iterator[Example | RecordError]:
        """The stage's examples in their order, without end: every source shuffled anew in each
        pass, and mixed by weight.

        Between them sentences about records that are left out.
        """
        drawn = random.Random(f"{self.seed} sources")
        streams = [self._of_source(source, i) for i, source in enumerate(self.sources)]
        weights = [source.weight or 1.0 for source in self.sources]
        while True:
            yield next(streams[drawn.choices(range(len(streams)), weights)[0]])

    def _of_source(self, source: Source, number: int) -> Iterator[Example | RecordError]:
        for turn in itertools.count():
            order = random.Random(f"{self.seed} {number} {turn}")
            shards = files_of(expand_path(source.path))
            order.shuffle(shards)
            found, buffer = False, []
            for example in passing(source, shards):
                if isinstance(example, RecordError):
                    yield example
                    continue
                found = True
                if len(buffer) < BUFFER:
                    buffer.append(example)
                    continue
                i = order.randrange(BUFFER)
                yield buffer[i]
                buffer[i] = example
            order.shuffle(buffer)
            yield from buffer
            if not found:
                raise UserError(
                    f"{source.path} gives no record to learn from in a whole pass through its"
                    f" {len(shards)} files"
                )


def passing(source: Source, shards: list[Path]) -> Iterator[Example | RecordError]:
    """A source's records in the order of its files, each checked as far as its form goes; of bad
    ones that may be skipped, a sentence.

    Whether there is something to learn in it is seen by who has its turn: every worker of every
    process passes over all records.
    """
    skip = source.on_error == "skip"
    for shard in shards:
        store = Pictures(expand_path(source.images) if source.images else shard.parent)
        for place, record in read_records(shard):
            try:
                yield example_from(record, place, store, skip=skip)
            except RecordError as error:
                if not skip:
                    raise
                yield error


def check_one(example: Example, processor, settings: dict) -> None:
    """Raise ValueError where a record cannot be learned from; of a base's own processor, whose
    pictures count, only where it is written.
    """
    if is_fixed(processor):
        check_examples([example], processor, **settings)
    else:
        written(example, processor, settings["template"])


def first_of(source: Source, processor, settings: dict, num: int = 32) -> list[Example]:
    """The first good records of a stream, so that what is wrong with all of them is told before the
    first step.
    """
    good = []
    for example in itertools.islice(passing(source, files_of(expand_path(source.path))), num):
        if isinstance(example, RecordError):
            continue
        try:
            check_one(example, processor, settings)
            good.append(example)
        except RecordError:
            if source.on_error != "skip":
                raise
    return good
