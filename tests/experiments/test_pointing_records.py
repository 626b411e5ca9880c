"""The pointing game with questions of one's own."""

import json

import pytest
from helpers.bases import randomize_fusion
from helpers.runs import write_records
from helpers.tiny import tiny_llava, tiny_model
from typer.testing import CliRunner

from sparsecut import upgrade
from sparsecut.cli.main import app
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.experiments import pointing
from sparsecut.experiments.pointing import play, read_items
from sparsecut.schema import UserError

PLAN = {"method": "sparsecut", "pattern": "sparse", "gate": "one"}
WHOLE = [0, 0, 1, 1]


@pytest.fixture
def file(tmp_path):
    """Questions with one image each, and the whole image as their region."""
    folder = write_records(tmp_path)
    records = json.loads((folder / "data.json").read_text())
    chosen = [record for record in records if len(record["image"] or ()) == 1]
    path = folder / "regions.json"
    path.write_text(json.dumps([{**record, "region": WHOLE} for record in chosen]))
    return path


def change_records(file, change) -> None:
    records = json.loads(file.read_text())
    for record in records:
        change(record)
    file.write_text(json.dumps(records))


@pytest.mark.parametrize("kind", ["built", "upgraded"])
def test_maps_of_any_model_are_checked_on_records(file, kind):
    if kind == "built":
        model, processor = tiny_model(PLAN)
    else:
        base, base_processor = tiny_llava()
        model, processor = upgrade(base, processor=base_processor)
    randomize_fusion(model)
    items = read_items(file)
    for item, record in zip(
        items, evaluate(model, processor, [i.example for i in items]).records, strict=True
    ):
        item.example.messages[-1]["content"] = record["prediction"] or "nothing"
    rows = play(model, processor, items, kinds=["gradient"], max_new_tokens=16)
    assert rows
    for row in rows:
        assert row["hit_chance"] == row["hit_shuffled"] == 1  # the region is the whole image
        assert row["question"] == "all" and row["num_items"] <= len(items)


def test_the_command_takes_records_and_the_shipped_model_by_its_name(file, monkeypatch):
    played = []

    def note(model, processor, items, **settings):
        played.append((model.config.model_type, len(items), settings["max_new_tokens"]))
        return []

    monkeypatch.setattr(pointing, "play", note)
    monkeypatch.chdir(file.parent)
    command = ["shapes", "point", "shapes", "--data", str(file), "--max-new-tokens", "5"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert played == [("sparsecut", len(read_items(file)), 5)]


def test_lines_are_read_as_a_list_is(file):
    lines = file.with_suffix(".jsonl")
    lines.write_text("\n".join(json.dumps(one) for one in json.loads(file.read_text())))
    regions = [[item.region for item in read_items(path)] for path in (file, lines)]
    assert regions[0] == regions[1] == [tuple(WHOLE)] * len(regions[0])


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda record: record.update(region=[0, 0, 40, 20]), "fractions"),
        (lambda record: record.update(region=[0.5, 0, 0.2, 1]), "fractions"),
        (lambda record: record.update(region=["0", 0, 1, 1]), "fractions"),
        (lambda record: record.pop("region"), "None"),
        (lambda record: record.pop("id"), "id"),
        (lambda record: record.update(id="same"), "same"),
    ],
)
def test_what_is_no_region_is_refused(file, change, fact):
    change_records(file, change)
    with pytest.raises(UserError, match=fact):
        read_items(file)


def test_a_region_of_two_images_is_refused(file):
    records = json.loads(file.read_text())
    records[0]["image"] *= 2
    records[0]["conversations"][0]["value"] = "<image> <image> what is it"
    file.write_text(json.dumps(records))
    with pytest.raises(UserError, match="2 images"):
        read_items(file)
