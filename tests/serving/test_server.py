"""The server, asked by OpenAI's own client: answers, streams, limits, and what happens when clients
leave.
"""

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.clients import ASK, create, openai, picture, post, served, turn
from helpers.tiny import tiny_model
from PIL import Image

from sparsecut.prompts import decode_answers, make_greedy_config, prepare_inputs, render_prompt
from sparsecut.serving.engine import Engine
from sparsecut.serving.image_fetching import ImageLimits
from sparsecut.serving.protocol import RequestLimits


def alone(engine, text: str, *pictures: Image.Image, length: int = 6) -> str:
    """What the model answers by itself, without the engine."""
    model, processor = engine.model, engine.processor
    prompt = render_prompt(
        processor, [{"role": "user", "content": "<image>\n" * len(pictures) + text}]
    )
    inputs = prepare_inputs(model, processor, [prompt], [list(pictures)])
    with torch.inference_mode():
        return decode_answers(
            processor,
            inputs,
            model.generate(**inputs, generation_config=make_greedy_config(model, length)),
        )[0]


@pytest.fixture(scope="module")
def engine():
    model, processor = tiny_model()
    with torch.no_grad():  # else the shortcuts add nothing, and all answers are alike
        for path in model.fusion.paths:
            path.linear_2.weight.normal_(0, 2)
        for weight in model.language_model.model.layers.parameters():
            weight *= 2 if weight.dim() == 2 else 1
    engine = Engine(model, processor, max_batch=8, max_queue=40)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine):
    with served(engine) as client:
        yield client


def test_one_request_gets_the_models_own_answer(engine, client):
    response = create(client, turn("what is it", picture(0)))
    assert response.choices[0].message.content == alone(engine, "what is it", picture(0))
    assert response.choices[0].finish_reason in ("stop", "length")
    usage = response.usage
    assert (
        usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        and 1 <= usage.completion_tokens <= 6
    )
    assert usage.prompt_tokens > engine.processor.num_image_tokens
    assert create(client, turn("are you sure")).choices[0].message.content == alone(
        engine, "are you sure"
    )


def test_32_clients_at_once_get_what_each_would_get_alone(engine, client):
    words = ["what is it", "is it a cat or a dog", "red", "are you sure a b c d one two three"]
    questions = [(words[i % 4] + " a" * (i % 3), [picture(7 * i)] * (i % 3)) for i in range(32)]
    wanted = [alone(engine, text, *pictures) for text, pictures in questions]
    before = engine.counts.copy()

    def ask(question) -> list[str]:
        return [
            create(client, turn(question[0], *question[1])).choices[0].message.content
            for _ in range(3)
        ]

    with ThreadPoolExecutor(32) as pool:
        for answers, one in zip(pool.map(ask, questions), wanted, strict=True):
            assert answers == [one] * 3
    assert len(set(wanted)) > 4  # the model does not say the same to all
    assert engine.counts["batches"] - before["batches"] < 96  # some were answered together


def test_a_stream_is_the_same_answer_in_pieces(client):
    messages = turn("what is it", picture(3))
    whole = create(client, messages, max_tokens=12, n=2, logprobs=True)
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "n": 2}
    chunks = list(create(client, messages, max_tokens=12, **options))
    for i, choice in enumerate(whole.choices):
        of = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == i]
        assert "".join(c.delta.content or "" for c in of) == choice.message.content
        assert of[0].delta.role == "assistant" and of[-1].finish_reason == choice.finish_reason
        tokens = [t.token for c in of if c.logprobs for t in c.logprobs.content]
        assert tokens == [t.token for t in choice.logprobs.content]
    assert len(chunks) > 4 and chunks[-1].usage == whole.usage


def test_logprobs_are_the_models(engine, client):
    response = create(
        client, turn("what is it", picture(3)), logprobs=True, top_logprobs=3, max_tokens=1
    )
    (entry,) = response.choices[0].logprobs.content
    processor, model = engine.processor, engine.model
    prompt = render_prompt(processor, [{"role": "user", "content": "<image>\nwhat is it"}])
    inputs = prepare_inputs(model, processor, [prompt], [[picture(3)]])
    settings = {
        "generation_config": make_greedy_config(model, 1),
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    with torch.inference_mode():
        logits = model.generate(**inputs, **settings).scores[0][0]
    best = logits.log_softmax(-1).topk(3)
    assert [t.logprob for t in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert entry.token == processor.tokenizer.decode(
        [int(best.indices[0])]
    ) and entry.bytes == list(entry.token.encode())


def test_a_seed_repeats_an_answer_whatever_else_is_asked(client):
    def draw(**more):
        settings = {"temperature": 1.5, "seed": 4, "n": 3, "max_tokens": 8, **more}
        return [c.message.content for c in create(client, turn("what is it"), **settings).choices]

    first = draw()
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda seed: draw(seed=seed), [4, 5, 6, 4, 7, 8]))
    assert together[0] == together[3] == first
    assert len(set(first)) > 1 and together[1] != first
    assert draw(temperature=1e-9) == [draw(temperature=0, n=1)[0]] * 3
    assert draw(temperature=2, top_p=1e-6) == [draw(temperature=0, n=1)[0]] * 3


def test_a_stop_string_ends_the_answer_before_it(client):
    messages = turn("what is it")
    whole = create(client, messages, max_tokens=12).choices[0].message.content
    words = whole.split()
    stop = next(w for w in words[1:] if w != words[0])
    cut = create(client, messages, max_tokens=12, stop=[stop, "never"], logprobs=True).choices[0]
    assert (
        cut.message.content == whole[: whole.index(stop)].rstrip() and cut.finish_reason == "stop"
    )
    assert "".join(t.token for t in cut.logprobs.content) in whole.replace(" ", "")
    pieces = create(client, messages, max_tokens=12, stop=stop, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == cut.message.content


def test_a_picture_that_comes_again_is_not_encoded_again(engine, client, monkeypatch):
    calls = []
    encode = engine.model.encode
    monkeypatch.setattr(engine.model, "encode", lambda pixels: calls.append(1) or encode(pixels))
    for _ in range(3):
        create(client, turn("what is it", picture(201), picture(202), picture(201)))
    assert len(calls) == 2


def test_kept_features_stay_within_their_bytes():
    model, processor = tiny_model()
    features = sum(f.nbytes for f in (torch.zeros(4, 24),) * (1 + len(model.plan.layers)))
    engine = Engine(model, processor, cache_bytes=3 * features)
    try:
        with served(engine) as client:
            for i in range(8):
                create(client, turn("red", picture(i)), max_tokens=1)
            assert 0 < len(engine.kept.found) <= 3 and engine.kept.size <= 3 * features
    finally:
        engine.close()


def test_a_shortcut_switched_off_changes_the_answer_and_only_that_one(engine, client):
    def ask(off):
        return [
            create(client, turn(w, picture(9)), max_tokens=12, extra_body={"shortcuts_off": off})
            .choices[0]
            .message.content
            for w in ("what is it", "red", "cat", "dog", "a b")
        ]

    with ThreadPoolExecutor(3) as pool:
        some, none, again = pool.map(ask, [[1, 2], [], []])
    assert none == again != some
    with engine.model.fusion.switched_off(1, 2):
        assert some[0] == alone(engine, "what is it", picture(9), length=12)


def test_what_is_not_there_is_said_in_openais_words(client):
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        create(client, turn("a"), model="gpt")
    with pytest.raises(openai.NotFoundError, match="this server has POST"):
        client.get("/nothing", cast_to=object)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        create(client, turn("a"), temperature=7)
    assert (
        post(client, "{not json").json()["error"]["message"].startswith("the request is not JSON")
    )
    assert post(client, "[" * 100000).status_code == 400
    assert post(client, "{}", **{"Content-Type": "text/plain"}).status_code == 415
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve(
        "tiny"
    ).object == "model"


def test_limits_and_token():
    model, processor = tiny_model()
    engine = Engine(model, processor, max_batch=1, max_queue=1)
    settings = {
        "token": "secret",
        "max_request_bytes": 20000,
        "pictures": ImageLimits(max_pixels=1000),
        "bounds": RequestLimits(max_tokens=400),
    }
    try:
        with served(engine, **settings) as client:
            assert create(client, turn("a")).choices
            with pytest.raises(openai.AuthenticationError, match="bearer token"):
                create(client.with_options(api_key="guess"), turn("a"))
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="guess").get("../metrics", cast_to=object)
            with pytest.raises(openai.APIStatusError, match="more than 20000 bytes") as caught:
                create(client, turn("a " * 20000))
            assert caught.value.status_code == 413
            with pytest.raises(openai.BadRequestError, match="40 x 40 pixels"):
                create(client, turn("a", picture(0).resize((40, 40))))
            hold, held = threading.Event(), threading.Event()
            engine.run(lambda: held.set() or hold.wait())
            held.wait()
            with ThreadPoolExecutor(2) as pool:
                waiting = pool.submit(create, client, turn("a"))
                while not engine.waiting:
                    time.sleep(0.01)
                with pytest.raises(openai.RateLimitError, match="wait already"):
                    create(client, turn("b"))
                hold.set()
                assert waiting.result().choices
    finally:
        engine.close()


def test_a_client_that_leaves_ends_its_answer(engine, client, monkeypatch):
    before = engine.counts["cancelled"]
    forward = engine.model.language_model.forward
    slow = lambda *args, **kwargs: time.sleep(0.02) or forward(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(engine.model.language_model, "forward", slow)
    monkeypatch.setattr(engine, "ends", set())
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", None)
    stream = create(client, turn("what is it"), max_tokens=1000, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        create(client, turn("what is it"), max_tokens=1000, timeout=0.3)
    until = time.monotonic() + 20
    while (
        engine.counts["cancelled"] < before + 2 or engine.num_running
    ) and time.monotonic() < until:
        time.sleep(0.02)
    assert engine.counts["cancelled"] == before + 2 and engine.num_running == 0


def test_a_failure_of_the_model_is_told_and_the_next_request_goes_well(engine, client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "generate", lambda **kwargs: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            create(client, turn("a"))
        with pytest.raises(openai.APIError, match="ZeroDivisionError"):
            list(create(client, turn("a"), stream=True))
    assert create(client, turn("a")).choices


def test_health_and_metrics(client):
    create(client, turn("a"))
    with openai.DefaultHttpxClient() as web:
        root = str(client.base_url).removesuffix("v1/")
        assert web.get(f"{root}health").json() == {"status": "ok"}
        text = web.get(f"{root}metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert (
        float(values["sparsecut_completion_tokens_total"]) > 0
        and float(values["sparsecut_queue_length"]) == 0
    )
    assert float(values['sparsecut_responses_total{status="200"}']) > 0


def test_the_async_client_works_too(engine, client):
    async def ask():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none") as other:
            return await asyncio.gather(
                *[other.chat.completions.create(messages=turn("red"), **ASK) for _ in range(4)]
            )

    assert {r.choices[0].message.content for r in asyncio.run(ask())} == {alone(engine, "red")}


def test_a_client_that_leaves_while_it_sends_is_no_failure(client, caplog):
    root = client.base_url
    before = _counted(client, 'responses_total{status="500"}')
    with socket.create_connection((root.host, root.port)) as sent:
        sent.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type:"
            b" application/json\r\nContent-Length: 99\r\n\r\n{"
        )
    while _counted(client, "requests_in_flight"):
        time.sleep(0.01)
    assert (
        _counted(client, 'responses_total{status="500"}') == before
        and "Traceback" not in caplog.text
    )


def _counted(client, name: str) -> int:
    text = openai.DefaultHttpxClient().get(str(client.base_url).replace("v1/", "metrics")).text
    return sum(
        int(line.split()[-1]) for line in text.splitlines() if line.startswith(f"sparsecut_{name} ")
    )
