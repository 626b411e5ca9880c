"""Training, evaluation, chat, serving and ablation on images of any size."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_language, tiny_tokenizer, tiny_vision
from PIL import Image
from transformers import CLIPImageProcessorPil

from sparsecut import Chat, build, load, train
from sparsecut.config.recipe import parse_recipe
from sparsecut.data.collator import Collator
from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import read_examples
from sparsecut.evaluation.ablation import explain
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.profiling.dry_run import dry_run
from sparsecut.prompts import encode_prompts, render_prompt
from sparsecut.schema import UserError
from sparsecut.serving.model_runner import ModelRunner

SIZES = [(100, 400), (400, 100), (48, 48), (30, 300)]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A folder of eight records; one has two images, one of which is turned by its tag."""
    folder = tmp_path_factory.mktemp("records")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(8):
        height, width = SIZES[i % 4]
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 1 else 1
        image.save(folder / f"{i}.jpg", exif=exif)
        names = [f"{i}.jpg", "1.jpg"] if i == 2 else [f"{i}.jpg"]
        question = {"from": "human", "value": "<image> " * len(names) + "what colour is it?"}
        answer = {"from": "gpt", "value": "red"}
        lines.append({"id": str(i), "image": names, "conversations": [question, answer]})
    (folder / "data.json").write_text(json.dumps(lines))
    return folder


def make_recipe(folder, output, stage=None, **model):
    parts = {"vision": "shapes", "language": "shapes", "coarse": "native", **model}
    args = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    data = {"path": str(folder / "data.json")}
    stage = {"name": "one", "data": data, "train": ["fusion"], "args": args} | (stage or {})
    return parse_recipe(
        {
            "model": parts,
            "fusion": {"method": "sparsecut", "tiles": 2},
            "stages": [stage],
            "output": str(output),
        }
    )


@pytest.fixture(scope="module")
def trained(records, tmp_path_factory):
    """(model, processor, examples) of a recipe, loaded from its folder."""
    output = tmp_path_factory.mktemp("run")
    train(make_recipe(records, output, max_pixels=4 * 48 * 48), shown=False)
    model, processor = load(output / "final")
    return model, processor, read_examples(records / "data.json")


def test_a_recipe_keeps_the_limits_in_the_saved_model(trained):
    _, processor, _ = trained
    assert (processor.coarse, processor.max_pixels) == ("native", 4 * 48 * 48)
    assert processor.min_pixels == 48 * 48


def test_images_in_tables_and_in_records_are_counted_too(trained, records, tmp_path):
    _, _, examples = trained
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [(records / example.images[0]).read_bytes() for example in examples]
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]
    table = {"image": [{"bytes": file, "path": None} for file in files]}
    table["conversations"] = [turns] * len(files)
    parquet.write_table(pyarrow.table(table), tmp_path / "data.parquet")
    stored = read_examples(tmp_path / "data.parquet")
    inline = [dataclasses.replace(x, images=[f]) for x, f in zip(stored, files, strict=True)]
    for example, in_table, in_record in zip(examples, stored, inline, strict=True):
        sizes = [(image.height, image.width) for image in example.load_images()[:1]]
        assert in_table.read_sizes() == in_record.read_sizes() == sizes


def test_an_example_has_as_many_tokens_as_the_processor_writes(trained):
    """The sizes are those of upright images, read without their pixels."""
    _, processor, examples = trained
    encoder = example_encoder(processor)
    data = TrainingData(examples, encoder)
    for example, count in zip(examples, data.num_image_tokens, strict=True):
        item = data.make_item(example)
        grids = [processor.choose_grid(i.height, i.width) for i in example.load_images()]
        assert item["image_grids"].tolist() == [list(grid) for grid in grids]
        expected = sum(processor.count_tokens(grid) for grid in grids)
        assert int((item["input_ids"] == processor.image_token_id).sum()) == expected == count
        assert len(item["pixel_values"]) == sum(rows * columns for rows, columns in grids)
    assert len(set(data.num_image_tokens)) > 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_has_the_loss_of_its_examples(trained, packed):
    model, processor, examples = trained
    data = TrainingData(examples, example_encoder(processor))
    collator = Collator(data.encoder)
    items = [data[i] for i in range(4)]
    alone = []
    for item in items:
        batch = collator([item])
        alone.append(model(**batch).loss * (batch["labels"] != -100).sum())
    batch = collator([items[:2], items[2:]] if packed else items)
    num_targets = (batch["labels"] != -100).sum()
    loss = model(**batch, use_cache=False).loss
    assert torch.allclose(loss, sum(alone) / num_targets, atol=1e-4)


@pytest.mark.parametrize(
    "stage", [{"pack": 200}, {"group": True}, {"pad_to": 16}], ids=["packed", "grouped", "padded"]
)
def test_stages_of_every_layout_train(records, tmp_path, stage):
    model, _ = train(make_recipe(records, tmp_path / "out", stage), shown=False)
    assert all(parameter.isfinite().all() for parameter in model.fusion.parameters())


def test_answers_do_not_depend_on_the_batch(trained):
    model, processor, examples = trained
    together = evaluate(model, processor, examples, max_new_tokens=4, batch_size=8)
    alone = evaluate(model, processor, examples, max_new_tokens=4, batch_size=1)
    answers = [[r["prediction"] for r in result.records] for result in (together, alone)]
    assert answers[0] == answers[1]


def test_chat_and_server_give_the_answer_of_generate(trained):
    model, processor, examples = trained
    images = [examples[2].load_images()[0], examples[0].load_images()[0]]
    question = "what colour is it?"
    chat = Chat(model, processor, max_new_tokens=4)
    first = chat.ask(question, *images)
    prompt = render_prompt(
        processor, [{"role": "user", "content": "<image>\n<image>\n" + question}]
    )
    inputs = encode_prompts(processor, [prompt], [images])
    runner = ModelRunner(model, processor, cache_bytes=2**20)
    prepared = [runner.prepare_image(image) for image in images]
    length = runner.reader.count_tokens(prompt, prepared)
    assert length == inputs["input_ids"].shape[1]
    served = runner._build_inputs([prompt], [prepared], ())
    assert torch.equal(served["input_ids"], inputs["input_ids"])
    limits = {"max_new_tokens": 4, "do_sample": False}
    answers = [model.generate(**each, **limits)[:, length:] for each in (served, inputs)]
    assert torch.equal(*answers)
    assert processor.decode(answers[0][0], skip_special_tokens=True).strip() == first


def test_explain_counts_every_shortcut(trained):
    model, processor, examples = trained
    facts = explain(model, processor, examples[:4], max_new_tokens=2)
    assert len(facts["shortcuts"]) == len(model.plan.shortcuts)
    assert {"all", "input only"} <= set(facts["conditions"])


def test_a_dry_run_counts_the_largest_image(records, tmp_path):
    small, large = (
        dry_run(make_recipe(records, tmp_path, max_pixels=times * 48 * 48))[0] for times in (1, 4)
    )
    assert large.image_tokens_per_record == 4 * small.image_tokens_per_record
    assert large.flops_per_step > 2 * small.flops_per_step


@pytest.mark.parametrize(
    "model",
    [
        {"coarse": "squash", "max_pixels": 9216},
        {"coarse": "natif"},
        {"min_pixels": 0},
        {"base": "somewhere", "vision": None, "language": None},
    ],
    ids=["without native", "misspelt", "zero", "base"],
)
def test_a_recipe_refuses_settings_without_effect(records, tmp_path, model):
    with pytest.raises(UserError, match=r"max_pixels|coarse|min_pixels"):
        make_recipe(records, tmp_path, **model)


def test_tiny_parts_train_too(records, tmp_path):
    """Two stages, the second of the language model, on images of one row of patches."""
    torch.manual_seed(0)
    parts = {"image_processor": CLIPImageProcessorPil(), "tokenizer": tiny_tokenizer()}
    model, processor = build(
        tiny_vision(), tiny_language(), coarse="native", max_pixels=512, **parts
    )
    before = [parameter.clone() for parameter in model.language_model.parameters()]
    stage = {"train": ["fusion", "language"]}
    recipe = make_recipe(records, tmp_path / "out", stage)
    model, _ = train(recipe, model=model, processor=processor, shown=False)
    changed = zip(before, model.language_model.parameters(), strict=True)
    assert any(not torch.equal(*pair) for pair in changed)
