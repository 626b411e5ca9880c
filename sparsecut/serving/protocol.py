"""OpenAI's chat completions, from JSON to a checked request and from answers to JSON."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..schema import UserError, nearest
from .decoding import SamplingParams, TextDelta

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
IGNORED = (  # change nothing in an answer
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)
NEUTRAL = {  # of what is not offered, the values that ask for nothing
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "modalities": (["text"],),
}
MAX_STOPS, MAX_STOP_LETTERS, MAX_TOP_LOGPROBS = 4, 255, 20


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for: tokens of an answer (and how many where it does not say),
    pictures, turns, letters of text.
    """

    max_tokens: int = 1024
    default_tokens: int = 256
    max_pictures: int = 8
    max_turns: int = 256
    max_letters: int = (
        1_000_000  # more would only be read to be found too long, and others wait for that
    )


@dataclass(frozen=True)
class Request:
    """A checked request: turns with placeholders, where the pictures are, and how to answer;
    sampling holds no length yet.
    """

    model: str | None
    messages: list[dict]
    urls: list[str]
    max_tokens: int | None
    sampling: dict = field(default_factory=dict)
    num_answers: int = 1
    off: tuple[int, ...] = ()
    stream: bool = False
    usage: bool = False

    def sampled(self, default_tokens: int) -> SamplingParams:
        """How to answer, in at most so many tokens where the request does not say."""
        return SamplingParams(max_new_tokens=self.max_tokens or default_tokens, **self.sampling)


KNOWN = (
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "n",
    "seed",
    "stop",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "shortcuts_off",
)


def read_request(body: object, image_token: str, bounds: RequestLimits) -> Request:
    """A request from its JSON; shortcuts_off (a list of numbers) is ours. Raises ValueError with a
    sentence for anything else.
    """
    if not isinstance(body, dict):
        raise UserError(f"the request is {_shown(body)}, but must be an object with messages")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise UserError(f"{name} is not offered by this server; leave it out")
        if name not in (*KNOWN, *IGNORED, *NEUTRAL):
            raise UserError(
                f"{_shown(name)} is not a setting of a chat completion{nearest(name, KNOWN)}; leave"
                " it out"
            )
    messages, urls = read_messages(body.get("messages"), image_token, bounds)
    stream = _bool(body, "stream")
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or (options and not stream):
        raise UserError(
            'stream_options must be an object such as {"include_usage": true}, beside stream: true'
        )
    off = body.get("shortcuts_off", [])
    if not isinstance(off, list) or any(type(i) is not int for i in off):
        raise UserError(
            f"shortcuts_off is {_shown(off)}, but must be a list of shortcuts' numbers, as [1, 2]"
        )
    return Request(
        model=_text(body, "model"),
        messages=messages,
        urls=urls,
        max_tokens=_length(body, bounds),
        sampling={
            "temperature": float(_number(body, "temperature", 1.0, 0, 2)),
            "top_p": float(_number(body, "top_p", 1.0, 1e-6, 1)),
            "seed": _whole(body, "seed", None, -(2**63), 2**63 - 1),
            "stop": _stops(body.get("stop")),
            "top_logprobs": _logprobs(body),
        },
        num_answers=_whole(body, "n", 1, 1, 128),
        off=tuple(off),
        stream=stream,
        usage=_bool(options, "include_usage"),
    )


def read_messages(
    messages: object, image_token: str, bounds: RequestLimits
) -> tuple[list[dict], list[str]]:
    """Turns with one placeholder per picture, and the pictures' URLs in order; ValueError with a
    sentence.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(
            'messages must be a list of turns, as [{"role": "user", "content": "What is this?"}]'
        )
    if len(messages) > bounds.max_turns:
        raise UserError(
            f"messages has {len(messages)} turns, but this server takes {bounds.max_turns}; send"
            " the last ones"
        )
    turns, urls = [], []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or message["role"] not in ROLES
        ):
            role = message.get("role") if isinstance(message, dict) else message
            raise UserError(f"{where} has the role {_shown(role)}; allowed are {', '.join(ROLES)}")
        content = _content(
            message.get("content"), where, image_token, urls, message["role"] == "user"
        )
        turns.append({"role": ROLES[message["role"]], "content": content})
    if (letters := sum(len(turn["content"]) for turn in turns)) > bounds.max_letters:
        raise UserError(
            f"the turns hold {letters} letters of text, but this server takes {bounds.max_letters};"
            " shorten them"
        )
    if turns[-1]["role"] != "user":
        raise UserError(
            f"the last turn is the {turns[-1]['role']}'s, but must be the user's; end with a"
            " question"
        )
    if len(urls) > bounds.max_pictures:
        raise UserError(
            f"the turns hold {len(urls)} pictures, but this server takes {bounds.max_pictures};"
            " send fewer"
        )
    return turns, urls


def _content(content: object, where: str, token: str, urls: list[str], may_show: bool) -> str:
    """One string: a picture as the placeholder on a line of its own, as in training."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise UserError(
            f"{where}.content is {_shown(content)}, but must be a text, or a list of texts and"
            " pictures"
        )
    text = ""
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if token in part["text"]:
                raise UserError(
                    f"{where}.content holds {token}, the model's mark for a picture; leave it out"
                    " and send the picture as a part of type image_url"
                )
            try:
                part["text"].encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{where}.content holds half a character (a lone surrogate); send whole ones"
                ) from None
            text += part["text"]
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str) or not may_show:
                raise UserError(
                    f'{where}.content[{i}] is no picture of a user; send {{"type": "image_url",'
                    ' "image_url": {"url": "data:..."}} in a user\'s turn'
                )
            urls.append(url)
            text += token + ("\n" if i + 1 < len(parts) else "")
        else:
            raise UserError(
                f"{where}.content[{i}] has the type {_shown(kind)}; allowed are text (with a text)"
                " and image_url"
            )
    return text


def _length(body: dict, bounds: RequestLimits) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        if name in body:
            return _whole(body, name, None, 1, bounds.max_tokens)
    return None


def _logprobs(body: dict) -> int | None:
    wanted, top = _bool(body, "logprobs"), _whole(body, "top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise UserError("top_logprobs needs logprobs: true beside it")
    return top if wanted else None


def _stops(stop: object) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LETTERS for s in stops)
    ):
        raise UserError(
            f"stop is {_shown(stop)}, but must be a text or a list of up to {MAX_STOPS} texts of 1"
            f" to {MAX_STOP_LETTERS} letters"
        )
    return tuple(stops)


def _number(body: dict, name: str, default, least, most):
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        low = 0 if least == 1e-6 else least
        raise UserError(
            f"{name} is {_shown(value)}, but must be a number {'above' if low != least else 'from'}"
            f" {low} to {most}"
        )
    return value


def _whole(body: dict, name: str, default: int | None, least: int, most: int) -> int | None:
    value = body.get(name, default)
    if value is default:
        return value
    if type(value) is not int or not least <= value <= most:
        raise UserError(
            f"{name} is {_shown(value)}, but must be a whole number from {least} to {most}"
        )
    return value


def _bool(body: dict, name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{name} is {_shown(value)}, but must be true or false")
    return value


def _text(body: dict, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{name} is {_shown(value)}, but must be a text")
    return value


def _shown(value: object) -> str:
    shown = (
        json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    )  # as the client wrote it
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def new_heading(model: str, stream: bool) -> dict:
    """What every part of one response begins with."""
    kind = "chat.completion.chunk" if stream else "chat.completion"
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict:
    """Tokens read, pictures included, and written."""
    total = prompt_tokens + completion_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": total,
    }


def completion(
    heading: dict, answers: Sequence[TextDelta], usage: dict, with_logprobs: bool
) -> dict:
    """The response to a request that does not stream."""
    choices = [
        {
            "index": a.index,
            "message": {"role": "assistant", "content": a.text, "refusal": None},
            "logprobs": {"content": list(a.tokens), "refusal": None} if with_logprobs else None,
            "finish_reason": a.finish_reason,
        }
        for a in answers
    ]
    return {**heading, "choices": choices, "usage": usage}


def chunk(heading: dict, piece: TextDelta, with_logprobs: bool) -> dict:
    """One event of a stream."""
    delta = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
    logprobs = {"content": list(piece.tokens), "refusal": None} if with_logprobs else None
    choice = {
        "index": piece.index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": piece.finish_reason,
    }
    return {**heading, "choices": [choice]}


def failure(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict:
    """An error as OpenAI's clients read it."""
    message = message.encode(
        "utf-8", "backslashreplace"
    ).decode()  # half characters of a request that it quotes
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
