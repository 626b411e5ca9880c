"""The JSON of responses, as OpenAI's clients read it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from .decoding import TextDelta


def build_header(model: str, stream: bool) -> dict:
    """The fields that every part of one response begins with."""
    kind = "chat.completion.chunk" if stream else "chat.completion"
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def build_usage(prompt_tokens: int, completion_tokens: int) -> dict:
    """Tokens read (those of images included) and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def build_completion(
    header: dict, answers: Sequence[TextDelta], usage: dict, with_logprobs: bool
) -> dict:
    """The response to a request that does not stream."""
    choices = []
    for answer in answers:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {
            "index": answer.index,
            "message": message,
            "logprobs": _build_logprobs(answer) if with_logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        choices.append(choice)
    return {**header, "choices": choices, "usage": usage}


def build_first_chunk(header: dict, index: int) -> dict:
    """The event that begins a choice of a stream."""
    choice = {
        "index": index,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    return {**header, "choices": [choice]}


def build_chunk(header: dict, delta: TextDelta, with_logprobs: bool) -> dict:
    """The event for some more text of a choice."""
    is_only_the_end = not delta.text and delta.finish_reason is not None
    choice = {
        "index": delta.index,
        "delta": {} if is_only_the_end else {"content": delta.text},
        "logprobs": _build_logprobs(delta) if with_logprobs else None,
        "finish_reason": delta.finish_reason,
    }
    return {**header, "choices": [choice]}


def build_usage_chunk(header: dict, usage: dict) -> dict:
    """The last event of a stream whose request wants the usage."""
    return {**header, "choices": [], "usage": usage}


def _build_logprobs(delta: TextDelta) -> dict:
    return {"content": list(delta.tokens), "refusal": None}


def build_error(
    message: str,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
) -> dict:
    """An error as OpenAI's clients read it; `param` is the setting that is wrong."""
    # Both may quote half a character of the request, which UTF-8 cannot hold.
    message = message.encode("utf-8", "backslashreplace").decode()
    if param is not None:
        param = param.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
