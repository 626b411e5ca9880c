"""Records that are read from files while training goes on: nothing is indexed or held in memory.

Every process and worker walks through the same stream of records and takes its part of it; images
are opened only for that part. So the order depends on the seed alone, neither on the number of
processes nor of workers. A resumed run passes over what was seen without opening it.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info

from ..config.recipe import Source
from ..config.yaml_io import expand_path
from ..schema import UserError
from .access import get_access
from .dataset import TrainingData
from .encoding import ExampleEncoder
from .errors import RecordError
from .examples import Example, parse_record
from .form_choice import Columns, get_columns
from .images import ImageStore
from .locating import find_record_files
from .record_files import RecordFile
from .sides import drop_images
from .unknown_records import UnknownCount

NUM_RECENT = 100  # records that went by, which may take a broken one's place
NUM_NAMED = 1000  # records of which one must have each of the source's columns
BUFFER = 1000  # records among which the next one is drawn


class Stream(IterableDataset):
    """Items of a stage's streaming sources, without end.

    A bad record of a source with on_error "skip" is named in "broken" of the item that comes next.
    Any other bad record stops the stream.

    Attributes:
        sources: The streaming sources.
        data: Makes items of examples; it has none of its own.
        seed: Seed of the order.
        batch: Records of a process's micro-batch.
        rank: The number of this process.
        processes: The number of processes.
        start: Micro-batches that each process has seen before.
    """

    def __init__(
        self,
        sources: tuple[Source, ...],
        data: TrainingData,
        *,
        seed: int,
        batch: int,
        rank: int,
        processes: int,
    ):
        self.sources = sources
        self.data = data
        self.seed = seed
        self.batch = batch
        self.rank = rank
        self.processes = processes
        self.start = 0

    @property
    def encoder(self) -> ExampleEncoder:
        """Encodes the examples."""
        return self.data.encoder

    @property
    def feature_cache(self):
        """Vision features of all images, or None."""
        return self.data.feature_cache

    @property
    def tap_views(self) -> dict[int, int] | None:
        """The taps that are read from the feature cache -> number of views."""
        return self.data.tap_views

    def __iter__(self) -> Iterator[dict]:
        """Yield items for a DataLoader; an error becomes a last item {"error": error}.

        A worker process would pass on only the text of an error (`TrainingData.__getitems__`).
        """
        try:
            yield from self._iterate_items()
        except UserError as error:
            yield {"error": error}

    def _iterate_items(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        place = 0  # of the record in the stream
        broken = []
        recent: deque[Example] = deque(maxlen=NUM_RECENT)
        for example in self.iterate_examples():
            if isinstance(example, RecordError):
                broken.append(example)
                continue
            if self._is_mine(place, number, num_workers):
                item = self.data.make_item(example, reversed(recent))
                errors = [*broken, *item.get("broken", ())]
                yield {**item, "broken": errors} if errors else item
            broken = []  # named by whoever has the record that follows
            recent.append(example)
            place += 1

    def _is_mine(self, place: int, worker: int, num_workers: int) -> bool:
        """Whether the record at a place of the stream is for this process and worker."""
        step, index = divmod(place, self.batch * self.processes)
        if step < self.start or index // self.batch != self.rank:
            return False
        return (step - self.start) % num_workers == worker

    def iterate_examples(self) -> Iterator[Example | RecordError]:
        """Yield the stage's examples in order, without end, and errors of records left out.

        Every source is shuffled anew in each pass, and sources are mixed by weight.
        """
        generator = random.Random(f"{self.seed} sources")
        streams = [self._iterate_source(source, i) for i, source in enumerate(self.sources)]
        weights = [source.weight or 1.0 for source in self.sources]
        while True:
            (chosen,) = generator.choices(range(len(streams)), weights)
            yield next(streams[chosen])

    def _iterate_source(self, source: Source, number: int) -> Iterator[Example | RecordError]:
        for turn in itertools.count():
            generator = random.Random(f"{self.seed} {number} {turn}")
            files = find_record_files(source)
            generator.shuffle(files)
            is_empty = True
            for example in _shuffle(read_stream(source, files), generator):
                is_empty = is_empty and isinstance(example, RecordError)
                yield example
            if is_empty:
                raise UserError(
                    f"{source.path} gives no record to train on in a whole pass through its"
                    f" {len(files)} files"
                )


def _shuffle(
    examples: Iterator[Example | RecordError], generator: random.Random
) -> Iterator[Example | RecordError]:
    """Examples in a random order, each drawn from a buffer; errors as they come."""
    buffer = []
    for example in examples:
        if isinstance(example, RecordError):
            yield example
        elif len(buffer) < BUFFER:
            buffer.append(example)
        else:
            i = generator.randrange(BUFFER)
            yield buffer[i]
            buffer[i] = example
    generator.shuffle(buffer)
    yield from buffer


def read_stream(
    source: Source, files: list[RecordFile] | None = None, columns: Columns | None = None
) -> Iterator[Example | RecordError]:
    """Yield a source's examples in the order of its files, and errors of records it may skip.

    Only the form of a record is checked, because every worker of every process passes over all
    records. Whether one has a target is checked when it is encoded.

    Args:
        source: The source.
        files: Its files, where their order is another one.
        columns: Its columns, by default new ones that have seen nothing.

    Raises:
        RecordError: A record is bad, and the source says on_error "stop".
    """
    skip = source.on_error == "skip"
    access = get_access(source)
    columns = columns or get_columns(source)
    images = ImageStore(expand_path(source.images), access) if source.images else None
    for file in find_record_files(source) if files is None else files:
        store = images or file.open_images(access, by_name=False)
        for place, record in file.read(access, images_by_name=False):
            try:
                example = parse_record(record, place, store, skip=skip, columns=columns)
                yield drop_images(example) if source.text_only else example
            except RecordError as error:
                if not skip:
                    raise
                yield error


def read_first_examples(
    source: Source,
    encoder: ExampleEncoder,
    number: int = 32,
    *,
    unknown: UnknownCount | None = None,
) -> list[Example]:
    """Return the first good records of a stream.

    A mistake in all records is thus found before the first step. Records whose words the tokenizer
    does not know are counted in `unknown`.

    Raises:
        RecordError: A record is bad, and the source says on_error "stop".
        UserError: None of the first 1,000 records has one of the source's columns.
    """
    _check_columns(source)
    good = []
    for example in itertools.islice(read_stream(source), number):
        if isinstance(example, RecordError):
            continue
        try:
            found = encoder.check(example)
        except RecordError:
            if source.on_error != "skip":
                raise
        else:
            good.append(example)
            if unknown is not None:
                unknown.add(example, found)
    return good


def _check_columns(source: Source) -> None:
    """Raise UserError where a column is misspelt, which may leave out all images."""
    if not source.columns:
        return
    columns = Columns(source.columns, source.question)
    for _ in itertools.islice(read_stream(source, columns=columns), NUM_NAMED):
        if not columns.unseen:
            return
    columns.check_seen(f"the first {NUM_NAMED:,} records of {source.path}")
