"""The page of `explain` with heat maps, and the pointing game on maps whose peak is known."""

import re

import numpy as np
import pytest
from helpers.pages import check_page
from helpers.runs import write_records
from helpers.tiny import tiny_llava, tiny_model
from PIL import Image

from sparsecut import upgrade
from sparsecut.data.examples import read_examples
from sparsecut.evaluation.ablation import explain
from sparsecut.evaluation.heat_maps import HeatMap
from sparsecut.evaluation.mapped_questions import map_questions
from sparsecut.experiments.pointing import DETAILS, make_items, mark_target, play
from sparsecut.experiments.pointing import _score as score_map
from sparsecut.reports.ablation import write_explanation
from sparsecut.reports.heat_maps import lay_over
from sparsecut.reports.pointing import make_table
from sparsecut.reports.verdicts import describe_uses

PLAN = {"method": "sparsecut", "pattern": "sparse", "gate": "one"}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = write_records(tmp_path_factory.mktemp("records"))
    return [example for example in read_examples(folder / "data.json") if example.images]


def write_page(model, processor, examples, folder) -> str:
    explanation = explain(model, processor, examples, max_new_tokens=2) | {"model": "mine"}
    mapped = map_questions(model, processor, examples, 2, max_new_tokens=4)
    return write_explanation(explanation, folder, *mapped).read_text()


def test_the_page_has_the_maps_and_names_the_model(examples, tmp_path):
    model, processor = tiny_model(PLAN)
    text = write_page(model, processor, examples, tmp_path)
    check_page(text)
    assert "mine" in check_page(text).verdicts[0]
    num_empty = text.count("Maps are missing")  # this model may answer with nothing
    assert text.count('class="maps"') + num_empty == 2
    assert text.count('alt="heat map"') > 4
    assert "it is the input itself" in text


def test_an_untrained_upgrade_shows_no_map(examples, tmp_path):
    base, base_processor = tiny_llava()
    model, processor = upgrade(base, processor=base_processor)
    text = write_page(model, processor, examples, tmp_path)
    assert text.count('class="maps"') == 2
    assert 'alt="heat map"' not in text
    assert text.count("nothing to see") == 2 * 3 * len(model.fusion.gated)
    assert len(re.findall("Nothing can be told of shortcut", text)) == len(model.fusion.gated)


def test_a_shortcut_is_good_for_the_kinds_that_clearly_lose():
    def gap(value, low, high):
        return {"value": value, "low": low, "high": high}

    condition = {"difference": {"average": gap(-0.3, -0.4, -0.2)}}
    groups = {"digit": gap(-0.9, -1, -0.8), "place": gap(-0.1, -0.2, 0.1)}
    explanation = {
        "shortcuts": [{"taps": [-2], "layer": 0}, {"taps": [3], "layer": 1}],
        "conditions": {"all": {}, "without 1": {**condition, "group_differences": groups}},
    }
    (sentence,) = describe_uses(explanation)
    assert "digit (-90.0)" in sentence
    assert "place" not in sentence


def test_a_map_colours_its_cells_alone():
    image = Image.new("RGB", (8, 8), (100, 100, 100))
    values = np.array([[1.0, 0.0], [np.nan, -1.0]])
    pixels = np.asarray(lay_over(image, values, 1.0))
    assert pixels[0, 0, 0] > 150 > pixels[0, 0, 2]
    assert pixels[7, 7, 2] > 150 > pixels[7, 7, 0]
    assert (pixels[0, 7] == 100).all()
    assert (pixels[7, 0] == 100).all()


def test_details_are_where_they_are_drawn():
    items = make_items(4)
    assert {item.example.group for item in items} == set(DETAILS)
    for item in items:
        column = item.example.messages[0]["content"].endswith("right")
        row = "bottom" in item.example.messages[0]["content"]
        left, top, right, bottom = item.region
        assert column / 2 <= left < right <= (1 + column) / 2
        assert row / 2 <= top < bottom <= (1 + row) / 2
        if item.example.group in ("digit", "lines"):
            image = np.asarray(item.example.load_images()[0].convert("L"), dtype=float)
            height, width = image.shape
            box = [
                round(edge * side)
                for edge, side in zip(item.region, (width, height) * 2, strict=True)
            ]
            plate = image[box[1] : box[3], box[0] : box[2]]
            assert ((abs(plate - 190) < 25) | (abs(plate - 70) < 25)).mean() > 0.95


def test_hits_are_counted_with_their_controls():
    items = [item for item in make_items(8) if item.example.group == "digit"]
    maps = []
    for item in items:
        values = np.zeros((4, 4))
        values[mark_target(item.region, (4, 4))] = 1.0
        maps.append(HeatMap(1, "gradient", 0, values))
    scores = [score_map(place, items, maps, 0) for place in range(len(items))]
    assert all(row["hit"] == row["near"] == 1 for row in scores)
    assert all(row["hit_chance"] == 1 / 16 for row in scores)
    assert sum(row["hit_other"] for row in scores) == 0
    assert sum(row["hit_shuffled"] for row in scores) < len(scores) / 2
    empty = [HeatMap(1, "gradient", 0, np.zeros((4, 4)))] * len(items)
    assert score_map(0, items, empty, 0)["hit"] == 0


def test_a_shortcut_that_decides_nothing_has_no_row():
    model, processor = tiny_model(PLAN)
    assert play(model, processor, make_items(2)) == []
    assert "No shortcut decides" in make_table([])
