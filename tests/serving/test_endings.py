"""How answers, requests and servers end."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.clients import complete, get_text, make_messages, openai

from sparsecut.serving import connections
from sparsecut.serving.admission import ServerConfig
from sparsecut.serving.connections import EndingServer
from sparsecut.serving.decoding import GenerationRow, SamplingParams
from sparsecut.serving.engine import Engine
from sparsecut.serving.server import make_app

WORDS = "red c yes a cat c you sure c no"


def write(engine, words: str, stop: tuple[str, ...]) -> tuple[list[str], GenerationRow]:
    """The pieces in which an answer of these words is sent."""
    pieces = []
    tokenizer = engine.processor.tokenizer
    sampling = SamplingParams(100, temperature=0, stop=stop)
    row = GenerationRow(0, sampling, tokenizer, set(), lambda delta: pieces.append(delta.text))
    for token in tokenizer(words, add_special_tokens=False)["input_ids"]:
        if row.finish_reason is None:
            row._append(token)
    return pieces, row


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
def test_an_answer_before_a_stop_string_has_no_outer_whitespace(engine, length):
    whole, _ = write(engine, WORDS, ())
    text = "".join(whole)
    assert len(whole) > 5
    for start in range(len(text) - length):
        stop = text[start : start + length]
        pieces, row = write(engine, WORDS, (stop, "never"))
        if stop.strip():
            assert "".join(pieces) == text[: text.index(stop)].strip()
            assert row.finish_reason == "stop"


def collect(engine, text: str, length: int, events: list) -> None:
    """Put a request into the queue; its name and every delta come into `events`."""
    messages = [{"role": "user", "content": text}]
    request = engine.prepare(messages, [], SamplingParams(length, temperature=0))
    engine.submit(request, lambda delta: events.append((text, delta)))


@pytest.fixture
def endless(engine, monkeypatch):
    """The engine, whose answers end only by their length."""
    monkeypatch.setattr(engine.runner, "end_ids", set())
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", None)
    return engine


def test_a_request_ends_before_longer_ones_of_its_batch(endless):
    events = []
    release = threading.Event()
    endless.run(release.wait)
    before = endless.counts["batches"]
    collect(endless, "red", 3, events)
    collect(endless, "what is it", 40, events)
    release.set()
    while ("what is it", None) not in events:
        time.sleep(0.01)
    end = events.index(("red", None))
    assert [name for name, _ in events[end + 1 :]].count("what is it") > 5
    assert events.count(("red", None)) == events.count(("what is it", None)) == 1
    assert endless.counts["batches"] == before + 1


@pytest.fixture
def ending(endless, monkeypatch):
    """(server, engine, client): an engine of its own, whose every token takes a while."""
    forward = endless.model.language_model.forward
    slow = lambda *args, **kwargs: time.sleep(0.02) or forward(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(endless.model.language_model, "forward", slow)
    monkeypatch.setattr(connections, "FINISH_SECONDS", 1.0)
    engine = Engine(endless.model, endless.processor, max_batch=3)
    monkeypatch.setattr(engine.runner, "end_ids", set())
    server = EndingServer(make_app(engine, ServerConfig(name="tiny")), engine.close)
    server.config.port = 0
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield server, engine, client
    server.should_exit = True
    thread.join()
    engine.close()


def test_every_client_hears_that_the_server_ends(ending):
    server, engine, client = ending
    messages = make_messages("what is it")

    def ask(length: int, stream: bool = False):
        try:
            answer = complete(client, messages, max_tokens=length, stream=stream)
            return list(answer) if stream else get_text(answer)
        except openai.APIError as error:
            return error

    release = threading.Event()
    engine.run(release.wait)
    questions = [{"length": 10}, {"length": 900}, {"length": 900, "stream": True}, {"length": 5}]
    with ThreadPoolExecutor(len(questions)) as pool:
        futures = []
        for question in questions:  # the last one does not fit into the batch
            futures.append(pool.submit(ask, **question))
            while len(engine.waiting) < len(futures):
                time.sleep(0.01)
        release.set()
        while engine.num_running < engine.max_batch:
            time.sleep(0.01)
        server.should_exit = True
        short, *others = [future.result() for future in futures]
    assert short
    for failure in others:
        assert isinstance(failure, openai.APIError)
        assert not isinstance(failure, openai.APIConnectionError), repr(failure)
        assert "shutting down" in str(failure)
