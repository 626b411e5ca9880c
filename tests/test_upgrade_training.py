"""From a recipe with a base to answers: what is trained, saved, loaded and asked is the base's own way, with shortcuts."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import log, stage, write_records

from sparsecut import load, train, upgrade
from sparsecut.data import read_examples
from sparsecut.evaluation import evaluate
from sparsecut.labels import encode_batch
from sparsecut.prompting import features_of, render
from sparsecut.recipe import parse_recipe
from sparsecut.records import IMAGE, Example

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("upgrade_vlm", ROOT / "examples" / "upgrade_vlm.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
KINDS = {"llava": {"view": 16}, "qwen": {"view": 32}}
TEXTS = ["what is it is it a red cat yes no ASSISTANT USER user assistant a red dog blue are you sure"] * 3


def base_of(kind: str):
    """(model, processor): a tiny random base of the example."""
    torch.manual_seed(0)
    model, processor = getattr(example, kind)(TEXTS, width=32, vocabulary=300, **KINDS[kind])
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)  # so that it says different things
    return model, processor


@pytest.fixture(params=KINDS)
def base(request):
    return base_of(request.param)


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json, their pictures, and a LLaVA in base/."""
    write_records(tmp_path)
    model, processor = base_of("llava")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def recipe(folder, *stages, **changes):
    plain = {"model": {"base": str(folder / "base")}, "output": str(folder / "out"), "stages": list(stages)}
    return parse_recipe({**plain, "stages": list(stages) or [stage(folder)], **changes})


def talk(*turns: str, images=()) -> Example:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return Example("x", list(images), messages, source="talk.json record 0")


TALKS = [  # conversation, sizes of its pictures
    (talk(f"{IMAGE}\nwhat is it", "a red cat", "are you sure ?", "yes"), [(40, 20)]),
    (talk(f"is {IMAGE} it\n{IMAGE} or", "no"), [(16, 30), (64, 48)]),
    (talk("what is blue", "it is a dog", "sure", "a"), []),
]


def test_what_is_learned_follows_exactly_the_prompt_of_inference(base):
    processor = base[1]
    pictures = [[picture(*size) for size in sizes] for _, sizes in TALKS]
    batch = encode_batch([one for one, _ in TALKS], processor, pictures=pictures)
    for row, (one, _) in enumerate(TALKS):
        length = int(batch["attention_mask"][row].sum())
        ids, labels = batch["input_ids"][row, :length], batch["labels"][row, :length]
        answers, start = [m["content"] for m in one.messages if m["role"] == "assistant"], 0
        for number, answer in enumerate(answers):
            asked = [
                {**m, "content": m["content"].replace(IMAGE, processor.image_token)}
                for m in one.messages[: 2 * number + 1]
            ]
            prompt = features_of(processor, [render(processor, asked)], pictures[row : row + 1])["input_ids"][0]
            assert torch.equal(ids[: len(prompt)], prompt) and (labels[start : len(prompt)] == -100).all()
            learned = labels[len(prompt) :].tolist()
            learned = learned[: learned.index(-100)] if -100 in learned else learned
            last = number + 1 == len(answers)
            ends = processor.tokenizer.eos_token if last or "im_end" in processor.chat_template else ""
            assert processor.decode(learned).strip() == answer + ends
            start = len(prompt) + len(learned)
        assert (labels[start:] == -100).all() and (batch["labels"][row, length:] == -100).all()


def test_a_batch_is_what_the_processor_makes_of_it(base):
    model, processor = base
    pictures = [[picture(*size) for size in sizes] for _, sizes in TALKS]
    batch = encode_batch([one for one, _ in TALKS], processor, pictures=pictures)
    model(**batch).loss.backward()
    alone = encode_batch([TALKS[0][0]], processor, pictures=pictures[:1])
    length = alone["input_ids"].shape[1]
    assert all(torch.equal(alone[name][0], batch[name][0, :length]) for name in ("input_ids", "labels"))


def test_shortcuts_are_trained_by_a_recipe_and_the_base_is_not(folder):
    args = {"max_steps": 30, "per_device_train_batch_size": 4}
    model, _ = train(recipe(folder, stage(folder, args=args)), shown=False)
    losses = [line["loss"] for line in log(folder) if "loss" in line]
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])
    untouched = base_of("llava")[0].state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in model.base.state_dict().items())
    files = {path.name for path in (folder / "out" / "final").iterdir()}
    assert {"fusion.safetensors", "fusion.json", "config.yaml", "processor_config.json"} <= files
    assert not files & {"model.safetensors", "config.json"}

    again, processor = load(folder / "out" / "final")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    asked = read_examples(folder / "data.json")
    found = evaluate(again, processor, asked, out=folder / "eval", max_new_tokens=4)
    assert found["num_examples"] == 12 and found["views"]["tiles"] == 2
    said = (folder / "eval" / "predictions.jsonl").read_text()
    for out, off in (("single", ()), ("off", again.fusion.gated)):
        with again.fusion.switched_off(*off):
            evaluate(again, processor, asked, out=folder / out, max_new_tokens=4, batch_size=1)
    assert (folder / "single" / "predictions.jsonl").read_text() == said
    evaluate(*upgrade(folder / "base"), asked, out=folder / "plain", max_new_tokens=4)
    off, plain = (json.loads((folder / name / "result.json").read_text()) for name in ("off", "plain"))
    assert off["accuracy"] == plain["accuracy"]
    assert (folder / "off" / "predictions.jsonl").read_text() == (folder / "plain" / "predictions.jsonl").read_text()


@pytest.mark.parametrize("base", ["llava"], indirect=True)
def test_a_loaded_base_is_trained_too(base, tmp_path):
    write_records(tmp_path)
    before = {name: value.clone() for name, value in base[0].state_dict().items()}
    model, processor = train(recipe(tmp_path), model=base[0], processor=base[1], shown=False)
    assert model.base is base[0]
    assert all(torch.equal(before[name], value) for name, value in model.base.state_dict().items())
    assert any(value.abs().sum() > 0 for value in model.fusion.paths[0].linear_2.parameters())
    evaluate(model, processor, read_examples(tmp_path / "data.json")[:3], max_new_tokens=2)
