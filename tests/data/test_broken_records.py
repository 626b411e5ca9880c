"""Training goes on over broken records: others replace them, and all are counted and named."""

import json

import pytest
import torch
from helpers.records import broken_in
from helpers.runs import log, recipe, run, stage, write_records
from helpers.tiny import tiny_model

from sparsecut import train
from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import read_examples
from sparsecut.schema import UserError
from sparsecut.training.trainer import StageTrainer


@pytest.fixture
def folder(tmp_path):
    """The twelve records; one image is broken."""
    write_records(tmp_path)
    (tmp_path / "5.png").write_bytes(b"broken")
    return tmp_path


@pytest.fixture
def stream_folder(folder):
    """The same in three shards."""
    records = json.loads((folder / "data.json").read_text())
    for part in range(3):
        lines = [json.dumps(record) for record in records[part::3]]
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def read_skipped(folder, output="out") -> list[str]:
    return (folder / output / "one" / "skipped.txt").read_text().splitlines()


def get_losses(folder, output: str) -> list[float]:
    return [line["loss"] for line in log(folder, output=output)]


def test_a_broken_record_s_place_is_taken_by_one_that_is_no_larger(folder):
    examples = read_examples(folder / "data.json", problems=[])
    data = TrainingData(examples, example_encoder(tiny_model()[1]))
    (message,) = broken_in(data[4])
    assert "record 4" in message and "5.png" in message
    assert torch.equal(data[4]["pixel_values"], data[6]["pixel_values"])
    assert len(data[4]["input_ids"]) <= data.lengths[4]
    assert "broken" not in data[6]


@pytest.mark.parametrize("num_workers, batch_size", [(0, 2), (1, 1)])
def test_broken_records_are_named_once(folder, num_workers, batch_size):
    source = {"path": str(folder / "data.json"), "on_error": "skip"}
    args = {
        "max_steps": 12,
        "dataloader_num_workers": num_workers,
        "per_device_train_batch_size": batch_size,
    }
    run(folder, stage(folder, args=args) | {"data": source})
    (line,) = read_skipped(folder)
    assert "record 4" in line and "5.png" in line


def test_too_many_broken_records_stop_training(folder):
    records = json.loads((folder / "data.json").read_text())
    texts = [record for record in records if not record["image"]]
    many = []
    for record in records:
        many += [{**record, "id": f"{record['id']}-{copy}"} for copy in range(3)]
    (folder / "many.json").write_text(json.dumps(many + texts))
    for i in range(12):
        (folder / f"{i}.png").write_bytes(b"broken")
    source = {"path": str(folder / "many.json"), "on_error": "skip"}
    args = {"max_steps": 30, "per_device_train_batch_size": 8}
    with pytest.raises(UserError, match=r"stage one: step \d+: \d+ of 39 .*max_broken=0.01"):
        run(folder, stage(folder, args=args) | {"data": source})


def test_an_error_in_a_worker_is_the_record_s_own(folder):
    with pytest.raises(UserError, match=r"^stage one: .*record 4: .*5.png") as caught:
        run(folder, stage(folder, args={"max_steps": 6, "dataloader_num_workers": 1}))
    assert "Traceback" not in str(caught.value)


def test_bad_records_of_a_stream_are_named_or_stop_it(stream_folder):
    with (stream_folder / "part-1.jsonl").open("a") as file:
        file.write('{"id": "bad", "conversations": []}\n')
    source = {"path": str(stream_folder / "part-*.jsonl"), "streaming": True}
    one = stage(stream_folder, max_image_tokens=4, args={"max_steps": 8})
    with pytest.raises(UserError, match=r"part-\d.jsonl line \d"):
        run(stream_folder, one | {"data": source})
    run(stream_folder, one | {"data": {**source, "on_error": "skip"}})
    skipped = "\n".join(read_skipped(stream_folder))
    assert "part-1.jsonl line 5" in skipped
    assert "8 image tokens" in skipped


def test_a_stream_that_was_killed_goes_on_to_the_bit_with_other_workers(stream_folder, monkeypatch):
    """With dropout, accumulation, a broken image, and workers before the kill only."""
    source = {
        "path": str(stream_folder / "part-*.jsonl"),
        "streaming": True,
        "on_error": "skip",
    }
    args = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
    }

    def train_stream(output: str, num_workers: int, resume: bool = False) -> dict:
        model, processor = tiny_model()
        for layer in model.language_model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        one = stage(
            stream_folder,
            train=["fusion", "language"],
            args={**args, "dataloader_num_workers": num_workers},
        )
        one_recipe = recipe(
            stream_folder, one | {"data": source}, output=str(stream_folder / output)
        )
        model, _ = train(one_recipe, model=model, processor=processor, shown=False, resume=resume)
        return model.state_dict()

    whole = train_stream("whole", 0)
    training_step = StageTrainer.training_step

    def fail(self, *arguments, **named):
        if self.state.global_step == 3:
            raise InterruptedError
        return training_step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", fail)
        with pytest.raises(InterruptedError):
            train_stream("cut", 2)
    resumed = train_stream("cut", 0, resume=True)
    assert get_losses(stream_folder, "cut") == get_losses(stream_folder, "whole")
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name
    assert read_skipped(stream_folder, "cut") == read_skipped(stream_folder, "whole")
    assert len(read_skipped(stream_folder, "cut")) == 1


def test_with_a_feature_cache_broken_images_are_skipped_beforehand(folder):
    source = {"path": str(folder / "data.json"), "on_error": "skip"}
    run(folder, stage(folder) | {"data": source}, feature_cache=str(folder / "features"))
    assert "5.png" in (folder / "out" / "skipped.txt").read_text()
