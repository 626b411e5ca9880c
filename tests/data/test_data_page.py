"""docs/data.md: every block of it is a stage's part that trains, or a record."""

import json
import re
from pathlib import Path

import pytest
import yaml
from helpers import tiny
from helpers.runs import log, run, stage
from helpers.shards import write_folders, write_shards

from sparsecut.config.source import Source
from sparsecut.data import form_choice
from sparsecut.data.record_forms import FORMS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
RECORDS = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)]


HUB = {
    "path": "HuggingFaceM4/the_cauldron",
    "name": "vqav2",
    "split": "train",
    "revision": "main",
    "streaming": True,
}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder in which `mine` holds the page's files."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "mine").mkdir()
    write_shards(folder / "mine")
    write_folders(folder / "mine")
    german = {"frage": "what is it", "antwort": "a cat", "bild": "0.png"}
    (folder / "mine" / "german.jsonl").write_text(json.dumps(german))
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_of_the_page_trains(mine, number, monkeypatch):
    monkeypatch.chdir(mine)
    changes = yaml.safe_load(BLOCKS[number])
    if changes["data"] == HUB:  # `test_hub_data` reads such a source
        Source(**changes["data"])
        return
    args = {"max_steps": 2, **changes.pop("args", {})}
    run(mine, {**stage(mine, args=args), **changes}, output=str(mine / f"out-{number}"))
    assert len(log(mine, output=f"out-{number}")) == 2


def test_every_record_of_the_page_trains(mine, monkeypatch):
    """One after another, in one epoch of one run."""
    words = re.findall(r"\w+|[^\w\s]", json.dumps(RECORDS))
    monkeypatch.setattr(tiny, "WORDS", list(dict.fromkeys([*tiny.WORDS, *words, *"ABCD"])))
    sources = []
    for number, record in enumerate(RECORDS):
        file = mine / "mine" / f"form-{number}.jsonl"
        file.write_text(json.dumps(record))
        sources.append({"path": str(file)})
    args = {"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 1}
    run(mine, {**stage(mine, args=args), "data": sources}, output=str(mine / "forms"))
    assert log(mine, output="forms")[-1]["step"] == len(RECORDS)


def test_forms_of_the_page_are_those_that_are_read():
    shown = [form_choice.choose_form(record) for record in RECORDS]
    alike = {"instruction and response", "prompt and response", "image and captions"}
    others = {form.name for form in FORMS if form.example} - {form.name for form in shown}
    assert others <= alike | {"image and text"}
