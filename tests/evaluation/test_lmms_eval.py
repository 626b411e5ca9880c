"""The models in the harness lmms-eval: the adapter on requests as the harness makes them, and the
harness itself where it is installed.
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
from sparsecut.evaluation.lmms_eval import (
    CLASSES,
    Adapter,
    convert_messages,
    convert_simple,
    cut_at_stop,
)
from sparsecut.prompts import prepare_inputs
from sparsecut.schema import UserError
from sparsecut.shapes import write_split

ROOT = Path(__file__).parents[2]
SETTINGS = {"max_new_tokens": 4, "temperature": 0, "until": ["\n\n"]}


@dataclass
class Instance:
    """What the adapter sees of the harness's Instance."""

    args: tuple


class Hook:
    """Remembers what the harness's cache would get."""

    def __init__(self):
        self.calls = []

    def add_partial(self, *arguments):
        self.calls.append(arguments)


class Harness:
    """Stands for the harness's base class."""

    def __init__(self):
        self.task_dict = {}
        self.cache_hook = Hook()


class HarnessAdapter(Adapter, Harness):
    """The adapter as the harness makes it."""


@dataclass
class Prepared:
    """A saved model with questions.

    documents: the questions as the harness holds them; answers: those of `evaluate`.
    """

    folder: Path
    documents: list[dict]
    answers: list[str]

    def adapter(self, **settings) -> Adapter:
        model = HarnessAdapter(str(self.folder), device="cpu", **settings)
        model.task_dict = {"task": {"test": self.documents}}
        return model

    def request(self, i: int, is_simple: bool, **settings) -> Instance:
        """A request to answer a document, in one of the harness's two forms."""
        text = self.documents[i]["text"]
        settings = {**SETTINGS, **settings}
        if is_simple:
            return Instance((text, settings, get_images, i, "task", "test"))
        return Instance((text, build_messages, settings, i, "task", "test"))

    def choice(self, continuation: str) -> Instance:
        """A request for the loss of an answer to the first document."""
        text = self.documents[0]["text"]
        return Instance((text, continuation, get_images, 0, "task", "test"))


def get_images(document) -> list[str]:
    return [document["image"]]


def build_messages(document) -> list[dict]:
    content = [
        {"type": "image", "url": document["image"]},
        {"type": "text", "text": document["text"]},
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms")
    write_split(folder / "data", "test", 2, 5, workers=1)
    torch.manual_seed(0)
    plan = {"method": "sparsecut", "count": 2, "gate": "one"}
    model, processor = sparsecut.build("shapes", "shapes", plan=plan)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    examples = read_source(Source(str(folder / "data" / "test.json")), [])[:10]
    documents = []
    for example in examples:
        document = {
            "text": example.messages[0]["content"].removeprefix("<image>\n"),
            "image": str(folder / "data" / example.images[0]),
            "answer": example.messages[1]["content"],
        }
        documents.append(document)
    result = evaluate(model, processor, examples, max_new_tokens=4)
    answers = [record["prediction"] for record in result.records]
    return Prepared(folder / "model", documents, answers)


@pytest.fixture(scope="module")
def adapter(prepared):
    return prepared.adapter(batch_size=8)


@pytest.mark.parametrize("is_simple", CLASSES.values(), ids=CLASSES)
def test_answers_are_those_of_evaluate_in_batches_of_any_settings(prepared, adapter, is_simple):
    count = len(prepared.documents)
    adapter.cache_hook = Hook()
    requests = [prepared.request(i, is_simple) for i in range(count)]
    assert adapter.generate_until(requests) == prepared.answers
    assert len(adapter.cache_hook.calls) == count
    mixed = [prepared.request(i, is_simple, num_beams=1 + i % 2) for i in range(4)]
    assert adapter.generate_until(mixed)[::2] == prepared.answers[:4:2]


def test_losses_are_means_over_the_tokens_of_a_choice(prepared, adapter):
    word, *others = prepared.answers[0].split()
    other = "left" if word != "left" else "right"
    choices = [prepared.choice(f" {text}") for text in (word, other, f"{word} {other}")]
    first, second, both = adapter.compute_losses(choices)
    assert first[1]
    assert not second[1]
    assert 0 < first[0] < second[0]
    assert both[1] == (others[:1] == [other])
    request = adapter._read_request(choices[2].args)
    text = request.prompt + request.payload
    inputs = prepare_inputs(adapter.model, adapter.processor, [text], [request.images])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    with torch.no_grad():
        loss = adapter.model(**inputs, labels=labels).loss.item()
    assert both[0] == pytest.approx(loss, rel=1e-4)
    with pytest.raises(UserError, match="target_delimiter"):
        adapter.compute_losses([prepared.choice("")])


def test_arguments_and_requests_that_are_not_supported_are_refused(prepared, adapter):
    with pytest.raises(UserError, match="batch_size is 'auto'"):
        prepared.adapter(batch_size="auto")
    with pytest.raises(UserError, match="dtype is 'small'"):
        prepared.adapter(dtype="small")
    with pytest.raises(UserError, match="rounds"):
        adapter.generate_until_multi_round([])
    adapter = prepared.adapter(max_new_tokens=100_000)
    with pytest.raises(UserError, match="max_new_tokens=N"):
        adapter.generate_until([Instance(("", build_messages, {}, 0, "task", "test"))])


@pytest.mark.parametrize(
    ("part", "facts"),
    [
        ({"type": "video", "url": "a.mp4"}, "video"),
        ({"type": "text", "text": "<image> what"}, "<image>"),
        ({"type": "image", "url": {"array": 1}}, "dict"),
    ],
)
def test_messages_of_other_things_are_refused(part, facts):
    with pytest.raises(UserError, match=facts):
        convert_messages([{"role": "user", "content": [part]}], "<image>")


def test_unknown_settings_are_named_once(prepared, adapter, caplog):
    request = prepared.request(0, False, max_new_tokens=1, image_aspect_ratio="pad")
    adapter.generate_until([request])
    adapter.generate_until([request])
    assert caplog.text.count("image_aspect_ratio") == 1


def test_stop_strings_end_an_answer():
    assert cut_at_stop("a dog\n\nb", ["\n\n"]) == "a dog"
    assert cut_at_stop("a dog", ["\n\n", ""]) == "a dog"
    assert cut_at_stop("a b", ["b", " "]) == "a"


def test_images_stand_first_or_where_the_text_says():
    assert convert_simple("what", ["a"], "<image>")["content"] == "<image>\nwhat"
    text = "is <image> a cat"
    assert convert_simple(text, ["a"], "<image>")["content"] == text
    with pytest.raises(UserError, match="2 <image> but 1"):
        convert_simple("<image> or <image>", ["a.png"], "<image>")


def test_the_harness_runs_the_task_of_the_page(prepared, tmp_path):
    pytest.importorskip("lmms_eval")
    # The model is not trained: every third of its own answers counts as right.
    records = []
    for i, (document, answer) in enumerate(zip(prepared.documents, prepared.answers, strict=True)):
        record = {
            "image": document["image"],
            "question": document["text"],
            "answer": answer if i % 3 == 0 else "nothing",
        }
        records.append(record)
    page = (ROOT / "docs" / "lmms.md").read_text()
    task = tmp_path / "mytask"
    task.mkdir()
    for name, language in (("shown.py", "python"), ("mytask.yaml", "yaml")):
        (task / name).write_text(re.search(rf"```{language}\n(.*?)```", page, re.S)[1])
    (task / "questions.json").write_text(json.dumps(records))
    command = [sys.executable, "-m", "lmms_eval", "--model", "sparsecut"]
    command += ["--model_args", f"pretrained={prepared.folder}"]
    command += ["--tasks", "mytask", "--include_path", "mytask"]
    command += ["--batch_size", "8", "--output_path", "out"]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())
    right = sum(record["answer"] != "nothing" for record in records)
    expected = pytest.approx(right / len(records))
    assert result["results"]["mytask"]["exact_match,none"] == expected
