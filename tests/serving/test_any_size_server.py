"""A server of a model of images of any size: answers, counts of tokens, and limits over HTTP."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from helpers.any_size import LIMITS, draw_image
from helpers.clients import answer_alone, complete, get_text, make_messages, start_server
from helpers.tiny import tiny_model

from sparsecut.serving.engine import Engine
from sparsecut.serving.image_fetching import ImageLimits

SIZES = [(100, 400), (400, 100), (16, 16), (1, 500)]


@pytest.fixture(scope="module")
def wide():
    """An engine whose shortcuts change answers; an image has 4 to 30 tokens."""
    model, processor = tiny_model(**LIMITS)
    torch.manual_seed(1)
    for path in model.fusion.paths:
        torch.nn.init.normal_(path.linear_2.weight, std=2)
    engine = Engine(model, processor, max_batch=4, max_queue=20)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def wide_client(wide):
    with start_server(wide) as client:
        yield client


def test_requests_at_once_get_what_each_would_get_alone(wide, wide_client):
    questions = []
    for number in range(8):
        chosen = [SIZES[number % 4], SIZES[(number + 1) % 4]][: 1 + number % 2]
        questions.append([draw_image(*size, number) for size in chosen])
    expected = []
    for images in questions:
        content = f"{wide.processor.image_token}\n" * len(images) + "what is it"
        messages = [{"role": "user", "content": content}]
        expected.append(answer_alone(wide.model, wide.processor, messages, images))
    assert len(set(expected)) > 1
    with ThreadPoolExecutor(8) as pool:
        sent = [make_messages("what is it", *images) for images in questions]
        responses = list(pool.map(lambda messages: complete(wide_client, messages), sent))
    assert [get_text(response) for response in responses] == expected


def test_usage_counts_the_tokens_of_every_size(wide, wide_client):
    text = complete(wide_client, make_messages("what is it")).usage.prompt_tokens
    counts = []
    for size in SIZES:
        response = complete(wide_client, make_messages("what is it", draw_image(*size)))
        counts.append(response.usage.prompt_tokens - text)
    processor = wide.processor
    expected = [processor.count_tokens(processor.choose_grid(*size)) for size in SIZES]
    assert len(set(expected)) > 1
    assert {count - number for count, number in zip(counts, expected, strict=True)} == {
        counts[0] - expected[0]
    }


def test_a_prompt_is_admitted_by_the_tokens_of_its_own_images(wide, wide_client, monkeypatch):
    """Three small images fit where three large ones do not."""
    small, large = [draw_image(16, 16)] * 3, [draw_image(1, 500)] * 3
    config = wide.model.config.text_config
    used = complete(wide_client, make_messages("what is it", *small)).usage.prompt_tokens
    monkeypatch.setattr(config, "max_position_embeddings", used + 6)
    assert get_text(complete(wide_client, make_messages("what is it", *small))) is not None
    with pytest.raises(openai.BadRequestError, match="tokens"):
        complete(wide_client, make_messages("what is it", *large))


def test_limits_on_pixels_count_what_is_sent(wide):
    with start_server(wide, image_limits=ImageLimits(max_pixels=450)) as client:
        assert get_text(complete(client, make_messages("what", draw_image(1, 450)))) is not None
        with pytest.raises(openai.BadRequestError, match="450"):
            complete(client, make_messages("what", draw_image(1, 451)))
