"""Small training runs for the tests: twelve records, the tiny model, a recipe made on the spot."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import SPARSE, tiny_model
from PIL import Image

from sparsecut.config.recipe import parse_recipe
from sparsecut.data.collator import Collator
from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import read_examples
from sparsecut.data.jsonl import read_json_lines
from sparsecut.data.validation import check_examples
from sparsecut.training.arguments import build_arguments
from sparsecut.training.freezing import freeze
from sparsecut.training.progress import StageLog
from sparsecut.training.stages import train
from sparsecut.training.trainer import StageTrainer

ANSWERS = ["a cat", "a red dog", "blue", "yes ."]


def write_records(folder: Path, answers: Sequence[str] = ANSWERS) -> Path:
    """Write twelve records: one in four is text only, one has two images.

    data.json holds all of them, those with images first; texts.json holds the text-only ones.
    """
    rng = np.random.default_rng(0)
    records = []
    texts = []
    for i in range(12):
        pixels = rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images = [] if i % 4 == 3 else [f"{i}.png"]
        if i == 6:
            images.append("0.png")
        question = {"from": "human", "value": "<image> " * len(images) + "what is it"}
        answer = {"from": "gpt", "value": answers[i % len(answers)]}
        record = {"id": str(i), "image": images or None, "conversations": [question, answer]}
        (records if images else texts).append(record)
    (folder / "data.json").write_text(json.dumps(records + texts))
    (folder / "texts.json").write_text(json.dumps(texts))
    return folder


def write_word_records(path: Path, words: dict[str, int], has_images: bool = True) -> dict:
    """Write a file of records with so many words each, by id.

    Returns:
        The `data` of a stage that names the file.
    """
    records = []
    for name, number in words.items():
        question = ("<image>\n" if has_images else "") + "is " * (number - 1)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "ring"}]
        record = {"id": name, "conversations": turns}
        if has_images:
            record["image"] = "one.png"
        records.append(record)
    path.write_text(json.dumps(records))
    return {"path": str(path)}


def stage(folder, data="data.json", **changes):
    """One stage of three steps in a recipe's plain form."""
    args = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
    }
    args |= changes.pop("args", {})
    return {
        "name": "one",
        "data": {"path": str(folder / data)},
        "train": ["fusion"],
        "args": args,
        **changes,
    }


def recipe(folder, *stages, **changes):
    """A recipe around the stages."""
    base = {
        "model": {"vision": "tiny", "language": "tiny"},
        "fusion": SPARSE,
        "output": str(folder / "out"),
    }
    return parse_recipe({**base, "stages": list(stages) or [stage(folder)], **changes})


def run(folder, *stages, plan=SPARSE, resume=False, overwrite=False, fit=None, **changes):
    """Train the tiny model, built with the settings `fit`; returns (model, processor)."""
    model, processor = tiny_model(plan, **(fit or {}))
    changes = {"fusion": plan, **changes}
    return train(
        recipe(folder, *stages, **changes),
        model=model,
        processor=processor,
        shown=False,
        resume=resume,
        overwrite=overwrite,
    )


class Interrupted(Exception):
    """Stands for a power cut."""


@contextlib.contextmanager
def interrupt(stage_name: str, step: int):
    """Cut training off before a step of a stage, and assert that it came to that."""
    training_step = StageTrainer.training_step

    def fail(self, *args, **kwargs):
        if self.stage.name == stage_name and self.state.global_step == step:
            raise Interrupted
        return training_step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StageTrainer, "training_step", fail)
        yield


def log(folder: Path, name: str = "one", output: str = "out") -> list[dict]:
    """The lines of a stage's log."""
    return read_json_lines(folder / output / name / "log.jsonl")


def read_losses(folder: Path, name: str = "one", output: str = "out") -> list[float]:
    """The losses that a stage has logged."""
    return [line["loss"] for line in log(folder, name, output) if "loss" in line]


def trainer_for(model, processor, folder, **changes):
    """A trainer of one stage that has not started."""
    one = recipe(folder, stage(folder, **changes)).stages[0]
    freeze(model, one.train)
    encoder = example_encoder(processor)
    examples = check_examples(read_examples(folder / "data.json"), encoder)
    return StageTrainer(
        model=model,
        args=build_arguments(one, 0, folder / "out"),
        stage=one,
        log=StageLog("one", folder / "out", shown=False),
        train_dataset=TrainingData(examples, encoder),
        data_collator=Collator(encoder),
    )
