"""Evaluation asks every question once, alike in any batch, and goes on where it stopped."""

import json

import numpy as np
import pytest
from helpers.tiny import tiny_model
from PIL import Image

from sparsecut.data.examples import read_examples
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.evaluation.scoring import exact_match, scores, table, wilson
from sparsecut.prompts import make_greedy_config

TURNS = [
    "what is it",
    "a cat ?",
    "are you sure",
    "is it red",
    "what is blue and red",
    "one two three",
]


@pytest.fixture
def examples(tmp_path):
    """Twelve records over three pictures: text-only, one and two pictures, and a second question
    after an answer.
    """
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    records = []
    for i in range(12):
        images = [f"{(i + k) % 3}.png" for k in range(i % 3)]
        question = "<image>\n" * len(images) + TURNS[i % 6]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Cat."}]
        if i % 4 == 3:
            turns += [{"from": "human", "value": "are you sure"}, {"from": "gpt", "value": "yes"}]
        record = {
            "id": f"r{i}",
            "conversations": turns,
            "level": ("low", "high")[i % 2],
            "group": f"g{i % 3}",
        }
        records.append({**record, "image": images} if images else record)
    (tmp_path / "questions.json").write_text(json.dumps(records))
    return read_examples(tmp_path / "questions.json")


def predictions(out) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_batches_answer_as_single_questions_do(tiny, examples, tmp_path):
    for name, batch_size, workers in (("single", 1, 0), ("batched", 5, 0), ("prepared", 5, 2)):
        evaluate(
            *tiny,
            examples,
            out=tmp_path / name,
            batch_size=batch_size,
            max_new_tokens=5,
            workers=workers,
        )
    single, batched, prepared = (
        predictions(tmp_path / name) for name in ("single", "batched", "prepared")
    )
    assert single == batched == prepared
    assert [line["id"] for line in batched] == [e.id for e in examples]
    assert len({line["prediction"] for line in batched}) > 3  # the model says different things


def test_a_prediction_is_what_generate_says(tiny, examples):
    model, processor = tiny
    seen = examples[2]
    inputs = processor(
        images=seen.pictures(),
        text="USER : <image>\n<image>\nare you sure ASSISTANT :",
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    said = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[
        0
    ].strip()
    result = evaluate(model, processor, [seen], max_new_tokens=4)
    assert result["example_prompt"] == "USER : <image>\n<image>\nare you sure ASSISTANT :"
    assert result["num_correct"] == (said.casefold() == "cat")


def test_files_hold_the_answers_and_how_they_were_made(tiny, examples, tmp_path):
    model, processor = tiny
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
    seen = []
    result = evaluate(
        model,
        processor,
        examples,
        out=tmp_path / "run",
        batch_size=8,
        progress=lambda *counts: seen.append(counts),
    )
    assert seen == [(0, 12), (8, 12), (12, 12)]
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert stored["decoding"]["do_sample"] is False and stored["decoding"]["max_new_tokens"] == 16
    assert stored["prompt_template"] == processor.chat_template and stored["num_examples"] == 12
    assert (
        stored["levels"]["low"]["num_examples"] == 6 and stored["groups"]["g0"]["num_examples"] == 4
    )
    assert {"torch", "transformers", "sparsecut"} <= set(stored["versions"]) and stored[
        "seconds"
    ] > 0
    line = predictions(tmp_path / "run")[3]
    assert line["reference"] == "yes" and "Cat." in line["prompt"] and line["level"] == "high"
    assert set(line) == {
        "id",
        "prompt",
        "images",
        "prediction",
        "reference",
        "correct",
        "group",
        "level",
    }
    assert model.generation_config.temperature == 0.7  # the model's own settings stay as they were


def test_an_interrupted_run_goes_on(tiny, examples, tmp_path):
    out = tmp_path / "run"
    whole = evaluate(*tiny, examples, out=out, batch_size=4)
    lines = (out / "predictions.jsonl").read_text().splitlines(keepends=True)
    changed = json.loads(lines[0]) | {"prediction": "kept as it is"}
    (out / "predictions.jsonl").write_text(
        json.dumps(changed) + "\n" + "".join(lines[1:6]) + lines[6][:20]
    )
    again = evaluate(*tiny, examples, out=out, batch_size=4)
    assert again["num_kept"] == 6  # the half-written seventh line is asked again
    assert predictions(out)[0]["prediction"] == "kept as it is"
    assert [json.dumps(p) + "\n" for p in predictions(out)[1:]] == lines[1:]
    assert again["groups"].keys() == whole["groups"].keys()
    fresh = evaluate(*tiny, examples, out=out, batch_size=4, resume=False)
    assert fresh["num_kept"] == 0 and predictions(out)[0]["prediction"] != "kept as it is"


def test_an_exception_in_the_middle_loses_nothing(tiny, examples, tmp_path):
    def stop(done, total):
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(*tiny, examples, out=tmp_path / "run", batch_size=4, progress=stop)
    assert (
        len(predictions(tmp_path / "run")) == 8 and not (tmp_path / "run" / "result.json").exists()
    )
    assert evaluate(*tiny, examples, out=tmp_path / "run", batch_size=4)["num_kept"] == 8


def test_another_run_is_not_mixed_in(tiny, examples, tmp_path):
    out = tmp_path / "run"
    evaluate(*tiny, examples, out=out, max_new_tokens=3)
    before = predictions(out)
    with pytest.raises(
        ValueError, match=r"another decoding.max_new_tokens \(3 then, 4 now\); give"
    ):
        evaluate(*tiny, examples, out=out, max_new_tokens=4)
    with pytest.raises(ValueError, match="another weights"):
        evaluate(*tiny_model(seed=1), examples, out=out, max_new_tokens=3)
    with pytest.raises(ValueError, match="10 answers to questions that are not asked now"):
        evaluate(*tiny, examples[:2], out=out, max_new_tokens=3)
    assert predictions(out) == before


def test_what_cannot_be_asked_gets_a_sentence(tiny, examples, tmp_path):
    model, processor = tiny
    for options, words in (
        ({"metric": "exact"}, "did you mean 'exact_match'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1, but must be a whole number of at least 0"),
        ({"max_new_tokens": 10**5}, "is more than the 2048 the language model takes"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(model, processor, examples, out=tmp_path / "run", **options)
    with pytest.raises(ValueError, match="nothing to ask"):
        evaluate(model, processor, [])
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[:60])
    for workers in (0, 1):
        with pytest.raises(
            ValueError,
            match=r"^.*questions.json record \d+: the picture 0.png in .* is broken: [^\n]*$",
        ):
            evaluate(model, processor, examples, workers=workers)
    (tmp_path / "0.png").write_bytes(whole)
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"questions.json record 1: there is no picture 1.png"):
        evaluate(model, processor, examples, out=tmp_path / "run")
    processor.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="refuses the conversation: no; change"):
        evaluate(model, processor, examples[:1])
    assert not (tmp_path / "run").exists()


def test_greedy_keeps_the_models_own_stop_tokens(tiny):
    model, processor = tiny
    model.generation_config.eos_token_id, model.generation_config.num_beams = [1, 7], 4
    config = make_greedy_config(model, 9)
    assert (config.eos_token_id, config.num_beams, config.max_new_tokens) == ([1, 7], 1, 9)
    assert config.suppress_tokens == [processor.image_token_id]


def test_exact_match_forgives_case_blanks_and_a_full_stop():
    assert exact_match(" Yes. ", "yes") and exact_match("STRASSE", "stra\u00dfe")
    assert (
        not exact_match("yes..", "yes")
        and not exact_match("y es", "yes")
        and not exact_match("", "yes")
    )


def test_intervals_and_means():
    assert wilson(0, 10) == pytest.approx([0, 0.27753], abs=1e-4)
    assert wilson(8, 10) == pytest.approx([0.49016, 0.94332], abs=1e-4)
    assert wilson(10, 10)[1] == 1 and wilson(0, 69)[0] == 0
    records = [
        {"correct": c, "group": None, "level": v}
        for c, v in [(1, "a"), (1, "a"), (0, "a"), (0, "b")]
    ]
    result = scores(records)
    assert (
        result["accuracy"] == 0.5
        and result["mean_over_levels"] == pytest.approx(1 / 3)
        and not result["groups"]
    )
    assert [line.split() for line in table(result).splitlines()[2:]] == [
        ["level", "a", "66.7", "%", "2", "/", "3", "20.8", "to", "93.9"],
        ["level", "b", "0.0", "%", "0", "/", "1", "0.0", "to", "79.3"],
        ["mean", "over", "levels", "33.3", "%"],
    ]
