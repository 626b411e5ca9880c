"""Streams: every record once a pass in the seed's order, however the work is divided."""

import itertools
from collections import Counter
from functools import cache

import pytest
import torch
from helpers.records import broken_in
from helpers.shards import write_shards
from helpers.tiny import tiny_model
from torch.utils.data import DataLoader

from sparsecut.config.recipe import Source
from sparsecut.data.collator import Collator
from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import example_encoder
from sparsecut.data.errors import RecordError
from sparsecut.data.length_limits import Limits
from sparsecut.data.streaming import Stream, read_first_examples


@cache
def encoder():
    return example_encoder(tiny_model()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The twelve records as shards of several kinds."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


@pytest.fixture
def broken_folder(tmp_path):
    """The same, with a broken image and a bad record."""
    write_shards(tmp_path)
    (tmp_path / "5.png").write_bytes(b"broken")
    with (tmp_path / "part-1.jsonl").open("a") as file:
        file.write('{"id": "bad", "conversations": []}\n')
    return tmp_path


def make_stream(folder, path="part-*.jsonl", start=0, rank=0, processes=1, batch=2, **more):
    source = Source(str(folder / path), streaming=True, **more)
    data = TrainingData([], encoder())
    stream = Stream((source,), data, seed=5, batch=batch, rank=rank, processes=processes)
    stream.start = start
    return stream


def read_batches(stream: Stream, number: int, num_workers: int = 0) -> list[dict]:
    loader = DataLoader(
        stream, stream.batch, collate_fn=Collator(encoder()), num_workers=num_workers
    )
    return list(itertools.islice(loader, number))


def read_ids(stream: Stream, number: int) -> list:
    return [item["input_ids"].tolist() for item in itertools.islice(stream, number)]


@pytest.mark.parametrize("path", ["part-*.jsonl", "shard-*.tar", "table.parquet"])
def test_a_stream_has_every_record_once_a_pass_in_the_seed_s_order(folder, path):
    examples = list(itertools.islice(make_stream(folder, path).iterate_examples(), 36))
    ids = [example.id for example in examples]
    passes = [ids[start : start + 12] for start in (0, 12, 24)]
    assert all(len(set(one)) == 12 for one in passes)
    assert passes[0] != passes[1]
    assert set(Counter(ids).values()) == {3}
    again = itertools.islice(make_stream(folder, path).iterate_examples(), 36)
    assert [example.id for example in again] == ids


def test_processes_share_a_stream_and_a_later_start_passes_over_what_was_seen(folder):
    whole = read_ids(make_stream(folder, batch=4), 24)
    halves = [read_ids(make_stream(folder, rank=rank, processes=2), 12) for rank in (0, 1)]
    joined = []
    for step in range(6):
        joined += halves[0][2 * step : 2 * step + 2] + halves[1][2 * step : 2 * step + 2]
    assert joined == whole
    assert read_ids(make_stream(folder, batch=4, start=3), 12) == whole[12:]


@pytest.mark.parametrize("start, num_workers", [(0, 2), (1, 0), (1, 2), (5, 2)])
def test_workers_and_resuming_change_no_batch_and_every_broken_record_is_named(
    broken_folder, start, num_workers
):
    expected = read_batches(make_stream(broken_folder, on_error="skip"), 12)
    stream = make_stream(broken_folder, start=start, on_error="skip")
    batches = read_batches(stream, 12 - start, num_workers)
    for one, other in zip(expected[start:], batches, strict=True):
        assert broken_in(one) == broken_in(other)
        assert torch.equal(one["input_ids"], other["input_ids"])
    assert all(len(batch["input_ids"]) == 2 for batch in expected)
    messages = []
    for batch in expected:
        messages += broken_in(batch)
    assert sum("5.png" in message for message in messages) >= 2
    assert sum("no gpt turn" in message for message in messages) >= 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_record_stops_a_stream_with_its_own_error(broken_folder, num_workers):
    stream = make_stream(broken_folder)
    collator = Collator(encoder(), defer_errors=True)
    loader = DataLoader(stream, 2, collate_fn=collator, num_workers=num_workers)
    *_, last = loader
    assert isinstance(last["error"], RecordError)


def test_what_is_wrong_with_the_first_records_is_found_beforehand(folder):
    short = example_encoder(tiny_model()[1], limits=Limits(max_image_tokens=4))
    source = Source(str(folder / "part-*.jsonl"), streaming=True)
    assert len(read_first_examples(source, encoder(), 5)) == 5
    with pytest.raises(RecordError, match=r"jsonl line \d: .*\b8\b.*max_image_tokens=4"):
        read_first_examples(source, short)
    skipping = Source(str(folder / "part-*.jsonl"), streaming=True, on_error="skip")
    assert len(read_first_examples(skipping, short)) == 11
