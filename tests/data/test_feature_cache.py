"""Cached vision features: training and answers as with pixels, every image encoded once."""

import json
import os
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from helpers.runs import log, recipe, run, stage, write_records
from helpers.tiny import tiny_model
from PIL import Image

from sparsecut.config.folder_lock import lock_folder
from sparsecut.data.examples import read_examples
from sparsecut.data.feature_cache import (
    VisionFeatureCache,
    build_feature_cache,
    get_image_keys,
    get_tap_views,
)
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.schema import UserError

SPARSE = {"method": "sparsecut", "pattern": "bottom", "fine": 0.5}
PLANS = ["llava", SPARSE, "hires_tokens", "dense_connector_dci"]


@pytest.fixture
def examples(tmp_path):
    return read_examples(write_records(tmp_path) / "data.json")


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_cached_features_are_those_from_pixels(tmp_path, examples, plan):
    model, processor = tiny_model(plan)
    cache = build_feature_cache(tmp_path / "cache", model, processor, examples, batch_size=4)
    views = get_tap_views(model.plan, model.config.vision_depth)
    for example in examples[:8]:
        if not example.images:
            continue
        features = cache.read(example, views)
        for tap, expected in model.encode(processor.pixels(example.load_images())).items():
            torch.testing.assert_close(features[tap].float(), expected, atol=2e-3, rtol=1e-3)


def test_training_on_cached_features_is_training_on_pixels(tmp_path):
    write_records(tmp_path)
    args = {"learning_rate": 1e-3, "max_steps": 2}
    stages = [
        stage(tmp_path, args=args),
        stage(tmp_path, name="two", train=["fusion", "language"], args=args),
    ]
    run(tmp_path, *stages)
    run(tmp_path, *stages, output=str(tmp_path / "cached"), feature_cache=str(tmp_path / "cache"))
    for name in ("one", "two"):
        losses = [line["loss"] for line in log(tmp_path, name)]
        cached = [line["loss"] for line in log(tmp_path, name, "cached")]
        assert losses == pytest.approx(cached, abs=2e-3)


def test_answers_from_cached_features_are_those_from_pixels(tmp_path, examples):
    model, processor = tiny_model(SPARSE)
    cache = build_feature_cache(tmp_path / "cache", model, processor, examples)
    folders = {"pixels": None, "cached": cache}
    results, predictions = [], []
    for name, feature_cache in folders.items():
        out = tmp_path / name
        result = evaluate(
            model, processor, examples, max_new_tokens=4, feature_cache=feature_cache, out=out
        )
        results.append(result["accuracy"])
        predictions.append((out / "predictions.jsonl").read_text())
    assert results[0] == results[1]
    assert predictions[0] == predictions[1]


def test_a_folder_is_used_again_only_where_it_has_everything(tmp_path, examples, monkeypatch):
    folder = tmp_path / "cache"
    model, processor = tiny_model("hires_channels")
    build_feature_cache(folder, model, processor, examples[:4])
    before = (folder / "index.json").stat().st_mtime_ns

    def refuse(*args):
        raise AssertionError("an image was encoded again")

    with monkeypatch.context() as patch:
        patch.setattr("sparsecut.hooks.read_taps", refuse)
        cache = build_feature_cache(folder, model, processor, examples[:3])
        build_feature_cache(folder, *tiny_model("llava"), examples[:3])  # its views are among them
    assert get_image_keys(examples[0])[0] in cache.rows
    pickled = pickle.dumps(cache)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).rows == cache.rows
    build_feature_cache(folder, model, processor, examples)
    assert (folder / "index.json").stat().st_mtime_ns != before
    assert len(VisionFeatureCache(folder).rows) == 9
    other, _ = tiny_model("hires_channels", seed=1)
    build_feature_cache(folder, other, processor, examples)
    expected = other.encode(processor.pixels(examples[0].load_images()))[5]
    features = VisionFeatureCache(folder).read(examples[0], get_tap_views(other.plan, 6))[5]
    torch.testing.assert_close(features.float(), expected, atol=2e-3, rtol=1e-3)


def test_what_cannot_be_cached_is_refused(tmp_path, examples, monkeypatch):
    folder = tmp_path / "cache"
    with pytest.raises(UserError, match="trains vision"):
        recipe(tmp_path, stage(tmp_path, train=["vision"]), feature_cache="cache")
    model, processor = tiny_model("llava")
    with pytest.raises(UserError, match=r"\b5 views .*\b1\b"):
        build_feature_cache(folder, model, processor, examples, {1: 5})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
        with pytest.raises(UserError, match=r"cache has 10 free"):
            build_feature_cache(folder, model, processor, examples)
    assert not (folder / "index.json").exists()
    model.vision_tower.get_submodule("pre_layrnorm").weight.data *= 1e6
    with pytest.raises(UserError, match=r"tap 0 .*half precision"):
        build_feature_cache(folder, model, processor, examples, {0: 1})


def replace_image(path) -> None:
    """Put another image under a name, of the same size and with the same time."""
    before = path.stat()
    pixels = np.asarray(Image.open(path))
    Image.fromarray(255 - pixels).save(path)
    with path.open("ab") as file:
        file.write(bytes(max(0, before.st_size - path.stat().st_size)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def list_encoded(monkeypatch) -> list:
    """A list that grows with every pass of the encoder."""
    from sparsecut import hooks

    original = hooks.read_taps
    passes = []

    def counted(*args):
        passes.append(args)
        return original(*args)

    monkeypatch.setattr("sparsecut.hooks.read_taps", counted)
    return passes


@pytest.mark.parametrize("name", ["thesis.txt", "index.json", "chapters/one.tex"])
@pytest.mark.parametrize("where", ["library", "recipe"])
def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path, examples, name, where):
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"chapters": 5}')
    with pytest.raises(UserError, match=name.partition("/")[0]):
        if where == "recipe":
            run(tmp_path, stage(tmp_path), feature_cache=str(tmp_path / "mine"))
        else:
            build_feature_cache(tmp_path / "mine", *tiny_model("llava"), examples)
    left = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert left == [file]
    assert file.read_text() == '{"chapters": 5}'


def test_making_features_again_removes_their_own_files_only(tmp_path, examples):
    folder = tmp_path / "cache"
    build_feature_cache(folder, *tiny_model("llava"), examples)
    (folder / "notes.txt").write_text("mine")
    (folder / "index.json").write_text("cut sho")  # as an interrupted write leaves it
    with pytest.raises(UserError, match=r"notes\.txt"):
        build_feature_cache(folder, *tiny_model("llava"), examples)
    (folder / "notes.txt").rename(tmp_path / "notes.txt")
    build_feature_cache(folder, *tiny_model("llava"), examples)
    (tmp_path / "notes.txt").rename(folder / "notes.txt")
    cache = build_feature_cache(folder, *tiny_model("llava", seed=1), examples)
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(cache.rows) == 9


def test_an_image_replaced_under_its_name_is_encoded_again(tmp_path, examples):
    folder = tmp_path / "cache"
    model, processor = tiny_model("hires_channels")
    opened = build_feature_cache(folder, model, processor, examples)
    copy = pickle.dumps(opened)
    replace_image(tmp_path / "0.png")
    views = get_tap_views(model.plan, 6)
    with pytest.raises(UserError, match=r"0\.png"):
        VisionFeatureCache(folder).read(examples[0], views)
    with pytest.raises(UserError, match=r"0\.png"):
        evaluate(model, processor, examples, feature_cache=VisionFeatureCache(folder))
    lines = []
    cache = build_feature_cache(folder, model, processor, examples, log=lines.append)
    expected = model.encode(processor.pixels(examples[0].load_images()))[5]
    torch.testing.assert_close(
        cache.read(examples[0], views)[5].float(), expected, atol=2e-3, rtol=1e-3
    )
    assert any("0.png" in line for line in lines)
    with pytest.raises(UserError, match="replaced"):
        pickle.loads(copy)


def test_images_that_swap_names_keep_their_own_features(tmp_path, examples, monkeypatch):
    folder = tmp_path / "cache"
    model, processor = tiny_model("llava")
    build_feature_cache(folder, model, processor, examples)
    names = [tmp_path / "0.png", tmp_path / "1.png", tmp_path / "spare"]
    for source, target in ((0, 2), (1, 0), (2, 1)):
        names[source].rename(names[target])
    passes = list_encoded(monkeypatch)
    cache = build_feature_cache(folder, model, processor, examples)
    assert not passes
    expected = model.encode(processor.pixels(examples[0].load_images()))[5]
    found = pickle.loads(pickle.dumps(cache)).read(examples[0], {5: 1})[5]
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("may_write", [True, False])
def test_images_that_moved_are_not_encoded_again(tmp_path, monkeypatch, may_write):
    old = tmp_path / "old"
    old.mkdir()
    examples = read_examples(write_records(old) / "data.json")
    model, processor = tiny_model("llava")
    before = build_feature_cache(tmp_path / "cache", model, processor, examples)
    features = before.read(examples[1], {5: 1})[5]
    shutil.copytree(old, tmp_path / "new", copy_function=shutil.copy)  # with new times
    shutil.rmtree(old)
    if not may_write:

        def refuse(*args):
            raise PermissionError("read only")

        monkeypatch.setattr("sparsecut.data.feature_cache.write_text_file", refuse)
    moved = read_examples(tmp_path / "new" / "data.json")
    passes = list_encoded(monkeypatch)
    cache = build_feature_cache(tmp_path / "cache", model, processor, moved)
    assert not passes
    for opened in (cache, pickle.loads(pickle.dumps(cache))):
        assert torch.equal(opened.read(moved[1], {5: 1})[5], features)
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert (str(tmp_path / "new" / "1.png") in index["pictures"]) == may_write


def zero(data: bytearray) -> bytes:
    """Nothing but zeros, as a crash leaves a file whose blocks were not written."""
    return bytes(len(data))


def flip(data: bytearray) -> bytes:
    """One bit in the middle."""
    data[len(data) // 2] ^= 1
    return bytes(data)


DAMAGE = {"zeros": zero, "bit": flip, "short": lambda data: data[:-2], "empty": lambda data: b""}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("ending", ["f16", "crc32"])
def test_damaged_features_are_never_read(tmp_path, examples, damage, ending):
    folder = tmp_path / "cache"
    model, processor = tiny_model("llava")
    whole = build_feature_cache(folder, model, processor, examples)
    expected = whole.read(examples[0], {5: 1})[5].clone()
    file = folder / f"tap-05.{ending}"
    data = bytearray(file.read_bytes())
    file.write_bytes(damage(data))
    with pytest.raises(UserError, match=r"tap-05"):
        evaluate(
            model, processor, examples, feature_cache=VisionFeatureCache(folder), max_new_tokens=2
        )
    if damage in (zero, flip):
        with pytest.raises(UserError, match=r"tap-05"):
            run(
                tmp_path,
                stage(tmp_path, args={"max_steps": 6}),
                plan="llava",
                feature_cache=str(folder),
            )
        return
    lines = []
    again = build_feature_cache(folder, model, processor, examples, log=lines.append)
    assert any("tap-05" in line for line in lines)
    assert torch.equal(again.read(examples[0], {5: 1})[5], expected)


def test_features_of_another_encoder_are_refused_whatever_weight_differs(tmp_path, examples):
    model, processor = tiny_model("llava")
    build_feature_cache(tmp_path / "cache", model, processor, examples)
    weight = max(model.vision_tower.parameters(), key=torch.numel)
    weight.data.view(-1)[-2] += 1  # one that samples leave out
    cache = VisionFeatureCache(tmp_path / "cache")
    with pytest.raises(UserError, match="another encoder"):
        evaluate(model, processor, examples, feature_cache=cache)
    lines = []
    again = build_feature_cache(tmp_path / "cache", model, processor, examples, log=lines.append)
    assert any("another encoder" in line for line in lines)
    evaluate(model, processor, examples[:1], feature_cache=again, max_new_tokens=1)


def test_one_process_at_a_time_writes_a_cache_and_any_number_reads_it(tmp_path, examples):
    folder = tmp_path / "cache"
    model, processor = tiny_model("llava")
    build_feature_cache(folder, model, processor, examples)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_folder(folder):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        build_feature_cache(folder, model, processor, examples[:3])
        with pytest.raises(UserError, match="in use"):
            build_feature_cache(folder, *tiny_model("llava", seed=1), examples)
    finally:
        done.set()
        thread.join()
    assert VisionFeatureCache(folder).read(examples[0], {5: 1})


def test_features_of_old_versions_are_used_and_a_line_says_what_is_not_known(tmp_path, examples):
    folder = tmp_path / "cache"
    model, processor = tiny_model("llava")
    build_feature_cache(folder, model, processor, examples)
    index = json.loads((folder / "index.json").read_text())
    for key in ("facts", "encoder_sum"):
        del index[key]
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "tap-05.crc32").unlink()
    lines = []
    before = (folder / "index.json").stat()
    cache = build_feature_cache(folder, model, processor, examples, log=lines.append)
    assert (folder / "index.json").stat() == before
    assert any(str(folder) in line for line in lines)
    assert cache.read(examples[0], {5: 1})
