"""What a request may hold: everything else is refused with a sentence."""

import json
import re
from pathlib import Path

import pytest
from helpers.clients import make_data_url, make_image, make_messages, post

import sparsecut
from sparsecut.schema import UserError
from sparsecut.serving.conversation import build_conversation
from sparsecut.serving.protocol import RequestLimits, parse_chat_request, parse_conversation

LIMITS = RequestLimits(max_tokens=100, max_images=2, max_messages=3, max_characters=1000)
NAN = float("nan")
LIST = [{"role": "user", "content": "a"}]
HALF = "\ud83d"  # half a character


def read(body):
    """A body as the server gets it, checked."""
    request = parse_chat_request(json.loads(json.dumps(body)), LIMITS)
    return request, build_conversation(request.messages, "<image>", LIMITS)


def image_part(url="data:,x", **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text_part(text):
    return {"type": "text", "text": text}


def message(content, role="user", **more):
    return {"messages": [{"role": role, "content": content, **more}]}


# What a request says -> fields of the checked request.
ACCEPTED = [
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 2}, {"temperature": 2.0}),
    ({"temperature": None}, {"temperature": 1.0}),
    ({"top_p": 1e-6}, {"top_p": 1e-6}),
    ({"n": 128}, {"n": 128}),
    ({"seed": -(2**63)}, {"seed": -(2**63)}),
    ({"stop": "a"}, {"stop": ["a"]}),
    ({"stop": []}, {"stop": []}),
    ({"stop": ["a" * 255, "\n", HALF, "b"]}, {"stop": ["a" * 255, "\n", HALF, "b"]}),
    ({"logprobs": True, "top_logprobs": 20}, {"top_logprobs": 20}),
    ({"logprobs": False, "top_logprobs": 0}, {"top_logprobs": 0}),
    ({"max_tokens": 100}, {"max_tokens": 100, "has_length": True}),
    ({}, {"max_tokens": None, "has_length": False, "n": 1, "stream": False, "model": None}),
    ({"max_completion_tokens": 5, "max_tokens": "?"}, {"max_completion_tokens": 5}),
    ({"max_completion_tokens": None, "max_tokens": 5}, {"max_tokens": 5}),
    ({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}),
    ({"stream": True, "stream_options": {"other": 1}}, {"stream": True}),
    ({"stream_options": {}}, {"stream": False}),
    ({"shortcuts_off": [3, 1, -1]}, {"shortcuts_off": [3, 1, -1]}),
    ({"model": ""}, {"model": ""}),
    ({"user": 5, "metadata": [[]], "store": NAN, "service_tier": "x"}, {}),
    ({"frequency_penalty": 0.0, "presence_penalty": False, "logit_bias": {}}, {}),
    ({"response_format": {"type": "text"}, "modalities": ["text"]}, {}),
    ({"tools": [], "tool_choice": "none", "parallel_tool_calls": True}, {}),
    ({"unknown": None}, {}),
]

# Messages -> (the text that the model reads last, how many images it holds)
CONVERSATIONS = [
    (message(""), "", 0),
    (message("a", name=5), "a", 0),
    (message([text_part("a"), text_part("b")]), "ab", 0),
    (message([text_part("a"), image_part(), text_part("b")]), "a<image>\nb", 1),
    (message([image_part(detail="low"), image_part()]), "<image>\n<image>", 2),
    (message([{"type": "image_url", "image_url": "data:,y"}]), "<image>", 1),
    (message([{"type": "text", "text": "a", "image_url": 5}]), "a", 0),
    (message("<image"), "<image", 0),
    (message([image_part(HALF)]), "<image>", 1),
    ({"messages": [{"role": "developer", "content": "a"}, *LIST]}, "a", 0),
]

# Changes of a valid request -> what the sentence names
REFUSED = [
    ({"temperature": 3}, ["temperature", "3", "0 to 2"]),
    ({"temperature": NAN}, ["temperature", "nan"]),
    ({"temperature": float("inf")}, ["temperature", "inf"]),
    ({"temperature": 10**400}, ["temperature", "0 to 2"]),
    ({"temperature": True}, ["temperature", "true"]),
    ({"temperature": "1"}, ["temperature", "'1'"]),
    ({"top_p": 0}, ["top_p", "0"]),
    ({"top_p": 1.1}, ["top_p", "1.1"]),
    ({"n": 0}, ["n", "0", "128"]),
    ({"n": 129}, ["n", "129", "128"]),
    ({"n": True}, ["n", "true"]),
    ({"n": 1.0}, ["n", "1.0"]),
    ({"seed": 1.5}, ["seed", "1.5"]),
    ({"seed": 2**63}, ["seed", str(2**63)]),
    ({"max_tokens": 0}, ["max_tokens", "0", "1 to 100"]),
    ({"max_tokens": 101}, ["max_tokens", "101", "1 to 100"]),
    ({"max_tokens": 5.0}, ["max_tokens", "5.0"]),
    ({"max_completion_tokens": 101, "max_tokens": 5}, ["max_completion_tokens", "101"]),
    ({"stop": ""}, ["stop", "0", "1 to 255"]),
    ({"stop": "a" * 256}, ["stop", "256", "1 to 255"]),
    ({"stop": ["a"] * 5}, ["stop", "5", "4"]),
    ({"stop": ["a", 1]}, ["stop[1]", "1"]),
    ({"stop": {}}, ["stop", "{}"]),
    ({"logprobs": 1}, ["logprobs", "1"]),
    ({"logprobs": True, "top_logprobs": 21}, ["top_logprobs", "21", "0 to 20"]),
    ({"top_logprobs": 2}, ["top_logprobs", "logprobs"]),
    ({"stream": "true"}, ["stream", "'true'"]),
    ({"stream_options": {"include_usage": True}}, ["stream_options", "stream: true"]),
    ({"stream_options": {"other": 1}}, ["stream_options", "stream: true"]),
    ({"stream": True, "stream_options": []}, ["stream_options", "[]"]),
    ({"stream": True, "stream_options": {"include_usage": None}}, ["include_usage", "null"]),
    ({"shortcuts_off": "all"}, ["shortcuts_off", "'all'"]),
    ({"shortcuts_off": [1, True]}, ["shortcuts_off[1]", "true"]),
    ({"model": 5}, ["model", "5"]),
    ({"tools": [{"type": "function"}]}, ["tools", "function"]),
    ({"tool_choice": "auto"}, ["tool_choice", "'auto'"]),
    ({"response_format": {"type": "json_object"}}, ["response_format", "json_object"]),
    ({"frequency_penalty": 0.1}, ["frequency_penalty", "0.1"]),
    ({"presence_penalty": NAN}, ["presence_penalty", "nan"]),
    ({"logit_bias": {"1": 2}}, ["logit_bias", "{'1': 2}"]),
    ({"modalities": ["text", "audio"]}, ["modalities", "audio"]),
    ({"temperatur": 0.1}, ["'temperatur'", "'temperature'"]),
    ({"max_token": 1}, ["'max_token'", "'max_tokens'"]),
    ({"functions": [{}]}, ["functions"]),
    ({1: 2}, ["'1'"]),
    ({"messages": None}, ["messages"]),
    ({"messages": []}, ["messages", "[]"]),
    ({"messages": {}}, ["messages", "{}"]),
    ({"messages": [5]}, ["messages[0]", "5"]),
    ({"messages": LIST * 4}, ["4", "3"]),
    ({"messages": [{}] * 1000}, ["1000", "3"]),
    ({"messages": [{"content": "a"}]}, ["messages[0].role", "assistant"]),
    ({"messages": [{"role": "user"}]}, ["messages[0].content"]),
    ({"messages": [*LIST, {"role": "assistant", "content": "b"}]}, ["'assistant'", "'user'"]),
    (message("a", "wizard"), ["messages[0].role", "'wizard'", "system"]),
    (message("a", ["user"]), ["messages[0].role", "['user']"]),
    (message(None), ["messages[0].content", "null"]),
    (message([]), ["messages[0].content", "[]"]),
    (message(["a"]), ["messages[0].content[0]", "'a'"]),
    (message([{"text": "a"}]), ["messages[0].content[0]", "type", "image_url"]),
    (message([{"type": "audio"}]), ["messages[0].content[0]", "'audio'", "image_url"]),
    (message([{"type": ["text"], "text": "a"}]), ["messages[0].content[0]", "['text']"]),
    (message([text_part(None)]), ["messages[0].content[0].text", "null"]),
    (message([{"type": "image_url"}]), ["messages[0].content[0].image_url"]),
    (message([image_part(5)]), ["messages[0].content[0].image_url.url", "5"]),
    (message([image_part()] * 3), ["3", "2"]),
    (message("<image> a"), ["messages[0].content", "<image>"]),
    (message(f"a {HALF}"), ["messages[0].content", "surrogate"]),
    (message("a" * 1001), ["1001", "1000"]),
    (message([image_part(), text_part("a" * 993)]), ["1001", "1000"]),
    (
        {"messages": [{"role": "system", "content": [image_part()]}, *LIST]},
        ["messages[0]", "'system'", "'user'"],
    ),
]


@pytest.mark.parametrize("changes, fields", ACCEPTED, ids=str)
def test_a_request_is_read_as_it_says(changes, fields):
    request, _ = read({"messages": LIST, **changes})
    for name, value in fields.items():
        assert getattr(request, name) == value
        assert type(getattr(request, name)) is type(value)


@pytest.mark.parametrize("body, text, num_images", CONVERSATIONS, ids=str)
def test_messages_become_texts_with_placeholders(body, text, num_images):
    _, conversation = read(body)
    assert conversation.messages[-1] == {"role": "user", "content": text}
    assert len(conversation.image_urls) == num_images
    assert {m["role"] for m in conversation.messages} <= {"system", "user"}


@pytest.mark.parametrize("changes, facts", REFUSED, ids=lambda value: str(value)[:60])
def test_everything_else_is_refused_with_the_key_and_the_value(changes, facts):
    with pytest.raises(UserError) as error:
        read({"messages": LIST, **changes})
    for fact in facts:
        assert fact in str(error.value)


@pytest.mark.parametrize("body", [None, True, 5, NAN, "a", [], LIST], ids=str)
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(UserError, match="messages"):
        parse_chat_request(body, LIMITS)
    with pytest.raises(UserError, match="messages"):
        parse_conversation(body, LIMITS)


def test_sampling_takes_what_the_request_says():
    request, _ = read({"messages": LIST, "stop": "x", "seed": 4, "temperature": 1})
    sampling = request.build_sampling(default_tokens=7)
    assert (sampling.max_new_tokens, sampling.stop, sampling.seed) == (7, ("x",), 4)
    assert sampling.top_logprobs is None
    request, _ = read({"messages": LIST, "max_tokens": 3, "logprobs": True})
    sampling = request.build_sampling(default_tokens=7)
    assert (sampling.max_new_tokens, sampling.top_logprobs) == (3, 0)


def image_url(url):
    return {"messages": [{"role": "user", "content": [image_part(url)]}]}


# What only the images, the model or the server's own limits show -> what the sentence names
REFUSED_BY_THE_SERVER = [
    ({}, image_url("file:///etc/passwd"), ["file:///etc/passwd"]),
    ({}, image_url("http://1.1.1.1/a.png"), ["http://1.1.1.1/a.png", "--remote"]),
    ({}, image_url("data:image/png;base64,####"), ["base64"]),
    ({}, image_url("data:image/png;base64,\u00e9"), ["base64", "ASCII"]),
    ({}, image_url("data:image/png;base64,aGVsbG8="), ["PNG"]),
    ({}, image_url(HALF), ["\\ud83d"]),
    ({HALF: 1}, message("a"), ["\\ud83d"]),
    ({"n": 9}, message("a"), ["n is 9", "8"]),
    ({"shortcuts_off": [77]}, message("a"), ["77"]),
    ({"max_tokens": 1024}, message("a " * 1100), ["max_tokens"]),
    ({}, {"messages": make_messages("a", *[make_image(0)] * 9)}, ["9", "8"]),
]


@pytest.mark.parametrize(
    "settings, body, facts", REFUSED_BY_THE_SERVER, ids=lambda value: str(value)[:60]
)
def test_the_server_answers_a_bad_request_with_400(client, settings, body, facts):
    response = post(client, json.dumps({**body, **settings}))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    for fact in facts:
        assert fact in error["message"]


PARAMS = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"temprature": 0}, "temprature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
    ({"top_logprobs": 2}, None),
    ({HALF: 1}, "\\ud83d"),
    ({"x" * 9000: 1}, "x" * 100),
]


@pytest.mark.parametrize("settings, param", PARAMS, ids=lambda value: str(value)[:40])
def test_an_error_names_the_setting(client, settings, param):
    response = post(client, json.dumps({**message("a"), **settings}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_settings_at_which_nothing_changes_are_taken(client):
    neutral = {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0, "functions": []}
    response = post(client, json.dumps({**message("a"), "max_tokens": 1, **neutral}))
    assert response.status_code == 200, response.text
    for name in neutral:
        response = post(client, json.dumps({**message("a"), name: 0.5}))
        assert response.json()["error"]["param"] == name


def test_a_valid_image_is_accepted(client):
    url = make_data_url(make_image(0))
    response = post(client, json.dumps({**image_url(url), "max_tokens": 1}))
    assert response.status_code == 200, response.text


def test_only_the_server_needs_pydantic_and_fastapi():
    package = Path(sparsecut.__file__).parent
    pattern = re.compile(r"^(from|import) (pydantic|fastapi|starlette|uvicorn)", re.MULTILINE)
    needing = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if pattern.search(path.read_text(encoding="utf-8"))
    }
    assert needing == {"serving"}
