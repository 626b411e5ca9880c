"""One request's failure, text or settings do not reach the answers of the others."""

import functools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from helpers.clients import complete, get_text, make_image, make_messages, openai, post, request
from helpers.engine_checks import randomize_fusion
from helpers.example_bases import build_example_base

from sparsecut import upgrade
from sparsecut.chat_templates.rendering import _render
from sparsecut.prompts import list_media_tokens
from sparsecut.schema import UserError
from sparsecut.serving.engine import Engine

TEXTS = ["what is it", "is it a cat", "red", "are you sure a b c d"]


def ask_at_once(engine, client, *requests: dict) -> list:
    """The responses or errors of requests that share a batch."""
    release = threading.Event()
    is_held = threading.Event()
    engine.run(lambda: is_held.set() or release.wait(30))
    is_held.wait()

    def ask(settings: dict):
        try:
            response = complete(client, **settings)
            if settings.get("stream"):
                return "".join(c.choices[0].delta.content or "" for c in response if c.choices)
            return get_text(response)
        except openai.APIError as error:
            return error

    with ThreadPoolExecutor(len(requests)) as pool:
        futures = [pool.submit(ask, settings) for settings in requests]
        while len(engine.waiting) < len(requests):
            threading.Event().wait(0.01)
        release.set()
        return [future.result() for future in futures]


def make_requests() -> list[dict]:
    """Good requests, half of them streams, one drawn with a seed."""
    requests = []
    for i, text in enumerate(TEXTS):
        messages = make_messages(text, *[make_image(7 * i)] * (i % 2))
        requests.append({"messages": messages, "stream": i > 1, "max_tokens": 12})
    requests[0] |= {"temperature": 1, "seed": 5}
    return requests


TINY = [
    {"temperature": 1e-40},
    {"temperature": 5e-324},
    {"temperature": 1e-7, "top_p": 1e-300},
    {"temperature": 2, "top_p": 5e-324},
]


@pytest.mark.parametrize("settings", TINY)
def test_tiny_settings_take_the_likeliest_token(engine, client, settings):
    good = make_requests()
    expected = ask_at_once(engine, client, *good)
    hostile = {"messages": make_messages("what is it"), "max_tokens": 6}
    greedy = get_text(complete(client, **hostile))
    answers = ask_at_once(engine, client, {**hostile, **settings}, *good)
    assert answers == [greedy, *expected]


@pytest.mark.parametrize("step", [0, 3])
def test_the_model_fails_at_one_request_of_a_batch_and_the_others_are_answered(
    engine, client, monkeypatch, caplog, step
):
    good = make_requests()
    expected = ask_at_once(engine, client, *good)
    hostile = {"messages": make_messages("dog dog dog")}
    prompt = engine.runner.reader.build_prompt([{"role": "user", "content": "dog dog dog"}])
    run, forward = engine.runner.generate, engine.model.language_model.forward
    state = SimpleNamespace(is_poisoned=False, num_steps=0)

    def generate(rows, prompts, **settings):
        state.is_poisoned = prompt in prompts
        state.num_steps = 0
        run(rows, prompts=prompts, **settings)

    def fail(*args, **kwargs):
        state.num_steps += 1
        if state.is_poisoned and state.num_steps > step:
            raise RuntimeError("a secret of the machine")
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.runner, "generate", generate)
    monkeypatch.setattr(engine.model.language_model, "forward", fail)
    before = engine.counts["failed"]
    answers = ask_at_once(engine, client, *good, hostile)
    assert answers[:-1] == expected
    assert engine.counts["failed"] == before + 1
    error = answers[-1]
    assert isinstance(error, openai.InternalServerError)
    assert "RuntimeError" in str(error)
    assert "secret" not in str(error)
    logged = [record for record in caplog.records if record.exc_info]
    assert error.request_id in logged[-1].getMessage()
    assert error.request_id in str(error)
    assert "secret" in str(logged[-1].exc_info[1])


def test_scores_that_are_not_finite_end_one_row_alone(engine, client, monkeypatch):
    good = make_requests()
    expected = ask_at_once(engine, client, *good)
    hostile = {"messages": make_messages("dog dog dog"), "stream": True}
    forward = engine.model.forward

    @functools.wraps(forward)
    def spoil(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[-1] = float("nan")
        return output

    monkeypatch.setattr(engine.model, "forward", spoil)
    answers = ask_at_once(engine, client, *good, hostile)
    failed = [i for i, answer in enumerate(answers) if isinstance(answer, openai.APIError)]
    assert len(failed) == 1  # the batch's last row, whoever came last
    kept = [i for i in range(len(good)) if i not in failed]
    assert [answers[i] for i in kept] == [expected[i] for i in kept]


def test_a_failure_outside_of_the_model_has_an_id_too(client, monkeypatch, caplog):
    monkeypatch.setattr("sparsecut.serving.server.build_conversation", lambda *args: 1 / 0)
    with pytest.raises(openai.InternalServerError) as error:
        complete(client, make_messages("a"))
    failures = [record for record in caplog.records if record.exc_info]
    assert len(failures) == 1
    assert error.value.request_id in failures[0].getMessage()
    assert error.value.request_id in str(error.value)
    assert failures[0].levelno == logging.ERROR


def test_every_response_has_an_id(client):
    ids = {request(client, path).headers["x-request-id"] for path in ("health", "none", "health")}
    assert len(ids) == 3


# ---- special tokens in texts

QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
MEDIA_TOKENS = {
    "<image>", "<video>", "<|audio|>", "<|AUDIO|>", "[IMG]", "[IMG_BREAK]", "<image_soft_token>",
    "<start_of_image>", "<end_of_audio>", "<fake_token_around_image>", "<row_1_col_2>",
    "<im_patch>",
    "<global-img>", "<|patch|>", "<|tile_x_separator|>", "</image>", "<|media_pad|>", *QWEN,
}  # fmt: skip
PLAIN_TOKENS = {
    "<loc0001>",
    "<patch_index_0001>",
    "<|box_start|>",
    "<|im_end|>",
    "<seg001>",
    "</s>",
}


class FakeTokenizer:
    """A tokenizer that has some added tokens."""

    def __init__(self, tokens):
        self.tokens = sorted(tokens)
        self.added_tokens_decoder = {
            i: SimpleNamespace(content=token) for i, token in enumerate(self.tokens)
        }

    def __len__(self):
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[id] for id in ids]


def test_tokens_of_images_video_and_audio_are_found():
    others = {"<|endoftext10|>", "<|endoftext11|>", "<eoss>"}
    tokenizer = FakeTokenizer(MEDIA_TOKENS | PLAIN_TOKENS | others)
    processor = SimpleNamespace(
        tokenizer=tokenizer,
        image_token="<image>",
        image_start_token="<eoss>",
        fake_image_token=None,
        num_image_tokens=5,
    )
    config = {
        "vision_config": {"patch_size": 3, "audio_token_id": 10**9},
        "text_config": {"image_token_index": tokenizer.tokens.index("<|endoftext10|>")},
        "eoa_token_id": tokenizer.tokens.index("<|endoftext11|>"),
        "eos_token_id": tokenizer.tokens.index("</s>"),
        "id2label": {0: "image"},
    }
    found = list_media_tokens(processor, SimpleNamespace(to_dict=lambda: config))
    assert found == MEDIA_TOKENS | others


@pytest.fixture(scope="module")
def qwen():
    base, processor = build_example_base("qwen")
    model, processor = upgrade(base, processor=processor)
    engine = Engine(randomize_fusion(model), processor, max_batch=8)
    yield engine
    engine.close()


def test_special_tokens_of_a_base_are_refused_in_texts(qwen):
    from helpers.clients import start_server

    with start_server(qwen) as client:
        known = qwen.processor.tokenizer.get_vocab()
        tokens = [token for token in QWEN if token in known]
        assert len(tokens) > 2
        for token in tokens:
            halves = [{"type": "text", "text": part} for part in (token[:4], token[4:])]
            for content in (f"a{token}b", halves):
                for role in ("user", "assistant", "system"):
                    messages = [{"role": role, "content": content}, *make_messages("red")]
                    with pytest.raises(openai.BadRequestError) as error:
                        complete(client, messages)
                    assert token in str(error.value)
        parts = [{"type": "text", "text": part} for part in ("< |image_pad| >", "<|image_")]
        assert complete(client, [{"role": "user", "content": parts}]).choices


def test_a_placeholder_in_two_parts_is_refused(client):
    parts = [{"type": "text", "text": part} for part in ("<ima", "ge>")]
    with pytest.raises(openai.BadRequestError, match="<image>"):
        complete(client, [{"role": "user", "content": parts}])
    image = make_messages("a", make_image(1))[0]["content"][0]
    content = [parts[0], image, parts[1]]
    assert complete(client, [{"role": "user", "content": content}]).choices


# ---- long texts


def test_a_text_that_is_far_too_long_is_refused_after_a_part_of_it(engine):
    reader = engine.runner.reader
    sizes = []
    copies = [reader.copies.get() for _ in range(reader.copies.qsize())]
    for processor in copies:
        tokenizer = processor.tokenizer

        def watch(text, tokenizer=tokenizer, **settings):
            sizes.append(len(text))
            return tokenizer(text, **settings)

        watch.__dict__.update(vars(tokenizer), chat_template=tokenizer.chat_template)
        watch.special_tokens_map = tokenizer.special_tokens_map
        reader.copies.put(SimpleNamespace(tokenizer=watch, **_list_attributes(processor)))
    try:
        with pytest.raises(UserError, match="tokens of the language model"):
            reader.build_prompt([{"role": "user", "content": "a b " * 250_000}])
    finally:
        while not reader.copies.empty():
            reader.copies.get()
        for processor in copies:
            reader.copies.put(processor)
    assert 0 < sum(sizes) < 50_000


def _list_attributes(processor) -> dict:
    names = ("chat_template", "image_token", "num_views", "num_image_tokens")
    return {name: getattr(processor, name) for name in names}


def test_the_model_does_not_wait_for_somebody_elses_text(engine, client):
    reader = engine.runner.reader
    prepared = engine.prepare([{"role": "user", "content": "red"}], [], _greedy())
    copies = [reader.copies.get() for _ in range(reader.copies.qsize())]  # all are at work
    ended = threading.Event()
    try:
        engine.submit(prepared, lambda delta: ended.set() if delta is None else None)
        assert ended.wait(20)
    finally:
        for processor in copies:
            reader.copies.put(processor)


def _greedy():
    from sparsecut.serving.decoding import SamplingParams

    return SamplingParams(max_new_tokens=2, temperature=0)


def test_texts_of_strangers_are_not_kept(client):
    before = _render.cache_info().currsize
    for i in range(5):
        complete(client, make_messages(f"red {i}"), max_tokens=1)
    assert _render.cache_info().currsize == before


def test_numbers_and_depths_that_python_cannot_write_are_refused(client):
    deep = "[" * 900 + "]" * 900
    long_number = "9" * 4200
    for key in ("tools", "temperature", "seed", "unknown", "messages", "stop", "top_p", "n"):
        for value in (deep, long_number, "1e999", f"-{long_number}", '"\\ud83d"'):
            response = post(client, f'{{"messages": [], "{key}": {value}}}')
            assert response.status_code == 400, (key, value[:9])


def test_images_that_wait_stay_within_the_memory(engine, client, monkeypatch):
    size = engine.prepare_image(make_image(0)).num_bytes
    assert size > 0
    monkeypatch.setattr("sparsecut.serving.engine.MAX_WAITING_BYTES", 2 * size)
    requests = [{"messages": make_messages("red", make_image(i))} for i in range(3)]
    release, is_held = threading.Event(), threading.Event()
    engine.run(lambda: is_held.set() or release.wait(30))
    is_held.wait()
    with ThreadPoolExecutor(3) as pool:
        first = [pool.submit(complete, client, **settings) for settings in requests[:2]]
        while len(engine.waiting) < 2:
            threading.Event().wait(0.01)
        with pytest.raises(openai.RateLimitError):
            complete(client, **requests[2])
        release.set()
        assert all(future.result().choices for future in first)
    assert complete(client, make_messages("a", *[make_image(i) for i in range(4)])).choices
