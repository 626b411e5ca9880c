"""Serving models of more families: the engine's answers and the page."""

import pytest
from helpers.clients import make_image, make_messages, request, start_server
from helpers.engine_checks import check_answers, make_question, randomize_fusion
from helpers.example_bases import build_example_base

from sparsecut import upgrade
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
