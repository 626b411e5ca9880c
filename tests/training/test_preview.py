"""One record of each stage as the model sees it."""

import numpy as np
import pytest
from helpers.runs import recipe, stage, write_records
from helpers.tiny import SPARSE, tiny_llava, tiny_model
from PIL import Image

from sparsecut.cli.app import print_marked
from sparsecut.training.preview import describe_counts, preview_run, save_sheets
from sparsecut.training.stages import check_recipe
from sparsecut.upgrading import upgrade


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"))


def preview(folder, *stages, start=None, **changes):
    """Previews of stages, for a built model."""
    model, processor = start or tiny_model(SPARSE)
    chosen = recipe(folder, *stages, **changes)
    return preview_run(check_recipe(chosen, model=model, processor=processor)), processor


def test_what_is_learned_and_every_count(folder):
    (shown,), processor = preview(folder)
    learned = "".join(piece.text for piece in shown.pieces if piece.is_learned)
    assert learned.strip().startswith("a cat") and shown.place == f"{folder / 'data.json'} record 0"
    rest = "".join(piece.text for piece in shown.pieces if not piece.is_learned)
    assert ["what", "it", "is"][0] in rest and "a cat" not in rest
    assert f"<{processor.num_image_tokens} image tokens>" in rest
    assert shown.num_image_tokens == processor.num_image_tokens
    assert shown.num_learned == len(processor.tokenizer(learned)["input_ids"])
    assert shown.image_sizes == [(16, 20)]
    assert shown.pixels["pixel_values"][:2] == (1, processor.num_views)
    assert any("16 x 20" in line for line in describe_counts(shown))


def test_an_upgraded_model_shows_its_own_processors_tokens(folder):
    base, processor = tiny_llava()
    start = upgrade(base, SPARSE, processor=processor)
    changes = {"model": {"base": "x"}, "fusion": SPARSE}
    (shown,), processor = preview(folder, start=start, **changes)
    learned = "".join(piece.text for piece in shown.pieces if piece.is_learned)
    assert learned.strip().startswith("a cat") and shown.num_image_tokens > 1
    assert shown.num_tokens > shown.num_image_tokens + shown.num_learned


def test_packed_rows_streams_and_cached_features_are_told(folder, tmp_path):
    packed = stage(folder, name="packed", pack=80)
    stream = stage(folder, name="stream", data="data.json")
    stream["data"]["streaming"] = True
    cache = tmp_path / "features"
    (first, second), _ = preview(folder, packed, stream, feature_cache=str(cache))
    assert any("80 tokens" in note for note in first.notes)
    assert any("stream" in note for note in second.notes)
    assert all(any(str(cache) in note for note in one.notes) for one in (first, second))
    assert not cache.exists()


def test_sheets_hold_the_image_and_its_views(folder, tmp_path):
    two = stage(folder, name="two")
    texts = stage(folder, "texts.json", name="texts")
    previews, processor = preview(folder, two, texts)
    (file,) = save_sheets(previews, tmp_path / "sheets")
    sheet = np.asarray(Image.open(file))
    opened = np.asarray(Image.open(folder / "0.png"))
    assert (sheet[:20, :16] == opened).all()
    size = processor.image_size
    coarse = sheet[:size, 20 : 20 + size]
    resized = Image.open(folder / "0.png").resize((size, size), Image.Resampling.BICUBIC)
    assert abs(coarse.astype(int) - np.asarray(resized)).mean() < 8


def test_marks_need_no_colour(capsys):
    print_marked([("a [b] ", False), ("c\x1b", True)])
    assert capsys.readouterr().out == "a [b] [[c\\x1b]]\n"
