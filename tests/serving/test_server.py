"""The server with OpenAI's own client: answers, streams, limits, and clients that leave."""

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.clients import (
    SETTINGS,
    answer_alone,
    complete,
    get_text,
    make_image,
    make_messages,
    openai,
    post,
    request,
    start_server,
)
from helpers.tiny import tiny_model

from sparsecut.prompts import make_greedy_config, prepare_inputs, render_prompt
from sparsecut.serving.engine import Engine
from sparsecut.serving.image_fetching import ImageLimits
from sparsecut.serving.protocol import RequestLimits


def answer(engine, text: str, *images, length: int = 6) -> str:
    """What the model answers by itself, without the engine."""
    messages = [{"role": "user", "content": "<image>\n" * len(images) + text}]
    return answer_alone(engine.model, engine.processor, messages, list(images), length)


def read_metrics(client) -> dict[str, float]:
    """The values of /metrics by name, without the prefix."""
    values = {}
    for line in request(client, "metrics").text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            values[name.removeprefix("sparsecut_")] = float(value)
    return values


def test_one_request_gets_the_models_own_answer(engine, client):
    response = complete(client, make_messages("what is it", make_image(0)))
    assert get_text(response) == answer(engine, "what is it", make_image(0))
    assert response.choices[0].finish_reason in ("stop", "length")
    usage = response.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 1 <= usage.completion_tokens <= 6
    assert usage.prompt_tokens > engine.processor.num_image_tokens
    response = complete(client, make_messages("are you sure"))
    assert get_text(response) == answer(engine, "are you sure")


def test_32_clients_at_once_get_what_each_would_get_alone(engine, client):
    texts = ["what is it", "is it a cat or a dog", "red", "are you sure a b c d one two three"]
    questions = []
    for i in range(16):
        images = [make_image(7 * i)] * (i % 3)
        questions.append((texts[i % 4] + " a" * (i % 3), images))
    expected = [answer(engine, text, *images) for text, images in questions]
    before = engine.counts.copy()

    def ask(question) -> str:
        text, images = question
        return get_text(complete(client, make_messages(text, *images)))

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, questions * 2))
    assert answers == expected * 2
    assert len(set(expected)) > 4  # the model does not answer alike to all
    assert engine.counts["batches"] - before["batches"] < 32  # some were answered together


def test_a_stream_is_the_same_answer_in_pieces(client):
    messages = make_messages("what is it", make_image(3))
    settings = {"max_tokens": 12, "n": 2, "logprobs": True}
    whole = complete(client, messages, **settings)
    options = {"include_usage": True}
    chunks = list(complete(client, messages, stream=True, stream_options=options, **settings))
    for i, choice in enumerate(whole.choices):
        parts = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == i]
        text = "".join(part.delta.content or "" for part in parts)
        assert text == choice.message.content
        assert parts[0].delta.role == "assistant"
        assert parts[-1].finish_reason == choice.finish_reason
        tokens = [t.token for part in parts if part.logprobs for t in part.logprobs.content]
        assert tokens == [t.token for t in choice.logprobs.content]
    assert len(chunks) > 4
    assert chunks[-1].usage == whole.usage


def test_logprobs_are_the_models(engine, client):
    messages = make_messages("what is it", make_image(3))
    response = complete(client, messages, logprobs=True, top_logprobs=3, max_tokens=1)
    (entry,) = response.choices[0].logprobs.content
    processor = engine.processor
    model = engine.model
    prompt = render_prompt(processor, [{"role": "user", "content": "<image>\nwhat is it"}])
    inputs = prepare_inputs(model, processor, [prompt], [[make_image(3)]])
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            generation_config=make_greedy_config(model, 1),
            return_dict_in_generate=True,
            output_scores=True,
        )
    best = output.scores[0][0].log_softmax(-1).topk(3)
    logprobs = [token.logprob for token in entry.top_logprobs]
    assert logprobs == pytest.approx(best.values.tolist(), abs=1e-5)
    assert entry.token == processor.tokenizer.decode([int(best.indices[0])])
    assert entry.bytes == list(entry.token.encode())


def test_a_seed_repeats_an_answer_whatever_else_is_running(client):
    def draw(**changes):
        settings = {"temperature": 1.5, "seed": 4, "n": 3, "max_tokens": 8, **changes}
        response = complete(client, make_messages("what is it"), **settings)
        return [choice.message.content for choice in response.choices]

    first = draw()
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda seed: draw(seed=seed), [4, 5, 6, 4, 7, 8]))
    assert together[0] == together[3] == first
    assert len(set(first)) > 1
    assert together[1] != first
    (greedy,) = draw(temperature=0, n=1)
    assert draw(temperature=1e-9) == [greedy] * 3
    assert draw(temperature=2, top_p=1e-6) == [greedy] * 3


def test_a_stop_string_ends_the_answer_before_it(client):
    messages = make_messages("what is it")
    whole = get_text(complete(client, messages, max_tokens=12))
    words = whole.split()
    stop = next(word for word in words[1:] if word != words[0])
    settings = {"max_tokens": 12, "stop": [stop, "never"]}
    cut = complete(client, messages, logprobs=True, **settings).choices[0]
    assert cut.message.content == whole[: whole.index(stop)].rstrip()
    assert cut.finish_reason == "stop"
    assert "".join(t.token for t in cut.logprobs.content) in whole.replace(" ", "")
    chunks = complete(client, messages, stream=True, max_tokens=12, stop=stop)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == cut.message.content


def test_an_image_that_comes_again_is_not_encoded_again(engine, client, monkeypatch):
    calls = []
    encode = engine.model.encode
    monkeypatch.setattr(engine.model, "encode", lambda *args: calls.append(1) or encode(*args))
    images = [make_image(201), make_image(202), make_image(201)]
    for _ in range(3):
        complete(client, make_messages("what is it", *images), max_tokens=1)
    assert len(calls) == 2


def test_a_shortcut_switched_off_changes_its_answers_alone(engine, client):
    def ask(shortcuts_off) -> list[str]:
        answers = []
        for text in ("what is it", "red", "cat", "dog", "a b"):
            response = complete(
                client,
                make_messages(text, make_image(9)),
                max_tokens=12,
                extra_body={"shortcuts_off": shortcuts_off},
            )
            answers.append(get_text(response))
        return answers

    with ThreadPoolExecutor(3) as pool:
        without, whole, again = pool.map(ask, [[1, 2], [], []])
    assert whole == again != without
    with engine.model.fusion.switched_off(1, 2):
        assert without[0] == answer(engine, "what is it", make_image(9), length=12)


def test_errors_are_those_that_openais_client_knows(client):
    with pytest.raises(openai.NotFoundError) as error:
        complete(client, make_messages("a"), model="gpt")
    assert "'gpt'" in str(error.value)
    assert "'tiny'" in str(error.value)
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        client.get("/nothing", cast_to=object)
    with pytest.raises(openai.NotFoundError, match="'gpt'"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        complete(client, make_messages("a"), temperature=7)
    assert "JSON" in post(client, "{not json").json()["error"]["message"]
    assert post(client, "[" * 100000).status_code == 400
    assert post(client, "{}", content_type="text/plain").status_code == 415
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    packed = request(client, "v1/chat/completions", content=b"{}", headers=headers)
    assert packed.status_code == 415
    assert "gzip" in packed.json()["error"]["message"]
    assert len(request(client, "a" * 50000).text) < 1000


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


@pytest.fixture(scope="module")
def small():
    """A small engine: one answer at a time, one request that waits, few bytes of features."""
    model, processor = tiny_model()
    num_bytes = 4 * 24 * 4 * (1 + len(model.plan.layers))  # features of one image
    engine = Engine(model, processor, max_batch=1, max_queue=1, cache_bytes=3 * num_bytes)
    limits = {
        "token": "secret",
        "max_request_bytes": 20000,
        "image_limits": ImageLimits(max_pixels=1000),
        "request_limits": RequestLimits(max_tokens=400),
    }
    with start_server(engine, **limits) as client:
        client.engine = engine
        yield client
    engine.close()


def test_cached_features_stay_within_their_bytes(small):
    cache = small.engine.runner.feature_cache
    for i in range(8):
        complete(small, make_messages("red", make_image(i)), max_tokens=1)
    assert 0 < len(cache.entries) <= 3
    assert 0 < cache.num_bytes <= cache.max_bytes


def test_a_token_is_required_where_one_is_set(small):
    assert complete(small, make_messages("a")).choices
    stranger = small.with_options(api_key="guess")
    with pytest.raises(openai.AuthenticationError, match="token"):
        complete(stranger, make_messages("a"))
    with pytest.raises(openai.AuthenticationError):
        stranger.get("../metrics", cast_to=object)
    for header, status in {
        "bearer secret": 200,
        "BEARER  secret": 200,
        "secret": 401,
        "Basic secret": 401,
        "Bearer Secret": 401,
        "Bearer": 401,
    }.items():
        response = request(small, "v1/models", headers={"Authorization": header})
        assert response.status_code == status, header


def test_what_is_too_large_is_refused(small):
    with pytest.raises(openai.APIStatusError, match="20000") as error:
        complete(small, make_messages("a " * 20000))
    assert error.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="40 x 40"):
        complete(small, make_messages("a", make_image(0).resize((40, 40))))
    with pytest.raises(openai.BadRequestError, match="400"):
        complete(small, make_messages("a"), max_tokens=401)


def test_a_request_beyond_the_queue_is_refused(small):
    release = threading.Event()
    is_held = threading.Event()
    small.engine.run(lambda: is_held.set() or release.wait())
    is_held.wait()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete, small, make_messages("a"))
        while not small.engine.waiting:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as error:
            complete(small, make_messages("b"))
        assert error.value.response.headers["retry-after"] == "1"
        release.set()
        assert waiting.result().choices


def test_a_client_that_leaves_ends_its_answer(engine, client, monkeypatch):
    before = engine.counts["cancelled"]
    forward = engine.model.language_model.forward
    slow = lambda *args, **kwargs: time.sleep(0.02) or forward(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(engine.model.language_model, "forward", slow)
    monkeypatch.setattr(engine.runner, "end_ids", set())
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", None)
    stream = complete(client, make_messages("what is it"), max_tokens=1000, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        complete(client, make_messages("what is it"), max_tokens=1000, timeout=0.3)
    deadline = time.monotonic() + 20
    while engine.counts["cancelled"] < before + 2 or engine.num_running:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert engine.counts["cancelled"] == before + 2


def test_a_client_that_leaves_while_it_sends_is_no_failure(client, caplog):
    server_errors = 'responses_total{status="500"}'
    before = read_metrics(client).get(server_errors)
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
        b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(head)
    while read_metrics(client)["requests_in_flight"]:
        time.sleep(0.01)
    assert read_metrics(client).get(server_errors) == before
    assert "Traceback" not in caplog.text


def test_a_failure_of_the_model_is_sent_and_the_next_request_goes_well(engine, client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "generate", lambda **kwargs: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            complete(client, make_messages("a"))
        with pytest.raises(openai.APIError, match="ZeroDivisionError"):
            list(complete(client, make_messages("a"), stream=True))
    assert complete(client, make_messages("a")).choices


def test_health_and_metrics(client):
    complete(client, make_messages("a"))
    assert request(client, "health").json() == {"status": "ok"}
    with openai.DefaultHttpxClient() as web:
        assert web.head(client.base_url.join("/health")).status_code == 200
    metrics = read_metrics(client)
    assert metrics["completion_tokens_total"] > 0
    assert metrics["queue_length"] == 0
    assert metrics['responses_total{status="200"}'] > 0
    names = {name.split("{")[0] for name in metrics}
    assert {"pictures_total", "pictures_kept_total", "kept_bytes", "refused_total"} <= names


def test_the_async_client_works_too(engine, client):
    async def ask_twice() -> list:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as other:
            create = other.chat.completions.create
            requests = [create(messages=make_messages("red"), **SETTINGS) for _ in range(2)]
            return await asyncio.gather(*requests)

    texts = {get_text(response) for response in asyncio.run(ask_twice())}
    assert texts == {answer(engine, "red")}
