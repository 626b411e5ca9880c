"""The models in the harness lmms-eval: the adapter on requests as the harness makes them, and the
harness itself where it is.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import sparsecut
from sparsecut.config.recipe import Source
from sparsecut.data.examples import read_source
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.evaluation.lmms_eval import CLASSES, Adapter, chat_messages, cut, simple_message
from sparsecut.prompts import prepare_inputs
from sparsecut.shapes import write_split

ROOT = Path(__file__).parents[2]


@dataclass
class Request:
    """What the adapter sees of the harness's Instance."""

    args: tuple


class Hook:
    """Remembers what it was given, as the harness's cache does."""

    def __init__(self):
        self.kept = []

    def add_partial(self, *given):
        self.kept.append(given)


class Harness:
    """Stands for the harness's base class."""

    def __init__(self):
        self.task_dict, self.cache_hook = {}, Hook()


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(folder of a model, its questions as examples, the same as the harness's documents)."""
    folder = tmp_path_factory.mktemp("lmms")
    write_split(folder / "data", "test", 4, 5, workers=1)
    torch.manual_seed(0)
    for part in sparsecut.build(
        "shapes", "shapes", plan={"method": "sparsecut", "count": 2, "gate": "one"}
    ):
        part.save_pretrained(folder / "model")
    examples = read_source(Source(str(folder / "data" / "test.json")), [])[:20]
    documents = [
        {
            "text": e.messages[0]["content"].removeprefix("<image>\n"),
            "picture": str(folder / "data" / e.images[0]),
            "answer": e.messages[1]["content"],
        }
        for e in examples
    ]
    return folder / "model", examples, documents


def adapter(folder, documents, **settings):
    kind = type("Tried", (Adapter, Harness), {})
    model = kind(str(folder), device="cpu", **settings)
    model.task_dict = {"task": {"test": documents}}
    return model


def turn(document):
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "url": document["picture"]},
                {"type": "text", "text": document["text"]},
            ],
        }
    ]


def request(i, is_simple, **settings):
    settings = {"max_new_tokens": 4, "temperature": 0, "until": ["\n\n"], **settings}
    if is_simple:
        return Request((DOCUMENT_TEXTS[i], settings, lambda d: [d["picture"]], i, "task", "test"))
    return Request((DOCUMENT_TEXTS[i], turn, settings, i, "task", "test"))


DOCUMENT_TEXTS: dict[int, str] = {}


@pytest.mark.parametrize("is_simple", CLASSES.values(), ids=CLASSES)
def test_answers_are_those_of_eval_in_batches_of_any_settings(asked, is_simple, tmp_path):
    folder, examples, documents = asked
    DOCUMENT_TEXTS.update(enumerate(d["text"] for d in documents))
    evaluate(*sparsecut.load(str(folder)), examples, out=tmp_path, max_new_tokens=4)
    wanted = [
        json.loads(line)["prediction"]
        for line in (tmp_path / "predictions.jsonl").read_text().splitlines()
    ]
    model = adapter(folder, documents, batch_size=8)
    requests = [request(i, is_simple) for i in range(len(documents))]
    assert model.generate_until(requests) == wanted
    assert len(model.cache_hook.kept) == len(documents)
    mixed = [request(i, is_simple, num_beams=1 + i % 2) for i in range(6)]
    assert model.generate_until(mixed)[::2] == wanted[:6:2]


def test_losses_are_means_over_the_choices_tokens(asked):
    folder, _, documents = asked
    model = adapter(folder, documents)
    DOCUMENT_TEXTS[0] = documents[0]["text"]
    (word, *more), *_ = [answer.split() for answer in model.generate_until([request(0, True)])]
    other = "left" if word != "left" else "right"
    first, last, both = model.losses([choice(word), choice(other), choice(f"{word} {other}")])
    assert first[1] and not last[1] and 0 < first[0] < last[0]
    assert (other in more[:1]) == both[1]
    prompt, pictures, _ = model._asked(choice(f"{word} {other}").args)
    inputs = prepare_inputs(model.model, model.processor, [f"{prompt} {word} {other}"], [pictures])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    with torch.no_grad():
        assert both[0] == pytest.approx(model.model(**inputs, labels=labels).loss.item(), rel=1e-4)
    with pytest.raises(ValueError, match="target_delimiter"):
        model.losses(
            [Request((documents[0]["text"], "", lambda d: [d["picture"]], 0, "task", "test"))]
        )


def choice(word):
    return Request((DOCUMENT_TEXTS[0], f" {word}", lambda d: [d["picture"]], 0, "task", "test"))


def test_what_cannot_be_answered_is_refused_in_a_sentence(asked):
    folder, _, documents = asked
    with pytest.raises(ValueError, match="batch_size is 'auto'"):
        adapter(folder, documents, batch_size="auto")
    with pytest.raises(ValueError, match="dtype is 'small'"):
        adapter(folder, documents, dtype="small")
    model = adapter(folder, documents, max_new_tokens=100_000)
    with pytest.raises(ValueError, match="max_new_tokens=N"):
        model.generate_until([Request(("", turn, {}, 0, "task", "test"))])
    with pytest.raises(ValueError, match="several rounds"):
        model.generate_until_multi_round([])
    for content, words in (
        ([{"type": "video", "url": "a.mp4"}], "texts and pictures only"),
        ([{"type": "text", "text": "<image> what"}], "mark for a picture"),
        ([{"type": "image", "url": {"array": 1}}], "pictures only"),
    ):
        with pytest.raises(ValueError, match=words):
            chat_messages([{"role": "user", "content": content}], "<image>")
    with pytest.raises(ValueError, match="has 2 <image> but 1"):
        simple_message("<image> or <image>", ["a.png"], "<image>")


def test_unknown_settings_are_named_once(asked, caplog):
    folder, _, documents = asked
    model = adapter(folder, documents)
    ask = Request(("", turn, {"max_new_tokens": 1, "image_aspect_ratio": "pad"}, 0, "task", "test"))
    model.generate_until([ask])
    model.generate_until([ask])
    assert caplog.text.count("image_aspect_ratio") == 1


def test_stop_strings_end_an_answer():
    assert (
        cut("a dog\n\nb", ["\n\n"]) == "a dog"
        and cut("a dog", ["\n\n", ""]) == "a dog"
        and cut("a b", ["b", " "]) == "a"
    )


def test_pictures_stand_first_or_where_the_text_says():
    assert simple_message("what", ["a"], "<image>")["content"] == "<image>\nwhat"
    assert simple_message("is <image> a cat", ["a"], "<image>")["content"] == "is <image> a cat"


def test_the_harness_runs_the_task_of_the_page_with_the_answers_of_eval(asked, tmp_path):
    pytest.importorskip("lmms_eval")
    folder, examples, documents = asked
    evaluate(*sparsecut.load(str(folder)), examples, out=tmp_path / "eval", max_new_tokens=4)
    answers = [
        json.loads(line)["prediction"]
        for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    ]
    right = [
        i % 3 == 0 for i in range(len(answers))
    ]  # an untrained model knows nothing: these answers are called right
    records = [
        {"picture": d["picture"], "question": d["text"], "answer": answer if good else "nothing"}
        for d, answer, good in zip(documents, answers, right, strict=True)
    ]
    page = (ROOT / "docs" / "lmms.md").read_text()
    task = tmp_path / "mytask"
    task.mkdir()
    for name, language in (("shown.py", "python"), ("mytask.yaml", "yaml")):
        (task / name).write_text(re.search(rf"```{language}\n(.*?)```", page, re.S)[1])
    (task / "questions.json").write_text(json.dumps(records))
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--model",
        "sparsecut",
        "--model_args",
        f"pretrained={folder}",
    ]
    command += [
        "--tasks",
        "mytask",
        "--include_path",
        "mytask",
        "--batch_size",
        "8",
        "--output_path",
        "out",
    ]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    made = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-2000:]
    result = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())
    assert result["results"]["mytask"]["exact_match,none"] == pytest.approx(sum(right) / len(right))
