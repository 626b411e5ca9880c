"""What a row of a batch holds is told from the records that a stage takes, and by the rules that
training packs and pads by.
"""

import pytest
from helpers.runs import write_word_records

from sparsecut.config.recipe import parse_recipe
from sparsecut.profiling.dry_run_data import item_of, records_of

PICTURE = 16  # image tokens


@pytest.fixture
def data(tmp_path):
    """What a stage's data says of twenty records with a picture each, and of twenty texts."""
    (tmp_path / "one.png").write_bytes(b"")
    shown = write_word_records(tmp_path / "shown.json", {f"s{i}": 20 for i in range(20)})
    return shown, write_word_records(
        tmp_path / "texts.json", {f"t{i}": 20 for i in range(20)}, pictures=False
    )


def row_of(*sources, **changes):
    """(the row, what is said) of a stage with these sources."""
    one = {"name": "one", "data": list(sources), "train": ["fusion"], **changes}
    parts = {"vision": "shapes", "language": "shapes"}
    stage = parse_recipe(
        {"model": parts, "fusion": "sparsecut", "output": "x", "stages": [one]}
    ).stages[0]
    found = records_of(stage)
    return item_of(stage, found, PICTURE), "\n".join(found.notes)


def test_packed_rows_are_of_one_kind_and_hold_no_more_pictures_than_may_be(data):
    shown, texts = data
    text = round(1.5 * 21)
    assert row_of(shown, pack=480)[0].records == pytest.approx(480 / (text + PICTURE))
    few = row_of(shown, pack=480, max_image_tokens=32)[0]
    assert (few.records, few.image_tokens) == (2, 32)
    assert few.kinds[0] == (1, (2 * (text + PICTURE), 2)) and few.longest == (480, 2)
    both = row_of(shown, texts, pack=480, max_image_tokens=32)[0]
    assert both.records == pytest.approx(
        40 / (20 / 2 + 20 / (480 / 30)), rel=0.05
    )  # texts have rows of their own
    assert sum(share for share, _ in both.kinds) == pytest.approx(1)
    assert row_of(texts, pack=480)[0].longest == (480, 0)


def test_what_training_refuses_or_pads_is_told(data):
    shown, _ = data
    one, said = row_of(shown, max_image_tokens=8)
    assert "16 image tokens, but max_image_tokens=8" in said and one.longest[1] == 0
    assert row_of(shown)[0].longest[0] == 48 and row_of(shown, pad_to=32)[0].longest[0] == 64
    assert "taken to be like those that are" not in row_of(shown)[1]
    assert (
        "records that are not here are taken to be like those that are"
        in row_of(shown, {"path": "nowhere.json"})[1]
    )
