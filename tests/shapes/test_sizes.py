"""The large size: its questions are true, its splits share nothing, its backbones learn;
the small one is as it was.
"""

import hashlib
import json
import random

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from sparsecut.cli.main import app
from sparsecut.shapes.language import Batches, answer, fill_slots, make_conversation, pack
from sparsecut.shapes.questions import (
    COLOUR_NAMES,
    KINDS,
    SHADE_NAMES,
    SPLITS,
    ask,
    caption,
    find_kind,
    list_words,
    split_scene,
    write_split,
)
from sparsecut.shapes.scenes import DIGITS, LINES, SHAPES, TEXTURES, draw
from sparsecut.shapes.sizes import LARGE, PLACES, SMALL, find_size
from sparsecut.shapes.vision import ATTRIBUTES, Views
from sparsecut.shapes.vocabulary import make_tokenizer


def test_the_small_world_is_what_the_shipped_weights_were_made_on():
    digest = hashlib.sha256()
    for split in SPLITS:
        for i in range(6):
            scene, rng = split_scene(f"{split}/0/{i}"), random.Random(f"{split}/{i}")
            digest.update(draw(scene).tobytes())
            digest.update(json.dumps([ask(scene, rng, 12), caption(scene, rng)]).encode())
            digest.update(repr((scene.things, scene.noise)).encode())
    assert digest.hexdigest() == "68547407164a248c8e88167825d781b9b4298b57a548727f19c17b49b2624dcc"
    words = hashlib.sha256(json.dumps(list_words()).encode()).hexdigest()
    assert words == "3f1aff3e9df3293681b31b5de11aedc611ab3a3442ed247c778f4f3834b0b8ff"


def test_the_small_encoder_sees_the_batches_it_was_made_on():
    torch.manual_seed(0)
    batch = Views(8).batch(4)
    digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in batch)).hexdigest()
    assert digest == "11d98f1f9ffdc7ee7e5b5acf829bdd93a5fd7645a3475a37626c13b7d8d733ec"


def test_images_are_twice_as_wide_and_hold_more_things():
    scenes = [split_scene(f"train/0/{i}", LARGE) for i in range(200)]
    assert {len(scene.things) for scene in scenes} == {5, 6, 7, 8}
    assert {t.place for scene in scenes for t in scene.things} == set(range(16))
    for scene in scenes:
        assert (
            len({t.shape for t in scene.things})
            == len({t.place for t in scene.things})
            == len(scene.things)
        )
    assert draw(scenes[0]).size == (192, 192) == (2 * LARGE.coarse, 2 * LARGE.coarse)


def test_things_are_drawn_where_the_scene_says():
    scene = split_scene("train/0/5", LARGE)
    image = np.asarray(draw(scene)).astype(float)
    taken = {t.place for t in scene.things}
    for place in range(16):
        row, column = divmod(place, 4)
        lines = image[48 * row + 35 : 48 * row + 46, 48 * column + 3 : 48 * column + 14]
        assert (lines.std() > 40) == (place in taken), (
            place
        )  # an empty cell is a gradient with grain


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_true_of_the_scene(split):
    for i in range(60):
        scene = split_scene(f"{split}/0/{i}", LARGE)
        pairs = ask(scene, random.Random(i), 12)
        assert len(set(pairs)) == 12
        for question, reply in pairs:
            assert true_answer(scene, question) == reply, (scene, question)


def true_answer(scene, question: str) -> str:
    """The answer worked out again from the scene, by the question's words alone."""
    words, kind = question.split(), find_kind(question)
    if kind == "count":
        return DIGITS[sum(COLOUR_NAMES[t.colour] == words[-1] for t in scene.things)]
    if kind == "place":
        return PLACES[4][next(t.place for t in scene.things if SHAPES[t.shape] == words[-1])]
    thing = next(t for t in scene.things if PLACES[4][t.place] == words[-1])
    names = {
        "shape": SHAPES,
        "texture": TEXTURES,
        "shade": SHADE_NAMES,
        "lines": LINES,
        "digit": DIGITS,
    }
    return names[kind][getattr(thing, kind)]


def test_no_scene_stands_in_two_splits():
    scenes = {
        split: {repr(split_scene(f"{split}/0/{i}", LARGE).things) for i in range(200)}
        for split in SPLITS
    }
    assert sum(map(len, scenes.values())) == len(set.union(*scenes.values())) == 200 * len(SPLITS)


def test_every_word_is_one_token_and_places_differ():
    tokenizer = make_tokenizer(size=LARGE)
    assert len(set(PLACES[4])) == 16 and not set(PLACES[4]) & {*SHAPES, *LINES, *DIGITS}
    scene = split_scene("train/0/1", LARGE)
    text = [
        caption(scene, random.Random(0)),
        *(f"{q} {a}" for q, a in ask(scene, random.Random(0), 40)),
    ]
    for words in text:
        ids = tokenizer(words)["input_ids"][1:]
        assert len(ids) == len(words.split()) and tokenizer.unk_token_id not in ids


def test_targets_of_the_encoder_are_what_each_cell_shows():
    torch.manual_seed(0)
    views = Views(3, LARGE)
    pixels, in_coarse, in_fine = views.batch(2)
    assert (
        pixels.shape == (6, 3, 96, 96) and in_coarse.shape == (32, 6) and in_fine.shape == (16, 6)
    )
    scene = split_scene("pretrain/0/1", LARGE)
    for t in scene.things:
        row, column = divmod(t.place, 4)
        expected = [t.shape, t.colour, t.shade, t.texture, t.lines, t.digit]
        assert views.labels[1, t.place].tolist() == expected and len(expected) == len(ATTRIBUTES)
        assert (
            views.tiled[1, row // 2 * 2 + column // 2, row % 2 * 2 + column % 2].tolist()
            == expected
        )
    native = np.asarray(draw(scene))
    assert np.array_equal(views.fine[1, 1].numpy(), native[:96, 96:])


def test_slots_hold_a_thing_in_its_own_cell():
    tokenizer, training = make_tokenizer(size=LARGE), LARGE.quick[1]
    batches = Batches(0, LARGE, training, tokenizer)
    again = Batches(0, LARGE, training, tokenizer)
    again[0]
    assert all(
        torch.equal(a, b) for a, b in zip(batches[1], again[1], strict=True)
    )  # whatever came before
    scene = split_scene("dev/0/0", LARGE)
    for side in (8, 16):
        grid, part = fill_slots(scene, random.Random(0), side), side // 4
        for slot, words in enumerate(grid):
            place = slot // side // part * 4 + slot % side // part
            own = {t.place: t for t in scene.things}.get(place)
            assert all(own and word in attribute_words(own) for word in words)
        assert sum(map(len, grid)) >= 6 * len(scene.things)


def attribute_words(t) -> set[str]:
    """The six words of a thing."""
    return {
        SHAPES[t.shape],
        COLOUR_NAMES[t.colour],
        SHADE_NAMES[t.shade],
        TEXTURES[t.texture],
        LINES[t.lines],
        DIGITS[t.digit],
    }


def test_the_language_model_takes_a_step():
    torch.manual_seed(0)
    tokenizer = make_tokenizer(size=LARGE)
    model = GPT2LMHeadModel(
        GPT2Config(**LARGE.language, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    )
    assert model.config.n_layer == 12 and model.config.n_embd == 384
    scene, rng = split_scene("pretrain/0/0", LARGE), random.Random(0)
    packed = pack([make_conversation(scene, tokenizer, rng, 4, ((8,),))])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-4), []
    for _ in range(4):
        logits, labels = answer(model, packed, 0.0)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


def test_a_split_is_drawn_by_the_command(tmp_path):
    arguments = ["shapes", "draw", str(tmp_path), "--size=large", "--train=0", "--dev=0"]
    result = CliRunner().invoke(app, [*arguments, "--test=3"])
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "test.json").read_text())
    assert {record["group"] for record in records} == set(KINDS)


def test_an_unknown_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"huge.*small, large"):
        write_split(tmp_path, "dev", 3, size="huge")
    assert find_size("small") is SMALL and not list(tmp_path.iterdir())
