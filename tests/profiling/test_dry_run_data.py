"""What a row of a batch holds, from records, by the rules that training packs and pads by."""

import pytest
from helpers.runs import write_word_records

from sparsecut.config.recipe import parse_recipe
from sparsecut.profiling.dry_run_data import describe_row, read_record_facts

IMAGE_TOKENS = 16
TEXT_TOKENS = round(1.5 * 21)  # of a record of 20 words and a placeholder


@pytest.fixture
def data(tmp_path):
    """Data of a stage: twenty records with an image each, and twenty texts."""
    (tmp_path / "one.png").write_bytes(b"")
    images = write_word_records(tmp_path / "images.json", {f"i{i}": 20 for i in range(20)})
    words = {f"t{i}": 20 for i in range(20)}
    return images, write_word_records(tmp_path / "texts.json", words, has_images=False)


def make_stage(*sources, **changes):
    stage = {"name": "one", "data": list(sources), "train": ["fusion"], **changes}
    model = {"vision": "shapes", "language": "shapes"}
    plain = {"model": model, "fusion": "sparsecut", "output": "x", "stages": [stage]}
    return parse_recipe(plain).stages[0]


def read_facts(*sources, **changes):
    """What is known of the records of a stage with these sources."""
    return read_record_facts(make_stage(*sources, **changes))


def describe(*sources, **changes):
    """(a row, the notes) of a stage with these sources."""
    stage = make_stage(*sources, **changes)
    facts = read_record_facts(stage)
    return describe_row(stage, facts, IMAGE_TOKENS), "\n".join(facts.notes)


def test_packed_rows_hold_no_more_images_than_allowed(data):
    images, _ = data
    row, _ = describe(images, pack=480)
    assert row.records == pytest.approx(480 / (TEXT_TOKENS + IMAGE_TOKENS))
    limited, _ = describe(images, pack=480, max_image_tokens=32)
    assert (limited.records, limited.image_tokens) == (2, 32)
    assert limited.kinds[0] == (1, (2 * (TEXT_TOKENS + IMAGE_TOKENS), 2))
    assert limited.longest == (480, 2)


def test_packed_texts_have_rows_of_their_own(data):
    images, texts = data
    row, _ = describe(images, texts, pack=480, max_image_tokens=32)
    num_rows = 20 / 2 + 20 / (480 / 30)
    assert row.records == pytest.approx(40 / num_rows, rel=0.05)
    assert sum(fraction for fraction, _ in row.kinds) == pytest.approx(1)
    assert describe(texts, pack=480)[0].longest == (480, 0)


def test_what_training_refuses_or_pads_is_noted(data):
    images, _ = data
    row, notes = describe(images, max_image_tokens=8)
    assert "16 image tokens" in notes
    assert "max_image_tokens=8" in notes
    assert row.longest.images == 0
    assert describe(images)[0].longest.tokens == 48
    assert describe(images, pad_to=32)[0].longest.tokens == 64


def test_absent_records_are_assumed_to_be_like_the_others(data):
    images, _ = data
    _, notes = describe(images)
    _, more_notes = describe(images, {"path": "nowhere.json"})
    assert len(more_notes.splitlines()) == len(notes.splitlines()) + 2
    assert "nowhere.json" in more_notes


@pytest.fixture
def mixed(tmp_path):
    """Data of a stage: forty short records, and a long one."""
    (tmp_path / "one.png").write_bytes(b"")
    words = {f"{'keep' if i % 4 else 'out'}-{i}": 20 for i in range(40)} | {"keep-long": 400}
    return write_word_records(tmp_path / "mixed.json", words)


def test_records_are_those_that_the_stage_takes(mixed, tmp_path):
    whole = read_facts(mixed)
    assert (whole.number, whole.image_fraction, whole.max_images) == (41, 1.0, 1)
    assert whole.longest_text == round(1.5 * 401)
    assert read_facts({**mixed, "where": "^keep", "keep": 10}).number == 10
    short = read_facts({**mixed, "hold_out": "long"})
    assert (short.number, short.longest_text) == (40, TEXT_TOKENS)
    stream = read_facts({**mixed, "streaming": True}, args={"max_steps": 1})
    assert (stream.number, stream.origin) == (None, "a stream")


def test_records_that_cannot_be_read_are_an_error(mixed, tmp_path):
    with pytest.raises(ValueError, match="nobody"):
        read_facts({**mixed, "where": "nobody"})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        read_facts({"path": str(tmp_path / "broken.json")})


def test_published_numbers_stand_in_for_absent_files():
    path = "nowhere/llava_v1_5_mix665k.json"
    assert read_facts({"path": path}).number == 665_298
    assert read_facts({"path": path, "keep": 1000}).number == 1000
    assert read_facts({"path": path, "where": "coco"}).number is None
    assert read_facts({"path": "nowhere.json"}).number is None
