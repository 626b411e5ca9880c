"""Drawn images are the same everywhere, their splits share nothing, and text alone does not answer
its questions.
"""

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from sparsecut import build
from sparsecut.shapes import language_path, pretrain, vision_path, write_split
from sparsecut.shapes.questions import KINDS, SPLITS, ask, find_kind, list_words, split_scene
from sparsecut.shapes.scenes import draw


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small training and test split on disk."""
    folder = tmp_path_factory.mktemp("shapes")
    write_split(folder, "train", 60, 10, workers=1)
    write_split(folder, "test", 60, 7, workers=1)
    return folder


def test_equal_seeds_give_equal_images_and_others_do_not():
    one, same, other = (
        np.asarray(draw(split_scene(key))) for key in ("train/0/3", "train/0/3", "train/1/3")
    )
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert one.shape == (96, 96, 3)


def test_no_scene_stands_in_two_splits():
    scenes = {
        split: {repr(split_scene(f"{split}/0/{i}").things) for i in range(300)} for split in SPLITS
    }
    for a in SPLITS:
        for b in SPLITS:
            assert a == b or not scenes[a] & scenes[b]


def test_two_processes_write_what_one_writes(drawn, tmp_path):
    write_split(tmp_path, "train", 60, 10, workers=2)
    for name in ("train.json", "train_captions.json", "train/7.png"):
        assert (tmp_path / name).read_bytes() == (drawn / name).read_bytes()


def test_files_are_in_llava_format(drawn):
    train, test = (json.loads((drawn / f"{split}.json").read_text()) for split in ("train", "test"))
    assert len(train) == 60 and all(len(r["conversations"]) == 20 for r in train)
    assert len(test) == 420 and all(len(r["conversations"]) == 2 for r in test)
    for record in (*train, *test):
        text = "".join(turn["value"] for turn in record["conversations"])
        assert text.count("<image>") == 1 and (drawn / record["image"]).is_file()
    assert {r["level"] for r in test} == {"high", "mid", "low"}
    assert Counter(r["group"] for r in test) == dict.fromkeys(KINDS, 60)


def test_text_alone_does_not_answer():
    answers = {}
    for i in range(400):
        scene = split_scene(f"test/1/{i}")
        for question, answer in ask(scene, random.Random(i), 7):
            answers.setdefault(question, Counter())[answer] += 1
    by_kind = {}
    for question, counts in answers.items():
        best, total = by_kind.get(find_kind(question), (0, 0))
        by_kind[find_kind(question)] = best + max(counts.values()), total + sum(counts.values())
    shares = {kind: best / total for kind, (best, total) in by_kind.items()}
    assert set(shares) == set(KINDS)
    most = {
        "shape": 0.3,
        "place": 0.4,
        "texture": 0.35,
        "count": 0.6,
        "shade": 0.45,
        "lines": 0.4,
        "digit": 0.25,
    }
    assert all(shares[kind] < most[kind] for kind in shares), shares


def test_the_shipped_backbones_load_and_know_every_word():
    vision, language = (
        AutoModel.from_pretrained(vision_path()),
        AutoModelForCausalLM.from_pretrained(language_path()),
    )
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(language_path()),
        AutoImageProcessor.from_pretrained(vision_path()),
    )
    assert vision.config.num_hidden_layers == 8 and language.config.num_hidden_layers == 6
    assert not set(list_words()) - set(tokenizer.get_vocab())
    assert language.get_input_embeddings().num_embeddings == len(tokenizer)
    assert list(processor.image_mean) == [0.5] * 3
    size = sum(f.stat().st_size for f in vision_path().parent.rglob("*.safetensors"))
    assert size < 12 * 2**20
    assert all(torch.isfinite(p).all() for m in (vision, language) for p in m.parameters())


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"validation.*pretrain, train, dev, test"):
        write_split(tmp_path, "validation", 3)


def test_the_backbones_can_be_made_anew(tmp_path):
    pretrain(tmp_path, quick=True, log=lambda line: None)
    model, processor = build(str(tmp_path / "vision"), str(tmp_path / "language"))
    assert model.config.vision_depth == 8 and processor.num_image_tokens == 16
    assert "sparsecut shapes pretrain --seed 0 --noise 3.0" in (tmp_path / "README.md").read_text()
