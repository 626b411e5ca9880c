"""Evaluation asks every question once, gives the same answers in any batch, and resumes."""

import json
import logging
import os
import shutil
import tarfile
import threading

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model
from PIL import Image

from sparsecut.config.folder_lock import lock_folder
from sparsecut.data.examples import read_examples
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.evaluation.exact_match import (
    compute_scores,
    exact_match,
    format_scores,
)
from sparsecut.prompts import make_greedy_config
from sparsecut.schema import UserError

QUESTIONS = (
    "what is it",
    "a cat ?",
    "are you sure",
    "is it red",
    "what is blue and red",
    "one two three",
)


def write_questions(folder):
    """Twelve records over three images: with none, one or two images, some with an earlier turn."""
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    records = []
    for i in range(12):
        images = [f"{(i + k) % 3}.png" for k in range(i % 3)]
        question = "<image>\n" * len(images) + QUESTIONS[i % 6]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Cat."}]
        if i % 4 == 3:
            turns += [{"from": "human", "value": "are you sure"}, {"from": "gpt", "value": "yes"}]
        record = {
            "id": f"r{i}",
            "conversations": turns,
            "level": ("low", "high")[i % 2],
            "group": f"g{i % 3}",
        }
        if images:
            record["image"] = images
        records.append(record)
    (folder / "questions.json").write_text(json.dumps(records))
    return read_examples(folder / "questions.json")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Questions that no test changes."""
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def shared():
    """(model, processor) that tests leave as they are."""
    return tiny_model()


def read_predictions(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_batches_answer_as_single_questions_do(shared, examples, tmp_path):
    single = evaluate(*shared, examples, batch_size=1, max_new_tokens=5)
    batched = evaluate(*shared, examples, batch_size=5, max_new_tokens=5, out=tmp_path)
    settings = {"batch_size": 5, "max_new_tokens": 5, "workers": 2}
    in_processes = evaluate(*shared, examples, **settings)
    assert single.records == batched.records == in_processes.records == read_predictions(tmp_path)
    assert [record["id"] for record in single.records] == [e.id for e in examples]
    assert len({record["prediction"] for record in single.records}) > 3


def test_a_prediction_is_what_generate_returns(shared, examples):
    model, processor = shared
    example = examples[2]
    prompt = "USER : <image>\n<image>\nare you sure ASSISTANT :"
    inputs = processor(images=example.load_images(), text=prompt, return_tensors="pt")
    token_ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new_ids = token_ids[:, inputs["input_ids"].shape[1] :]
    (answer,) = processor.batch_decode(new_ids, skip_special_tokens=True)
    result = evaluate(model, processor, [example], max_new_tokens=4)
    assert result["example_prompt"] == prompt
    assert result.records[0]["prediction"] == answer.strip()


def test_files_hold_the_answers_and_the_settings(tiny, examples, tmp_path):
    model, processor = tiny
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    counts = []

    def note(*numbers):
        counts.append(numbers)

    result = evaluate(model, processor, examples, out=tmp_path, batch_size=8, progress=note)
    assert counts == [(0, 12), (8, 12), (12, 12)]
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored["decoding"]["do_sample"] is False
    assert stored["decoding"]["max_new_tokens"] == 16
    assert stored["prompt_template"] == processor.chat_template
    assert stored["num_examples"] == 12
    assert stored["levels"]["low"]["num_examples"] == 6
    assert stored["groups"]["g0"]["num_examples"] == 4
    assert {"torch", "transformers", "sparsecut"} <= set(stored["versions"])
    assert stored["seconds"] > 0
    record = read_predictions(tmp_path)[3]
    assert record["reference"] == "yes"
    assert record["level"] == "high"
    assert "Cat." in record["prompt"]
    fields = ["id", "prompt", "images", "prediction", "reference", "correct", "group", "level"]
    assert list(record) == fields
    assert model.generation_config.temperature == 0.7  # the model's own settings are not changed


def test_an_interrupted_evaluation_resumes(shared, examples, tmp_path):
    evaluate(*shared, examples, out=tmp_path, batch_size=4, max_new_tokens=3)
    file = tmp_path / "predictions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    changed = json.dumps(json.loads(lines[0]) | {"prediction": "as it was"}) + "\n"
    file.write_text(changed + "".join(lines[1:6]) + lines[6][:20])
    again = evaluate(*shared, examples, out=tmp_path, batch_size=4, max_new_tokens=3)
    assert again["num_kept"] == 6  # the seventh line was cut, and its question is asked again
    assert file.read_text().splitlines(keepends=True) == [changed, *lines[1:]]
    fresh = evaluate(*shared, examples, out=tmp_path, batch_size=4, max_new_tokens=3, resume=False)
    assert fresh["num_kept"] == 0
    assert file.read_text().splitlines(keepends=True) == lines


def test_an_exception_in_the_middle_loses_nothing(shared, examples, tmp_path):
    def stop(done, total):
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(*shared, examples, out=tmp_path, batch_size=4, max_new_tokens=3, progress=stop)
    assert len(read_predictions(tmp_path)) == 8
    assert not (tmp_path / "result.json").exists()
    assert (
        evaluate(*shared, examples, out=tmp_path, batch_size=4, max_new_tokens=3)["num_kept"] == 8
    )


def test_answers_of_another_evaluation_are_not_mixed_in(shared, examples, tmp_path):
    some = examples[:3]
    evaluate(*shared, some, out=tmp_path, max_new_tokens=3)
    before = read_predictions(tmp_path)
    with pytest.raises(UserError, match=r"decoding.max_new_tokens \(3 .* 4 .*resume=False"):
        evaluate(*shared, some, out=tmp_path, max_new_tokens=4)
    with pytest.raises(UserError, match="another weights"):
        evaluate(*tiny_model(seed=1), some, out=tmp_path, max_new_tokens=3)
    with pytest.raises(UserError, match=r"holds 2 answers.*'r1'"):
        evaluate(*shared, some[:1], out=tmp_path, max_new_tokens=3)
    assert read_predictions(tmp_path) == before


def keep_lines(folder, number: int) -> None:
    """Leave an evaluation as one that was interrupted after some answers."""
    file = folder / "predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:number]))
    (folder / "result.json").unlink()


def invert(path) -> None:
    """Put another image under a name, in a file of the same size and time."""
    before = path.stat()
    pixels = np.asarray(Image.open(path))
    Image.fromarray(255 - pixels).save(path)
    with path.open("ab") as file:
        file.write(bytes(max(0, before.st_size - path.stat().st_size)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("place", ["folder", "archive"])
def test_an_evaluation_does_not_go_on_with_other_images(shared, tmp_path, place, is_finished):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write_questions(data)
    images = data

    def pack() -> None:
        if place == "archive":
            with tarfile.open(tmp_path / "images.tar", "w") as archive:
                for i in range(3):
                    archive.add(data / f"{i}.png", f"{i}.png")

    if place == "archive":
        images = tmp_path / "images.tar"
    pack()
    settings = {"out": out, "batch_size": 4, "max_new_tokens": 3}
    evaluate(*shared, read_examples(data / "questions.json", images), **settings)
    written = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    if not is_finished:
        keep_lines(out, 7)
    original = (data / "1.png").read_bytes()
    invert(data / "1.png")
    pack()
    before = (out / "predictions.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"1\.png"):
        evaluate(*shared, read_examples(data / "questions.json", images), **settings)
    assert (out / "predictions.jsonl").read_bytes() == before
    (data / "1.png").write_bytes(original)  # with a new time
    pack()
    again = evaluate(*shared, read_examples(data / "questions.json", images), **settings)
    assert again["num_kept"] == (12 if is_finished else 7)
    assert (out / "predictions.jsonl").read_bytes() == written["predictions.jsonl"]


def test_an_evaluation_goes_on_after_its_images_moved(shared, tmp_path):
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    old.mkdir()
    evaluate(*shared, write_questions(old), out=out, max_new_tokens=3)
    keep_lines(out, 7)
    shutil.copytree(old, new, copy_function=shutil.copy)
    shutil.rmtree(old)
    moved = read_examples(new / "questions.json")
    assert evaluate(*shared, moved, out=out, max_new_tokens=3)["num_kept"] == 7


def test_images_of_equal_names_and_questions_in_two_folders_go_on(shared, tmp_path):
    examples = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        examples += write_questions(tmp_path / name)
        invert(tmp_path / name / "0.png")
    for path in (tmp_path / "b").glob("*.png"):
        invert(path)
    out = tmp_path / "out"
    evaluate(*shared, examples, out=out, max_new_tokens=1)
    assert evaluate(*shared, examples, out=out, max_new_tokens=1)["num_kept"] == 24


def test_an_evaluation_of_an_old_version_goes_on_and_a_line_says_what_is_not_known(
    shared, examples, tmp_path, caplog
):
    evaluate(*shared, examples, out=tmp_path, max_new_tokens=3)
    keep_lines(tmp_path, 7)
    (tmp_path / "images.jsonl").unlink()
    settings = json.loads((tmp_path / "settings.json").read_text())
    for key in ("plan", "weights_sum"):
        del settings[key]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING):
        assert evaluate(*shared, examples, out=tmp_path, max_new_tokens=3)["num_kept"] == 7
    assert len([record for record in caplog.records if str(tmp_path) in record.getMessage()]) == 2


def test_any_weight_and_the_plan_belong_to_the_model(examples, tmp_path):
    model, processor = tiny_model()
    settings = {"out": tmp_path, "max_new_tokens": 2}
    evaluate(model, processor, examples[:2], **settings)
    weight = max(model.language_model.parameters(), key=torch.numel)
    weight.data.view(-1)[-2] += 1  # one that samples leave out
    with pytest.raises(UserError, match="weights_sum"):
        evaluate(model, processor, examples[:2], **settings)
    weight.data.view(-1)[-2] -= 1
    stored = json.loads((tmp_path / "settings.json").read_text())
    stored["plan"]["shortcuts"] = stored["plan"]["shortcuts"][:-1]
    (tmp_path / "settings.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="plan"):
        evaluate(model, processor, examples[:2], **settings)


@pytest.mark.parametrize("name", ["settings.json", "result.json", "predictions.jsonl"])
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("content", ['{"mine": 1}\n', "my notes\n", "[1]\n"])
def test_files_of_something_else_are_not_replaced(
    shared, examples, tmp_path, name, resume, content
):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        evaluate(*shared, examples[:1], out=tmp_path, resume=resume)
    assert (tmp_path / name).read_text() == content
    assert sum(path.is_file() for path in tmp_path.glob("[!.]*")) == 1


def test_other_files_of_the_folder_are_left_alone(shared, examples, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for _ in range(2):
        evaluate(*shared, examples[:1], out=tmp_path, max_new_tokens=1, resume=False)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("null", "None"),
        ("[]", r"\[\]"),
        ('{"prompt": {"a": 1}}', "prompt"),
        ('{"images": null}', "images"),
        ('{"images": [1]}', "images"),
        ('{"prediction": null}', "prediction"),
        ('{"id": 7}', "id"),
        ('{"reference": ["x"]}', "reference"),
    ],
)
def test_a_line_that_is_no_prediction_is_named(shared, examples, tmp_path, line, fact):
    evaluate(*shared, examples[:2], out=tmp_path, max_new_tokens=1)
    keep_lines(tmp_path, 1)
    file = tmp_path / "predictions.jsonl"
    first = json.loads(file.read_text())
    value = json.loads(line)
    bad = json.dumps({**first, **value} if isinstance(value, dict) else value)
    file.write_text(file.read_text() + bad + "\n")
    with pytest.raises(UserError, match=rf"predictions\.jsonl line 2: .*{fact}"):
        evaluate(*shared, examples[:2], out=tmp_path, max_new_tokens=1)
    assert bad in file.read_text()


def test_one_process_at_a_time_evaluates_into_a_folder(shared, examples, tmp_path):
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_folder(tmp_path / "out"):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        with pytest.raises(UserError, match="in use"):
            evaluate(*shared, examples[:1], out=tmp_path / "out")
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ({"metric": "exact"}, "'exact'.*did you mean 'exact_match'"),
        ({"batch_size": 0}, "batch_size is 0.*at least 1"),
        ({"workers": -1}, "workers is -1.*at least 0"),
        ({"max_new_tokens": 10**5}, "max_new_tokens=100000.*2048"),
    ],
)
def test_arguments_that_are_not_allowed_are_named(shared, examples, tmp_path, arguments, facts):
    with pytest.raises(UserError, match=facts):
        evaluate(*shared, examples, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_examples_that_cannot_be_evaluated_are_named(tiny, tmp_path):
    model, processor = tiny
    examples = write_questions(tmp_path)
    with pytest.raises(UserError, match="empty"):
        evaluate(model, processor, [])
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[:60])
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^\S+questions.json record \d+: .*0.png") as error:
            evaluate(model, processor, examples, workers=workers)
        assert "\n" not in str(error.value)
    (tmp_path / "0.png").write_bytes(whole)
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"questions.json record 1: .*1.png"):
        evaluate(model, processor, examples, out=tmp_path / "out")
    processor.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=": no; change"):
        evaluate(model, processor, examples[:1])
    assert not (tmp_path / "out").exists()


def test_greedy_decoding_has_the_models_own_stop_tokens(tiny):
    model, processor = tiny
    model.generation_config.eos_token_id = [1, 7]
    model.generation_config.num_beams = 4
    config = make_greedy_config(model, 9)
    assert (config.eos_token_id, config.num_beams, config.max_new_tokens) == ([1, 7], 1, 9)
    assert config.suppress_tokens == [processor.image_token_id]


def test_exact_match_ignores_case_outer_whitespace_and_a_full_stop():
    assert exact_match(" Yes. ", "yes")
    assert exact_match("STRASSE", "stra\u00dfe")
    assert not exact_match("yes..", "yes")
    assert not exact_match("y es", "yes")
    assert not exact_match("", "yes")


def test_the_mean_over_levels_weighs_levels_equally():
    answers = [(1, "a"), (1, "a"), (0, "a"), (0, "b")]
    records = [{"correct": right, "group": None, "level": level} for right, level in answers]
    scores = compute_scores(records)
    assert scores["accuracy"] == 0.5
    assert scores["mean_over_levels"] == pytest.approx(1 / 3)
    assert scores["groups"] == {}
    assert [line.split() for line in format_scores(scores).splitlines()[2:]] == [
        ["level", "a", "66.7", "%", "2", "3", "20.8", "to", "93.9", "questions"],
        ["level", "b", "0.0", "%", "0", "1", "0.0", "to", "79.3", "questions"],
        ["mean", "over", "levels", "33.3", "%"],
    ]
