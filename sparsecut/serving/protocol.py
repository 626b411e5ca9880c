"""OpenAI's chat completion request: its schema, and from JSON to a checked request.

Every problem becomes a `UserError` with one sentence: the key, the value, what is allowed. What
depends on the model is checked later, in `conversation` and by the engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from typing_extensions import TypedDict

from ..schema import UserError, nearest
from .decoding import SamplingParams

MAX_ANSWERS = 128
MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 255
MAX_TOP_LOGPROBS = 20
MAX_PARAM_CHARACTERS = 100  # of a setting's name in an error
IGNORED = (  # settings that do not change an answer
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
NEUTRAL = {  # settings that this server does not offer -> the one value that changes nothing
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "repetition_penalty": 1,  # this and the next ones are vLLM's
    "min_p": 0,
    "top_k": -1,
}


class SettingError(UserError):
    """A setting of a request is wrong.

    Attributes:
        param: Its key or path, as in the message; None where several settings do not fit together.
    """

    def __init__(self, message: str, param: str | None):
        super().__init__(message)
        self.param = param[:MAX_PARAM_CHARACTERS] if param else None


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for.

    Attributes:
        max_tokens: Tokens of one answer at most.
        default_tokens: Maximum tokens of an answer, where the request sets none.
        max_images: Images in one request.
        max_messages: Messages in one request.
        max_characters: Characters of text in all messages together. Tokenizing a longer text would
            only show that it is too long, while other requests wait.
    """

    max_tokens: int = 1024
    default_tokens: int = 256
    max_images: int = 8
    max_messages: int = 256
    max_characters: int = 1_000_000


# ---- the schema; a field's description names what is allowed and is part of the error message


class RequestPart(BaseModel):
    """Base of the schema: no conversion between types, no NaN, unknown keys are passed over."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg")  # what a file is says itself

# Content parts are plain dicts after the check, because a hostile request may hold a million of
# them, and objects would take seconds. What their keys allow therefore stands here:
ALLOWED_IN_PARTS = {
    "text": "text",
    "image_url": 'an object such as {"url": "data:image/png;base64,..."}',
    "url": "the text of a data URL, or of an http(s) URL",
    "audio_url": 'an object such as {"url": "data:audio/wav;base64,..."}',
    "input_audio": 'an object such as {"data": "<base64>", "format": "wav"}',
    "data": "the base64 text of a sound file",
    "format": f"one of {', '.join(AUDIO_FORMATS)}",
}


class ImageURL(TypedDict):
    """Where an image comes from."""

    url: str


class TextPart(TypedDict):
    """A text inside a message."""

    type: Literal["text"]
    text: str


def _wrap_url(value: Any) -> Any:
    """Some clients send the bare URL."""
    return {"url": value} if isinstance(value, str) else value


class ImagePart(TypedDict):
    """An image inside a message."""

    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_wrap_url)]


class InputAudio(TypedDict):
    """A sound file's bytes."""

    data: str
    format: NotRequired[Literal["wav", "mp3", "flac", "ogg"]]


class InputAudioPart(TypedDict):
    """A clip of sound inside a message, as OpenAI's clients send it."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioURLPart(TypedDict):
    """A clip of sound inside a message, by its URL."""

    type: Literal["audio_url"]
    audio_url: Annotated[ImageURL, BeforeValidator(_wrap_url)]


def _wrap_text(value: Any) -> Any:
    """A content of text alone is short for a list of one text part."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


ContentPart = Annotated[
    TextPart | ImagePart | InputAudioPart | AudioURLPart, Field(discriminator="type")
]
PART_TYPES = "text, image_url, input_audio and audio_url"


class Message(RequestPart):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="system, developer, user or assistant"
    )
    content: Annotated[list[ContentPart], FailFast(), BeforeValidator(_wrap_text)] = Field(
        min_length=1, description=f"a text, or a list of parts of type {PART_TYPES}"
    )


def _check_number_of_messages(messages: Any, info: ValidationInfo) -> Any:
    """Before the messages themselves are read: a body can hold a million of them."""
    limit = info.context.max_messages
    if isinstance(messages, list) and len(messages) > limit:
        raise UserError(
            f"has {len(messages)} messages, but this server takes {limit}; send the last ones"
        )
    return messages


class ConversationRequest(RequestPart):
    """A request of which only the conversation matters."""

    messages: Annotated[list[Message], FailFast(), BeforeValidator(_check_number_of_messages)] = (
        Field(
            min_length=1,
            description='a list such as [{"role": "user", "content": "What is this?"}]',
        )
    )


class StreamOptions(RequestPart):
    """Options of a streamed response; others than ours are passed over."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool = Field(False, description="true or false")


def _wrap_stop(value: Any) -> Any:
    """One stop string is short for a list of it."""
    return [value] if isinstance(value, str) else value


def _check_stop(stop: list[str]) -> list[str]:
    if len(stop) > MAX_STOP_STRINGS:
        raise UserError(f"has {len(stop)} texts, but at most {MAX_STOP_STRINGS} are allowed")
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise UserError(
                f"holds a text of {len(text)} characters,"
                f" but 1 to {MAX_STOP_CHARACTERS} are allowed"
            )
    return stop


def _check_length(length: int, info: ValidationInfo) -> int:
    limit = info.context.max_tokens
    if not 1 <= length <= limit:
        raise UserError(f"is {length}, but must be a whole number from 1 to {limit}")
    return length


def _whole_number(default: int | None, least: int, most: int) -> Any:
    """A field for a whole number in a range."""
    allowed = f"a whole number from {least} to {most}"
    return Field(default, ge=least, le=most, description=allowed)


class ChatCompletionRequest(ConversationRequest):
    """The body of POST /v1/chat/completions.

    Attributes:
        model: Name of the model; None takes the one that is served.
        max_tokens: Tokens of an answer at most.
        max_completion_tokens: The newer name of max_tokens; it wins where both are given.
        temperature: 0 takes the likeliest token.
        top_p: Draw from the likeliest tokens that together reach this probability.
        n: Number of answers.
        seed: Repeats an answer.
        stop: An answer ends before any of these texts.
        logprobs: Whether to return the log-probability of every token.
        top_logprobs: How many other likely tokens to return at each position.
        stream: Whether to send the answer in pieces.
        stream_options: Only beside stream.
        chat_template_kwargs: Arguments of the chat template, such as {"enable_thinking": false}.
        shortcuts_off: Ours: numbers of the plan's shortcuts that add nothing to this answer.
    """

    model: str | None = Field(None, description="text")
    max_tokens: Annotated[int, AfterValidator(_check_length)] | None = Field(
        None, description="a whole number above 0"
    )
    max_completion_tokens: Annotated[int, AfterValidator(_check_length)] | None = Field(
        None, description="a whole number above 0"
    )
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, up to 1")
    n: int = _whole_number(1, 1, MAX_ANSWERS)
    seed: int | None = _whole_number(None, -(2**63), 2**63 - 1)
    stop: Annotated[
        list[str], FailFast(), BeforeValidator(_wrap_stop), AfterValidator(_check_stop)
    ] = Field(
        [],
        description=f"a text, or a list of up to {MAX_STOP_STRINGS} texts"
        f" of 1 to {MAX_STOP_CHARACTERS} characters",
    )
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int = _whole_number(0, 0, MAX_TOP_LOGPROBS)
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions = Field(
        StreamOptions(), description='an object such as {"include_usage": true}'
    )
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(
        {},
        description="an object of true, false, numbers and texts such as"
        ' {"enable_thinking": false}',
    )
    shortcuts_off: Annotated[list[int], FailFast()] = Field(
        [], description="a list of shortcuts' numbers such as [1, 2]"
    )

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatCompletionRequest:
        """Settings that need another one beside them."""
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs needs logprobs: true beside it")
        if self.stream_options.model_fields_set and not self.stream:
            raise UserError("stream_options needs stream: true beside it")
        return self

    def build_sampling(self, default_tokens: int) -> SamplingParams:
        """How to draw an answer.

        Args:
            default_tokens: Maximum tokens of the answer where the request sets none.
        """
        requested = self.max_completion_tokens or self.max_tokens
        return SamplingParams(
            max_new_tokens=requested or default_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(self.stop),
            top_logprobs=self.top_logprobs if self.logprobs else None,
        )

    @property
    def has_length(self) -> bool:
        """Whether the request limits the length of an answer."""
        return self.max_completion_tokens is not None or self.max_tokens is not None


# ---- from JSON to a checked request


def parse_chat_request(body: object, limits: RequestLimits) -> ChatCompletionRequest:
    """Check the JSON of a chat completion request.

    Raises:
        UserError: For unknown keys, wrong types, values out of range, and settings that this
            server does not offer.
    """
    settings = _drop_settings_without_effect(body)
    return _validate(ChatCompletionRequest, settings, limits)


def parse_conversation(body: object, limits: RequestLimits) -> list[Message]:
    """Check the messages of a request and pass over everything else in it.

    Raises:
        UserError: As `parse_chat_request`.
    """
    _check_object(body)
    return _validate(ConversationRequest, body, limits).messages


def _check_object(body: object) -> None:
    if not isinstance(body, dict):
        raise UserError(f"the request is {_format(body)}, but must be an object with messages")


def _drop_settings_without_effect(body: object) -> dict:
    """The settings that matter: without nulls, ignored ones, and neutral values."""
    _check_object(body)
    known = ChatCompletionRequest.model_fields
    settings = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name in NEUTRAL:
            if value != NEUTRAL[name]:
                raise SettingError(
                    f"{name} is {_format(value)}, but this server does not offer it; leave it out",
                    name,
                )
            continue
        if name not in known:
            suggestion = nearest(name, known)
            raise SettingError(
                f"{_format(name)} is not a setting of a chat completion{suggestion}; leave it out",
                name,
            )
        settings[name] = value
    if "max_completion_tokens" in settings:
        settings.pop("max_tokens", None)
    return settings


def _validate(schema: type[RequestPart], values: dict, limits: RequestLimits) -> Any:
    try:
        return schema.model_validate(values, context=limits)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SettingError(_describe_error(first), _format_path(first["loc"])) from None


def _list_allowed_values() -> dict[str, str]:
    """What every key of the schema allows, from the descriptions of its fields."""
    allowed = dict(ALLOWED_IN_PARTS)
    for schema in (ChatCompletionRequest, Message, StreamOptions):
        for name, field in schema.model_fields.items():
            allowed[name] = field.description
    return allowed


ALLOWED = _list_allowed_values()


def _describe_error(error: dict) -> str:
    """One sentence for one of pydantic's errors: the key, the value, what is allowed."""
    kind = error["type"]
    path = _format_path(error["loc"])
    value = error["input"]
    if kind == "value_error":  # raised by one of our checks
        return f"{path} {error['ctx']['error']}".lstrip()
    if kind == "union_tag_not_found":
        return f"{path} has no type; allowed are {PART_TYPES}"
    if kind == "union_tag_invalid":
        return f"{path} has the type {_format(value['type'])}; allowed are {PART_TYPES}"
    key = [part for part in error["loc"] if part in ALLOWED][-1]
    subject = "" if error["loc"][-1] == key else f"{key} "
    if kind == "missing":
        return f"{path} is missing, but must be {ALLOWED[key]}"
    return f"{path} is {_format(value)}, but {subject}must be {ALLOWED[key]}"


def _format_path(location: tuple[str | int, ...]) -> str:
    """A place in a request, such as messages[0].content[1].image_url.url."""
    path = ""
    for i, part in enumerate(location):
        follows_index = i > 1 and isinstance(location[i - 1], int)
        if follows_index and location[i - 2] == "content":
            continue  # pydantic inserts the type of a content part
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def _format(value: object) -> str:
    """A value as the client wrote it, shortened."""
    is_json_word = value is None or isinstance(value, bool)
    text = json.dumps(value) if is_json_word else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
