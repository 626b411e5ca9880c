"""Records from shards of every kind, mixtures of sources, and streams that go on where they
were.
"""

import itertools
import json
import os
from collections import Counter

import pytest
import torch
from helpers.runs import log, recipe, run, stage
from helpers.shards import write_shards
from helpers.tiny import tiny_model

from sparsecut import train
from sparsecut.config.recipe import Source
from sparsecut.data.dataset import Collator, TrainingData
from sparsecut.data.examples import read_examples
from sparsecut.data.packing import LengthGroupedSampler
from sparsecut.data.streaming import Stream
from sparsecut.training.trainer import StageTrainer

SETTINGS = {"template": "chat", "max_length": None, "limit": None, "max_images": None}


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json and their pictures, and the same records as shards of
    several kinds.
    """
    write_shards(tmp_path)
    return tmp_path


def pixels(examples) -> dict:
    return {e.id.rpartition("/")[2]: [p.tobytes() for p in e.pictures()] for e in examples}


@pytest.mark.parametrize(
    "path", ["part-*.jsonl", "shard-*.tar", "shard-{0..2}.tar", "saved", "table.parquet"]
)
def test_every_kind_of_file_gives_the_same_examples(folder, path):
    expected = read_examples(folder / "data.json")
    found = read_examples(folder / path)
    assert {e.id: e.messages for e in found} == {e.id: e.messages for e in expected}
    assert pixels(found) == pixels(expected)
    arrow = next((folder / "saved").glob("*.arrow"))
    assert pixels(read_examples(arrow)) == pixels(expected)
    assert not any(
        isinstance(image, bytes) for e in found for image in e.images
    )  # pictures stay on disk


def stream_of(folder, path="part-*.jsonl", start=0, rank=0, processes=1, batch=2, **more) -> Stream:
    processor = tiny_model()[1]
    sources = (Source(str(folder / path), streaming=True, **more),)
    stream = Stream(
        sources,
        TrainingData([], processor),
        SETTINGS,
        seed=5,
        batch=batch,
        rank=rank,
        processes=processes,
    )
    stream.start = start
    return stream


def ids(items) -> list:
    return [item["input_ids"].tolist() for item in items]


@pytest.mark.parametrize("path", ["part-*.jsonl", "shard-*.tar", "table.parquet"])
def test_a_stream_has_every_record_once_a_pass_in_the_seed_s_order(folder, path):
    examples = list(itertools.islice(stream_of(folder, path).examples(), 36))
    assert all(count == 3 for count in Counter(e.id for e in examples).values())
    passes = [[e.id for e in examples[at : at + 12]] for at in (0, 12, 24)]
    assert all(len(set(one)) == 12 for one in passes) and passes[0] != passes[1]
    again = list(itertools.islice(stream_of(folder, path).examples(), 36))
    assert [e.id for e in again] == [e.id for e in examples]


def test_processes_share_a_stream_and_a_later_start_passes_over_what_was_seen(folder):
    whole = ids(itertools.islice(stream_of(folder, batch=4), 24))
    halves = [
        ids(itertools.islice(stream_of(folder, rank=rank, processes=2), 12)) for rank in (0, 1)
    ]
    joined = [x for step in range(6) for half in halves for x in half[2 * step : 2 * step + 2]]
    assert joined == whole
    assert ids(itertools.islice(stream_of(folder, batch=4, start=3), 12)) == whole[12:]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_neither_order_nor_share(folder, workers):
    stream = stream_of(folder, batch=2, start=1)
    loader = torch.utils.data.DataLoader(
        stream, 2, collate_fn=Collator(stream.processor), num_workers=workers
    )
    batches = list(itertools.islice(loader, 5))
    plain = torch.utils.data.DataLoader(
        stream_of(folder, batch=2), 2, collate_fn=Collator(stream.processor)
    )
    expected = list(itertools.islice(plain, 6))[1:]
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, expected, strict=True)
    )


def test_a_stream_that_was_cut_off_goes_on_to_the_bit(folder, monkeypatch):
    args = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
    }
    given = stage(folder, train=["fusion", "language"], args=args) | {
        "data": {"path": str(folder / "part-*.jsonl"), "streaming": True}
    }

    def go(output: str, resume: bool = False):
        model, processor = tiny_model()
        for layer in model.language_model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        chosen = recipe(folder, given, output=str(folder / output))
        return train(chosen, model=model, processor=processor, shown=False, resume=resume)[0]

    whole = go("whole")
    step = StageTrainer.training_step

    def fails(self, *arguments, **named):
        if self.state.global_step == 5:
            raise InterruptedError
        return step(self, *arguments, **named)

    monkeypatch.setattr(StageTrainer, "training_step", fails)
    with pytest.raises(InterruptedError):
        go("cut")
    monkeypatch.setattr(StageTrainer, "training_step", step)
    resumed = go("cut", resume=True)
    assert [x["loss"] for x in log(folder, output="cut")] == [
        x["loss"] for x in log(folder, output="whole")
    ]
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_a_mixture_keeps_its_shares_and_repeats_nothing_before_all_was_seen():
    order = LengthGroupedSampler(
        [0] * 100, [0] * 100, 10, seed=1, grouped=False, mixture=[(80, 1.0), (20, 1.0)]
    )
    seen = []
    for epoch in range(8):
        order.set_epoch(epoch)
        one = list(order)
        assert len(one) == 100 and sum(i >= 80 for i in one) == 50
        seen += [i for i in one if i < 80]
    assert (
        len(set(seen[:50])) == 50
        and set(seen[:100]) == set(range(80))
        and set(Counter(seen).values()) == {5}
    )
    order.set_epoch(3)
    assert [i for i in order if i < 80] == seen[150:200]


def test_a_mixture_trains_by_weight(folder):
    data = [
        {"path": str(folder / "data.json"), "weight": 1},
        {"path": str(folder / "texts.json"), "weight": 3},
    ]
    args = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1}
    run(folder, stage(folder, args=args) | {"data": data})
    assert len(log(folder)) == 15


def test_broken_pictures_are_left_out_counted_and_named_until_they_are_too_many(folder):
    (folder / "5.png").write_bytes(b"broken")
    source = {"path": str(folder / "data.json"), "on_error": "skip"}
    for workers in (0, 1):
        args = {"max_steps": 12, "dataloader_num_workers": workers}
        run(
            folder,
            stage(folder, args=args) | {"data": source},
            output=str(folder / f"out-{workers}"),
        )
        sentences = (folder / f"out-{workers}" / "one" / "skipped.txt").read_text().splitlines()
        assert len(sentences) == 1 and "record 4" in sentences[0] and "5.png" in sentences[0], (
            sentences
        )
    for i in range(12):
        (folder / f"{i}.png").write_bytes(b"broken")
    lines = [
        json.loads(line)
        for part in range(3)
        for line in (folder / f"part-{part}.jsonl").read_text().splitlines()
    ]
    texts = [r for r in lines if not r["image"]]
    many = [{**r, "id": f"{r['id']}-{k}"} for r in lines for k in range(3)]
    (folder / "many.json").write_text(json.dumps(many + texts))
    source = {"path": str(folder / "many.json"), "on_error": "skip"}
    args = {"max_steps": 30, "per_device_train_batch_size": 8}
    with pytest.raises(
        ValueError,
        match=(
            r"stage one: step \d+: 27 of 39 records were left out as broken, more than"
            r" max_broken=0.01"
        ),
    ):
        run(folder, stage(folder, args=args) | {"data": source})


def test_bad_records_of_a_stream_are_named_or_stop_it(folder):
    with (folder / "part-1.jsonl").open("a") as file:
        file.write('{"id": "bad", "conversations": []}\n')
    source = {"path": str(folder / "part-*.jsonl"), "streaming": True}
    args = {"max_steps": 20}
    with pytest.raises(ValueError, match=r"part-1.jsonl line 5: there is no gpt turn"):
        run(folder, stage(folder, args=args) | {"data": source})
    run(folder, stage(folder, args=args) | {"data": {**source, "on_error": "skip"}})
    assert "part-1.jsonl line 5" in (folder / "out" / "one" / "skipped.txt").read_text()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"data": {"path": "x", "streaming": True}},
            "stage one reads a stream, whose length is not known",
        ),
        (
            {"data": {"path": "x", "streaming": True, "keep": 3}},
            "keep is set, but records of a stream are not chosen",
        ),
        (
            {"data": [{"path": "x", "streaming": True}, {"path": "y"}]},
            "stage one mixes streams and files",
        ),
        (
            {"data": [{"path": "x", "weight": 1}, {"path": "y"}]},
            "gives a weight to some of its data only",
        ),
        ({"data": [{"path": "x", "weight": 0}]}, "weight is 0, but a share is above 0"),
        ({"data": {"path": "x", "weight": 1}, "pack": 9}, "weighs its data and packs it"),
        ({"data": {"path": "x", "max_broken": 2}}, "max_broken is 2, but a share is from 0 to 1"),
        ({"data": {"path": "shard-{0..3}.tar"}}, r"shard-3.tar is not a file of records"),
        ({"data": {"path": "shard-{3..0}.tar"}}, "counts from 3 down to 0"),
        ({"data": {"path": "nowhere-*.jsonl"}}, r"nowhere-\*.jsonl is not a file of records"),
    ],
)
def test_what_cannot_be_mixed_or_streamed_is_refused_in_a_sentence(folder, changes, sentence):
    plain = stage(folder, args={"max_steps": -1, "num_train_epochs": 1})
    os.chdir(folder)
    with pytest.raises(ValueError, match=sentence):
        run(folder, plain | changes)


@pytest.mark.parametrize("workers", [0, 2])
def test_another_record_takes_the_place_of_a_broken_one_even_where_it_is_alone_in_its_batch(
    folder, workers
):
    (folder / "5.png").write_bytes(b"broken")
    source = {"path": str(folder / "data.json"), "on_error": "skip"}
    args = {"max_steps": 12, "per_device_train_batch_size": 1, "dataloader_num_workers": workers}
    run(folder, stage(folder, args=args) | {"data": source}, output=str(folder / "skipping"))
    assert "5.png" in (folder / "skipping" / "one" / "skipped.txt").read_text()
    data = TrainingData(read_examples(folder / "data.json", problems=[]), tiny_model()[1])
    assert data[4]["broken"] and torch.equal(data[4]["pixel_values"], data[6]["pixel_values"])
    assert len(data[4]["input_ids"]) <= data.lengths[4] and "broken" not in data[6]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_a_stream_with_broken_records_has_the_same_batches_after_resuming_and_names_each(
    folder, workers, start
):
    (folder / "5.png").write_bytes(b"broken")
    with (folder / "part-1.jsonl").open("a") as file:
        file.write('{"id": "bad", "conversations": []}\n')
    batches = []
    for begin, number in ((0, 0), (start, workers)):
        stream = stream_of(folder, start=begin, on_error="skip")
        loader = torch.utils.data.DataLoader(
            stream, 2, collate_fn=Collator(stream.processor), num_workers=number
        )
        batches.append(list(itertools.islice(loader, 12 - begin)))
    for one, other in zip(batches[0][start:], batches[1], strict=True):
        assert broken_in(one) == broken_in(other)
        assert torch.equal(one["input_ids"], other["input_ids"])
    assert {len(batch["input_ids"]) for batch in batches[0]} == {2}
    messages = [message for batch in batches[0] for message in broken_in(batch)]
    assert sum("5.png" in message for message in messages) >= 2
    assert sum("no gpt turn" in message for message in messages) >= 1


def broken_in(batch: dict) -> list[str]:
    """Messages about the broken records of a batch."""
    return [str(error) for error in batch.get("broken", ())]


def test_a_record_of_a_stream_that_is_too_long_stops_it_or_is_replaced(folder):
    source = {"path": str(folder / "part-*.jsonl"), "streaming": True}
    args = {"max_steps": 6}
    with pytest.raises(
        ValueError, match=r"jsonl line \d: the record has 8 image tokens, but max_image_tokens=4"
    ):
        run(folder, stage(folder, max_image_tokens=4, args=args) | {"data": source})
    run(
        folder,
        stage(folder, max_image_tokens=4, args=args) | {"data": {**source, "on_error": "skip"}},
    )
    assert "has 8 image tokens" in (folder / "out" / "one" / "skipped.txt").read_text()


def test_where_states_are_kept_broken_pictures_are_skipped_beforehand(folder):
    (folder / "5.png").write_bytes(b"broken")
    source = {"path": str(folder / "data.json"), "on_error": "skip"}
    run(folder, stage(folder) | {"data": source}, states=str(folder / "states"))
    assert "5.png" in (folder / "out" / "skipped.txt").read_text()


def test_what_stops_a_worker_is_told_in_one_sentence(folder):
    (folder / "1.png").write_bytes(b"broken")
    with pytest.raises(
        ValueError, match=r"^stage one: .*record \d: the picture 1.png in .* is broken"
    ) as caught:
        run(folder, stage(folder, args={"max_steps": 6, "dataloader_num_workers": 1}))
    assert "Traceback" not in str(caught.value)


def test_a_stream_with_a_broken_picture_goes_on_after_a_kill_with_other_workers(
    folder, monkeypatch
):
    (folder / "5.png").write_bytes(b"broken")
    data = {"path": str(folder / "part-*.jsonl"), "streaming": True, "on_error": "skip"}

    def go(output: str, workers: int, **more):
        args = {
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 2,
            "dataloader_num_workers": workers,
        }
        run(folder, stage(folder, args=args) | {"data": data}, output=str(folder / output), **more)

    go("whole", 0)
    step = StageTrainer.training_step

    def fails(self, *arguments, **named):
        if self.state.global_step == 3:
            raise InterruptedError
        return step(self, *arguments, **named)

    monkeypatch.setattr(StageTrainer, "training_step", fails)
    with pytest.raises(InterruptedError):
        go("cut", 2)
    monkeypatch.setattr(StageTrainer, "training_step", step)
    go("cut", 0, resume=True)
    assert [x["loss"] for x in log(folder, output="cut")] == [
        x["loss"] for x in log(folder, output="whole")
    ]
    named = [(folder / output / "one" / "skipped.txt").read_text() for output in ("whole", "cut")]
    assert named[0] == named[1] and named[0].count("\n") == 1
