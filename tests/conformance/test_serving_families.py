"""Serving models of more families: the engine's answers and the page."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.clients import make_image, make_messages, request, start_server
from helpers.engine_checks import check_answers, make_question, randomize_fusion
from helpers.example_bases import build_example_base
from helpers.native import PROCESSORS, build_base
from helpers.runs import write_records
from helpers.tiny import tiny_model

from sparsecut import upgrade
from sparsecut.building import save
from sparsecut.serving.engine import Engine
from sparsecut.serving.web import add_page


@pytest.fixture(scope="module", params=["llava", "qwen"])
def engine(request):
    base, processor = build_example_base(request.param)
    model, processor = upgrade(base, processor=processor)
    engine = Engine(randomize_fusion(model), processor, max_batch=8)
    yield engine
    engine.close()


def test_an_upgraded_model_answers_many_as_it_answers_one(engine):
    questions = [make_question(engine.processor, i) for i in range(12)]
    expected = check_answers(engine, questions)
    assert len(set(expected)) > 3
    shortcuts_off = engine.model.fusion.gated
    assert check_answers(engine, questions, shortcuts_off=shortcuts_off) != expected
    before = engine.runner.counts.copy()
    check_answers(engine, questions)  # the same images again
    num_images = engine.runner.counts["images"] - before["images"]
    num_cached = engine.runner.counts["cached_images"] - before["cached_images"]
    assert num_images == num_cached > 8


def test_an_upgraded_model_has_a_page(engine):
    with start_server(engine, add_page) as client:
        shortcuts = request(client, "sparsecut/plan").json()["shortcuts"]
        mixers = [shortcut.mix for shortcut in engine.model.plan.shortcuts]
        assert [s["can_be_off"] for s in shortcuts] == [mix != "base" for mix in mixers]
        assert not all(s["can_be_off"] for s in shortcuts)  # what the base itself reads stays on
        messages = make_messages("what is it", make_image(5))
        measured = request(client, "sparsecut/strengths", json={"messages": messages}).json()
        numbers = [row["number"] for row in measured["shortcuts"]]
        assert numbers == list(range(len(shortcuts)))


def test_an_image_that_the_processor_refuses_is_the_clients_mistake():
    base, processor = build_example_base("qwen")
    model, processor = upgrade(base, processor=processor)
    engine = Engine(model, processor)
    try:
        with start_server(engine) as client:
            too_long = make_image(0).resize((3000, 2))
            body = {"messages": make_messages("what is it", too_long)}
            response = request(client, "v1/chat/completions", json=body)
            assert response.status_code == 400
            assert "aspect ratio" in response.json()["error"]["message"]
    finally:
        engine.close()


@pytest.mark.parametrize("name", PROCESSORS)
def test_no_text_about_images_fails_at_any_base(name):
    processor = PROCESSORS[name]()
    if name == "paligemma":
        processor.image_seq_length = 16
    model, processor = upgrade(build_base(name, processor), processor=processor)
    engine = Engine(randomize_fusion(model), processor, max_batch=8)
    tokens = engine.reserved_tokens
    assert processor.image_token in tokens
    good = make_messages("what is it", make_image(3))
    texts = (
        sorted(tokens) + [token[:-1] for token in tokens] + list(processor.tokenizer.get_vocab())
    )
    try:
        with start_server(engine) as client, ThreadPoolExecutor(8) as pool:

            def ask(messages):
                body = {"messages": messages, "max_tokens": 3, "temperature": 0}
                return request(client, "v1/chat/completions", json=body)

            expected = ask(good).json()["choices"][0]["message"]
            special = [text for text in texts if not text.isalnum() and len(text) > 2][:40]
            hostile = [make_messages(f"a {text} b", make_image(3)) for text in special]
            responses = list(pool.map(ask, [item for pair in hostile for item in (pair, good)]))
        for text, response in zip(special, responses[::2], strict=True):
            assert response.status_code in (200, 400), (text, response.text)
            assert response.status_code == 400 or text not in tokens, text
        for response in responses[1::2]:
            assert response.json()["choices"][0]["message"] == expected
    finally:
        engine.close()


def test_good_clients_among_hostile_ones_get_right_answers(tmp_path):
    model, processor = tiny_model()
    save(model, processor, tmp_path / "model")
    write_records(tmp_path)
    program = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"
    command = [sys.executable, str(program), str(tmp_path / "model"), str(tmp_path / "data.json")]
    command += ["--clients", "8", "--hostile", "16", "--seconds", "20", "--questions", "12"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "errors 0, wrong answers 0" in result.stdout
    assert "tiny: 200" in result.stdout
