"""A request of anything is answered or refused in a sentence, and nobody else's answer changes."""

import json

import pytest
from helpers.clients import SETTINGS, complete, get_text, make_image, make_messages, post
from helpers.fuzzing import JUNK, TEXTS, draw_changed, draw_damaged, mostly
from hypothesis import strategies as st

from sparsecut.serving.engine import Engine

REFUSALS = (400, 404, 413, 415, 422, 429)
KEYS = st.one_of(
    TEXTS,
    st.sampled_from(
        [
            "n",
            "seed",
            "stop",
            "top_p",
            "stream",
            "logprobs",
            "top_logprobs",
            "shortcuts_off",
            "logit_bias",
            "chat_template_kwargs",
        ]
    ),
)
MESSAGES = make_messages("what is it", make_image(1))
BODY = {
    **SETTINGS,
    "messages": [
        {"role": "user", "content": "is it a cat"},
        {"role": "assistant", "content": "no"},
        *MESSAGES,
    ],
    "top_p": 0.9,
    "n": 1,
    "stop": ["red"],
    "seed": 3,
    "logprobs": True,
    "top_logprobs": 2,
}
TEMPERATURES = st.one_of(
    st.floats(0, 2), st.sampled_from([0, 1e-40, 1e-320, 5e-324, 1e-8, 2, 1e-3, 10**400])
)


@pytest.fixture(scope="module")
def server():
    """OpenAI's client of a server of a tiny model."""
    from helpers.clients import start_server
    from helpers.tiny import tiny_model

    engine = Engine(*tiny_model(), max_batch=4, max_queue=20)
    with start_server(engine) as client:
        yield client
    engine.close()


def check_response(response) -> None:
    """It is an answer or a refusal, both as OpenAI's clients read them."""
    assert response.status_code == 200 or response.status_code in REFUSALS, response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    elif response.headers["content-type"].startswith("application/json"):
        assert response.json()["choices"]


def test_bodies(fuzz, server):
    expected = get_text(complete(server, MESSAGES))

    def check(body):
        check_response(post(server, json.dumps(body)))
        assert get_text(complete(server, MESSAGES)) == expected

    fuzz(check, draw_changed(BODY, words=KEYS))


def test_sampling(fuzz, server):
    fields = st.fixed_dictionaries(
        {"temperature": TEMPERATURES},
        optional={
            "top_p": mostly(st.floats(1e-9, 1)),
            "seed": mostly(st.integers(-(2**63), 2**63)),
            "n": st.integers(1, 3),
            "stop": mostly(st.lists(st.text(min_size=1, max_size=5), max_size=4)),
            "max_tokens": st.integers(1, 8),
        },
    )

    def check(changes):
        check_response(post(server, json.dumps({**BODY, **changes})))

    fuzz(check, fields)


def test_texts(fuzz, server):
    """Texts of any characters, and markers of every kind of model."""
    pieces = st.one_of(
        st.text(max_size=20),
        st.sampled_from(["<image>", "<|im_end|>", "</s>", "<image_soft_token>", "<|image_pad|>"]),
    )
    texts = st.lists(pieces, max_size=5).map("".join)

    def check(text):
        body = {**SETTINGS, "messages": [{"role": "user", "content": text}]}
        check_response(post(server, json.dumps(body)))

    fuzz(check, texts)


def test_raw_bytes(fuzz, server):
    content = json.dumps(BODY).encode()

    def check(damaged):
        check_response(post(server, damaged))

    fuzz(
        check,
        st.one_of(
            draw_damaged(content), JUNK.map(lambda value: repr(value).encode("utf-8", "replace"))
        ),
    )
