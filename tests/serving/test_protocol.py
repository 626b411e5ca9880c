"""What a request may hold, and where its pictures may come from: everything else is answered with a
sentence.
"""

import json

import pytest
from helpers.clients import picture, post, served, turn
from helpers.tiny import tiny_model

from sparsecut.serving.engine import Engine


@pytest.fixture(scope="module")
def client():
    engine = Engine(*tiny_model(), max_batch=8)
    with served(engine) as client:
        yield client
    engine.close()


BAD = {  # what is wrong with a request -> words of the sentence
    "messages must be a list": {"messages": []},
    "half a character": {"messages": [{"role": "user", "content": "a \ud83d"}]},
    "allowed are system": {"messages": [{"role": "wizard", "content": "a"}]},
    "must be the user's": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    },
    "mark for a picture": {"messages": [{"role": "user", "content": "<image> a"}]},
    "neither a data URL nor": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
            }
        ]
    },
    "fetches no pictures": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "http://1.1.1.1/a.png"}}],
            }
        ]
    },
    "broken base64": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,####"}}
                ],
            }
        ]
    },
    "the picture \\ud83d is neither": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "\ud83d"}}]}
        ]
    },
    "only ASCII": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,\u00e9"}}
                ],
            }
        ]
    },
    "cannot be read": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
                ],
            }
        ]
    },
    "takes 8": {"messages": turn("a", *[picture(0)] * 9)},
    "has the type": {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
    "temperature is 3": {"temperature": 3},
    "temperature is nan": {"temperature": float("nan")},
    "top_p is 0": {"top_p": 0},
    "n is 9": {"n": 9},
    "n is true": {"n": True},
    "max_tokens is 0": {"max_tokens": 0},
    "from 1 to 1024": {"max_tokens": 99999},
    "lower max_tokens": {
        "max_tokens": 1024,
        "messages": [{"role": "user", "content": "a " * 1100}],
    },
    "1 to 255 letters": {"stop": [""]},
    "up to 4 texts": {"stop": "a" * 256},
    "1000001 letters of text": {"messages": [{"role": "user", "content": "a" * 1_000_001}]},
    "needs logprobs": {"top_logprobs": 2},
    "seed is 1.5": {"seed": 1.5},
    "beside stream": {"stream_options": {"include_usage": True}},
    "is not offered": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "did you mean": {"temperatur": 0.1},
    "no shortcut 77": {"shortcuts_off": [77]},
    "list of shortcuts": {"shortcuts_off": "all"},
    "is not a": {1: 2},
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_request_is_answered_with_a_sentence(client, words):
    body = {"messages": [{"role": "user", "content": "a"}], **BAD[words]}
    response = post(client, json.dumps(body))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and words in error["message"], error
