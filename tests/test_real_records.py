"""Records that examples/real makes of packages: splits stay apart, and answers are what the images
and descriptions say.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.example_bases import load_example
from PIL import Image
from transformers import WhisperConfig, WhisperModel

from sparsecut.data.examples import read_examples
from sparsecut.schema import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "real"))

import ask
import easy_vqa
import speech
import stamps


def test_records_of_easy_vqa_keep_its_splits_and_images_apart(tmp_path):
    rows = {
        "train": [["what color is it?", "blue", 9], ["is it red?", "no", 1], ["x?", "circle", 19]],
        "test": [["is there a circle?", "yes", 9]],
    }
    for split, questions in rows.items():
        folder = tmp_path / "source" / split
        (folder / "images").mkdir(parents=True)
        (folder / "questions.json").write_text(json.dumps(questions))
        for number in (1, 9, 19):
            Image.new("RGB", (4, 4)).save(folder / "images" / f"{number}.png")
    out = tmp_path / "out"
    assert easy_vqa.write_easy_vqa(tmp_path / "source", out) == {"train": 1, "dev": 2, "test": 1}
    ids = {split: [x.id for x in read_examples(out / f"{split}.json")] for split in ("dev", "test")}
    assert ids == {"dev": ["dev.color.9.0", "dev.shape.19.2"], "test": ["test.yesno.9.0"]}
    (example,) = read_examples(out / "train.json")
    assert [turn["content"] for turn in example.messages] == ["<image>\nis it red?", "no"]
    assert example.load_images()[0].size == (4, 4)


def draw_stamp(path: Path, color: str, size: tuple[int, int] = (20, 30)) -> None:
    """Draw a stamp: a rectangle of one colour in a transparent frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste(Image.new("RGBA", size, color), (5, 0))
    image.save(path)


@pytest.fixture
def stamp_records(tmp_path, monkeypatch):
    """All records of some drawn stamps, and the folder that they lie in."""
    monkeypatch.setattr(stamps, "MIN_STAMPS", 2)
    source = tmp_path / "source"
    for number in range(24):
        kind = "animals" if number % 2 else "food"
        path = source / kind / "some" / f"s{number}.png"
        draw_stamp(path, "red" if number % 2 else "blue")
        path.with_suffix(".txt").write_text(f"A thing{number // 4}.\nen.utf8=no")
    for kind, name in (("symbols", "letter"), ("medical", "tooth"), ("food", "s0_mirror")):
        draw_stamp(source / kind / f"{name}.png", "green")
        (source / kind / f"{name}.txt").write_text("A letter.")
    out = tmp_path / "out"
    counts = stamps.write_stamps(source, out)
    records = {split: read_examples(out / f"{split}.json") for split in counts}
    assert counts == {split: len(rows) for split, rows in records.items()}
    return records, out


def test_stamps_with_one_name_are_in_one_split(stamp_records):
    records, _ = stamp_records
    splits = {}
    for split, rows in records.items():
        for example in rows:
            name, _, stamp = example.id.split(".")
            assert name == split
            number = int(stamp.split("-")[0].removeprefix("s")) // 4
            splits.setdefault(number, set()).add(split)
    assert set(splits) == set(range(6)) and all(len(found) == 1 for found in splits.values())


def test_answers_about_stamps_are_what_their_pixels_and_names_say(stamp_records):
    records, _ = stamp_records
    tops = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
    found = set()
    for example in [example for rows in records.values() for example in rows]:
        _, kind, stamp = example.id.split(".")
        number = int(stamp.split("-")[0].removeprefix("s"))
        question, answer = (turn["content"] for turn in example.messages)
        found.add(kind)
        if kind == "color":
            assert answer == ("red" if number % 2 else "blue")
        elif kind == "kind":
            assert answer == ("animals" if number % 2 else "food")
        elif kind == "name":
            assert answer == f"thing{number // 4}" and answer in question
        else:  # the rectangle lies at the top of its stamp
            (image,) = example.load_images()
            rows, columns = np.nonzero((np.asarray(image) != 255).any(-1))
            place = (columns.mean() - 111.5, rows.mean() - 111.5)
            x, y = tops[answer]
            assert kind == "turn" and number % 2 and place[0] * x + place[1] * y > 0
    assert found >= {"kind", "color", "turn"}


def test_names_of_colours():
    named = {
        "red": (220, 20, 20),
        "brown": (120, 70, 20),
        "green": (30, 160, 60),
        "yellow": (250, 240, 40),
        "black": (20, 10, 10),
        "white": (250, 250, 245),
        "gray": (128, 130, 127),
        "pink": (250, 120, 190),
        "orange": (250, 140, 20),
    }
    assert {name: stamps.name_color(*pixel) for name, pixel in named.items()} == {
        name: name for name in named
    }
    half = Image.new("RGBA", (10, 10), "red")
    for number, color in enumerate(("green", "blue", "white")):
        half.paste(Image.new("RGBA", (2, 10), color), (2 * number, 0))
    assert stamps.find_color(half) is None
    assert stamps.find_color(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) is None


def test_digits_are_spoken_in_voices_that_are_held_out(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="examples/real/requirements.txt")
    monkeypatch.setattr(speech, "ACCENTS", {"train": ("en-us",), "test": ("en-029",)})
    monkeypatch.setattr(speech, "VARIANTS", {"train": ("m1",), "test": ("f4",)})
    assert speech.write_speech(tmp_path) == {"train": 10, "test": 10}
    clips = [x.load_images()[0] for x in read_examples(tmp_path / "test.json")]
    assert all(0.2 < clip.seconds < 2 and np.abs(clip.samples).max() > 0.05 for clip in clips)
    with pytest.raises(UserError, match="en-nowhere"):
        speech.Speaker().speak("one", "en-nowhere")


def test_no_voice_of_the_test_shares_accent_or_speaker_with_training():
    for parts in (speech.ACCENTS, speech.VARIANTS):
        assert set(parts["train"]).isdisjoint(parts["test"])


def test_a_score_stands_beside_what_the_text_gives_away(tmp_path):
    rows = {
        "train": [("is it red?", "no"), ("is it red?", "no"), ("what color?", "blue")],
        "test": [("is it red?", "no"), ("what color?", "red"), ("what shape?", "circle")],
    }
    for split, questions in rows.items():
        records = []
        for number, (question, answer) in enumerate(questions):
            name = f"{split}.{easy_vqa.get_kind(answer)}.{number}.{number}"
            records.append(easy_vqa.make_record(name, f"{number}.png", question, answer))
            Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{split}.json").write_text(json.dumps(records))
    asked = read_examples(tmp_path / "test.json")
    lines = [{"id": x.id, "correct": ".color." in x.id} for x in asked]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert ask.score_by_kind(tmp_path, tmp_path, asked) == [
        ["color", "1", "100.0", "0.0"],
        ["shape", "1", "0.0", "0.0"],
        ["yesno", "1", "0.0", "100.0"],
        ["mean of kinds", "3", "33.3", "33.3"],
    ]


def test_the_audio_example_takes_a_trained_whisper(tmp_path, capsys):
    example = load_example("audio")
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=8,
        d_model=16,
        encoder_layers=4,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        num_mel_bins=8,
        max_source_positions=120,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id"), 0),
    )
    WhisperModel(config).save_pretrained(tmp_path / "whisper")
    clips = tmp_path / "speech" / "clips"
    clips.mkdir(parents=True)
    for split in ("train", "test"):
        records = [speech.make_audio_record(f"{split}.{word}", word) for word in ("one", "two") * 8]
        (clips.parent / f"{split}.json").write_text(json.dumps(records))
        for number, word in enumerate(("one", "two")):
            tone = np.sin(np.arange(9000) * (number + 1) / 20) * 9000
            speech.write_wave(clips / f"{split}.{word}.wav", tone, 22_050)
    model, processor, question, asked, words = example.learn_digits(tmp_path, 2)
    encoder = model.vision_backbone()
    whole = WhisperModel.from_pretrained(tmp_path / "whisper").get_encoder()
    assert encoder.max_source_positions == 100
    assert torch.equal(encoder.embed_positions.weight, whole.embed_positions.weight[:100])
    frozen = encoder.state_dict()
    assert all(
        torch.equal(frozen[name], x) for name, x in whole.state_dict().items() if "pos" not in name
    )
    assert len(example.answer(model, processor, asked, question)) == len(words) == 16
