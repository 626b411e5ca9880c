"""Audio from files to answers: a recipe learns tones; evaluation and chat answer as `generate`."""

import json

import numpy as np
import pytest
import soundfile
import torch
from helpers import tones
from PIL import Image

from sparsecut import load
from sparsecut.audio import Clip, open_audio
from sparsecut.chat import Chat
from sparsecut.config.recipe import parse_recipe
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import read_examples
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.schema import UserError
from sparsecut.training.stages import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with tones, and a model that was trained on them by a recipe."""
    folder = tmp_path_factory.mktemp("tones")
    tones.save_encoder(folder / "whisper")
    tones.write_tones(folder, 96, 1, "train")
    tones.write_tones(folder, 30, 2, "test")
    train(parse_recipe(tones.make_recipe(folder, 60)), shown=False)
    return folder


@pytest.fixture(scope="session")
def model_and_processor(trained):
    return load(trained / "out" / "final")


@pytest.fixture(scope="session")
def test_examples(trained):
    return read_examples(trained / "test.json")


def generate_answer(model, processor, example) -> str:
    """What `generate` answers to an example, called as a user of transformers would."""
    question = example.get_messages(processor.audio_token)[:1]
    text = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    inputs = processor(
        audio=example.load_images(), text=text, add_special_tokens=False, return_tensors="pt"
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=3)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_recipe_learns_tones_from_files_of_all_formats(
    model_and_processor, test_examples, tmp_path
):
    result = evaluate(*model_and_processor, test_examples, out=tmp_path, max_new_tokens=3)
    assert result["accuracy"] > 0.8  # a third by chance
    for example, record in zip(test_examples[:6], result.records, strict=False):
        answer = generate_answer(*model_and_processor, example)
        assert record["prediction"] == answer.strip()


def test_chat_answers_as_generate_does_and_keeps_earlier_clips(
    model_and_processor, trained, test_examples
):
    chat = Chat(*model_and_processor, max_new_tokens=3)
    file = trained / "test0.wav"
    expected = generate_answer(*model_and_processor, test_examples[0]).strip()
    assert chat.ask(tones.QUESTION.removeprefix("<audio> "), file)
    again = Chat(*model_and_processor, max_new_tokens=3)
    assert again.ask(tones.QUESTION, file.read_bytes()) == expected
    assert "".join(again.stream("what shade")) and len(again.images) == 1
    with pytest.raises(UserError, match="audio"):
        again.ask("what", Image.new("RGB", (8, 8)))


def test_files_of_any_format_rate_and_number_of_channels_give_the_same_sound(tmp_path):
    rng = np.random.default_rng(0)
    tone = tones.make_tone("medium", rng, 44_100)
    stereo = np.stack([tone, tone], axis=1)
    sources = {}
    for kind, tolerance in {"wav": 1e-4, "flac": 1e-4, "mp3": 0.2, "ogg": 0.2}.items():
        path = tmp_path / f"tone.{kind}"
        soundfile.write(path, stereo, 44_100)
        sources[path.rename(tmp_path / f"{kind}.bin")] = tolerance  # the name says nothing
    for path, tolerance in sources.items():
        clip = open_audio(path)
        assert clip.rate == 44_100 and clip.samples.dtype == np.float32
        assert len(clip.samples) == pytest.approx(len(tone), abs=3000)
        assert np.abs(clip.samples[: len(tone)] - tone[: len(clip.samples)]).max() < tolerance
        assert np.array_equal(open_audio(path.read_bytes()).samples, clip.samples)


def test_resampling_is_that_of_transformers(model_and_processor, tmp_path):
    from transformers.audio_utils import load_audio

    tone = tones.make_tone("dark", np.random.default_rng(0), 22_050)
    soundfile.write(tmp_path / "a.wav", tone, 22_050)
    _, processor = model_and_processor
    expected = load_audio(str(tmp_path / "a.wav"), sampling_rate=16_000)
    assert np.array_equal(processor.read(str(tmp_path / "a.wav")), expected)


def break_file(name: str, data: bytes) -> bytes:
    if name == "cut":
        return data[: len(data) // 2]
    if name == "no sound":
        return b"hello" * 40
    if name == "empty":
        return b""
    return data[:40] + bytes(4) + data[44:]


@pytest.mark.parametrize("problem", ["cut", "no sound", "empty", "without samples"])
def test_a_broken_file_is_one_bad_record(tmp_path, problem):
    path = tones.write_tones(tmp_path, 4, 0, "a")
    file = tmp_path / "a0.wav"
    file.write_bytes(break_file(problem, file.read_bytes()))
    examples = read_examples(path)
    with pytest.raises(RecordError, match=r"a0\.wav") as error:
        examples[0].load_images()
    assert "record 0" in error.value.where
    assert all(len(example.load_images()) == 1 for example in examples[1:])


def test_what_is_longer_than_the_encoder_takes_is_refused_by_its_record(
    model_and_processor, tmp_path
):
    _, processor = model_and_processor
    for seconds, is_refused in ((1.0, False), (1.2, True)):
        tone = tones.make_tone("dark", np.random.default_rng(0), 8000, seconds)
        clip = Clip(tone, 8000)
        if is_refused:
            with pytest.raises(UserError, match=r"1\.2 s"):
                processor.pixels([clip])
        else:
            assert processor.pixels([clip]).shape == (1, 1, 40, 100)
    path = tones.write_tones(tmp_path, 1, 0, "a")
    soundfile.write(tmp_path / "a0.wav", tone, 8000)
    with pytest.raises(RecordError, match="record 0"):
        read_examples(path)[0].load_images(processor)


def make_records(file: str, data: bytes) -> list[dict]:
    """The same question in every form."""
    import base64

    text = base64.b64encode(data).decode()
    answer = {"role": "assistant", "content": "dark"}
    values = [
        {"type": "audio", "audio": file},
        {"type": "audio", "path": file},
        {"type": "audio", "url": f"data:audio/wav;base64,{text}"},
        {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{text}"}},
        {"audio": file},
    ]
    ask = {"type": "text", "text": "what shade"}
    records = [
        {"messages": [{"role": "user", "content": [value, ask]}, answer]} for value in values
    ]
    slot = [{"role": "user", "content": [{"type": "audio"}, ask]}, answer]
    return [
        *records,
        {"audios": [file], "messages": slot},
        {"audio": file, "messages": [{"role": "user", "content": "<audio>\nwhat shade"}, answer]},
        {"audio": file, "question": "what shade", "answer": "dark"},
        {"audio": {"bytes": data, "path": None}, "question": "what shade", "answer": "dark"},
    ]


def test_audio_stands_in_records_of_every_form(tmp_path):
    from sparsecut.data.examples import parse_record
    from sparsecut.data.images import ImageStore

    tones.write_tones(tmp_path, 1, 0, "a")
    data = (tmp_path / "a0.wav").read_bytes()
    expected = open_audio(data)
    store = ImageStore(tmp_path)
    for record in make_records("a0.wav", data):
        example = parse_record(record, "here", store)
        assert example.medium == "audio" and len(example.images) == 1, record
        assert example.get_messages("[A]")[0]["content"] == "[A]\nwhat shade", record
        assert np.array_equal(example.load_images()[0].samples, expected.samples)


@pytest.mark.parametrize(
    "record",
    [
        {"audio": "a0.wav", "image": "b.png", "question": "what", "answer": "dark"},
        {"audio": "a0.wav", "question": "<image> what", "answer": "dark"},
        {"audio": "a0.wav", "question": "<audio> and <audio>", "answer": "dark"},
        {"audio": "a0.wav", "question": "what", "answer": "<audio>"},
        {"video": "a0.mp4", "question": "what", "answer": "dark"},
    ],
)
def test_records_that_would_be_learned_in_part_are_refused(tmp_path, record):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(RecordError, match="line 1"):
        read_examples(path)


def test_a_text_may_speak_of_audio_where_there_is_none(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "what is the tag <audio> for", "completion": "sound"}))
    (example,) = read_examples(path)
    assert example.medium == "image" and not example.images
    assert "<audio>" in example.messages[0]["content"]


def test_models_refuse_records_of_another_medium(model_and_processor, tmp_path):
    from helpers.tiny import tiny_model

    from sparsecut.data.encoding import example_encoder

    _, processor = model_and_processor
    path = tones.write_tones(tmp_path, 1, 0, "a")
    (audio,) = read_examples(path)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    image_file = tmp_path / "image.jsonl"
    image_file.write_text(json.dumps({"image": "b.png", "question": "what", "answer": "dark"}))
    (image,) = read_examples(image_file)
    text_file = tmp_path / "text.jsonl"
    text_file.write_text(json.dumps({"question": "what is <audio>", "answer": "dark"}))
    (text,) = read_examples(text_file)
    model, images_only = tiny_model()
    for encoder_of, example in ((images_only, audio), (processor, image), (processor, text)):
        with pytest.raises(RecordError):
            example_encoder(encoder_of).encode(example)
    with pytest.raises(UserError):
        evaluate(model, images_only, [audio])
    assert torch.isfinite(processor.pixels(audio.load_images())).all()


@pytest.fixture(scope="module")
def audio_client(model_and_processor):
    from helpers.clients import start_server

    from sparsecut.serving.engine import Engine
    from sparsecut.serving.web import add_page

    engine = Engine(*model_and_processor, max_batch=4, max_queue=10)
    with start_server(engine, add_page) as client:
        yield client
    engine.close()


def make_request(part: dict) -> dict:
    content = [part, {"type": "text", "text": "what shade"}]
    return {"model": "", "messages": [{"role": "user", "content": content}]}


def test_the_server_answers_as_generate_does(
    audio_client, model_and_processor, trained, test_examples
):
    import base64

    from helpers.clients import request

    for example in test_examples[:9:3]:  # a file of each format
        data = (trained / example.images[0]).read_bytes()
        text = base64.b64encode(data).decode()
        kind = example.images[0].rpartition(".")[2]
        parts = [
            {"type": "input_audio", "input_audio": {"data": text, "format": kind}},
            {"type": "audio_url", "audio_url": {"url": f"data:audio/{kind};base64,{text}"}},
        ]
        expected = generate_answer(*model_and_processor, example).strip()
        for part in parts:
            messages = make_request(part)["messages"]
            reply = audio_client.chat.completions.create(
                model=audio_client.models.list().data[0].id,
                messages=messages,
                max_tokens=3,
                temperature=0,
            )
            assert reply.choices[0].message.content == expected
    strengths = request(audio_client, "sparsecut/strengths", json={"messages": messages})
    assert strengths.status_code == 200 and strengths.json()["shortcuts"]
    assert request(audio_client, "sparsecut/plan").json()["medium"] == "audio"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": "!!", "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "aiff"}},
        {"type": "audio_url", "audio_url": {"url": "http://localhost/a.wav"}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
    ],
)
def test_the_server_refuses_what_is_no_sound(audio_client, part):
    import openai

    with pytest.raises(openai.BadRequestError):
        audio_client.chat.completions.create(
            model=audio_client.models.list().data[0].id, messages=make_request(part)["messages"]
        )


def test_cached_features_answer_as_computed_ones(model_and_processor, test_examples, tmp_path):
    from sparsecut.data.feature_cache import build_feature_cache

    model, processor = model_and_processor
    examples = test_examples[:6]
    cache = build_feature_cache(tmp_path / "cache", model, processor, examples)
    cached = evaluate(model, processor, examples, max_new_tokens=3, feature_cache=cache)
    direct = evaluate(model, processor, examples, max_new_tokens=3)
    assert cached.records == direct.records


def test_the_command_line_chats_about_a_file(trained):
    from typer.testing import CliRunner

    from sparsecut.cli.main import app

    runner = CliRunner()
    folder, file = str(trained / "out" / "final"), str(trained / "test0.wav")
    result = runner.invoke(app, ["chat", folder, "--audio", file, "--ask", "what shade"])
    assert result.exit_code == 0 and result.stdout.strip()
    lines = f"/audio {file}\nwhat shade\n/image {file}\n/history\n"
    result = runner.invoke(app, ["chat", folder], input=lines)
    assert "1 clip" in result.stdout and "error" in result.stdout and "[audio]" in result.stdout
