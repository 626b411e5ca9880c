"""From the messages of a request to what the model reads: texts with placeholders, and images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..schema import UserError
from .protocol import Message, RequestLimits


@dataclass(frozen=True)
class Conversation:
    """What the model reads.

    Attributes:
        messages: Role and content of each message; a content is text with one placeholder for
            every image.
        image_urls: URLs of the images, or of clips of sound, in the order of the placeholders.
    """

    messages: list[dict]
    image_urls: list[str]


def build_conversation(
    messages: Sequence[Message],
    image_token: str,
    limits: RequestLimits,
    reserved: Collection[str] = (),
    medium: str = "image",
) -> Conversation:
    """Join the parts of each message to one text.

    Args:
        messages: Checked messages.
        image_token: The model's placeholder for an image.
        limits: Limits of this server.
        reserved: Other special tokens that no text may contain.
        medium: What the model takes beside text, "image" or "audio".

    Raises:
        UserError: There are too many images or too much text. Or a text contains a special token
            or half a character. Or an image is in a message that is not the user's, or the last
            message is not the user's.
    """
    contents = []
    image_urls: list[str] = []
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        urls = _get_urls(message, place, medium)
        if urls and message.role != "user":
            raise UserError(
                f"{place} holds {medium} and has the role {message.role!r};"
                f" send {medium} in messages of the role 'user'"
            )
        image_urls += urls
        contents.append(_join_parts(message.content, image_token))
    _check_conversation(messages, contents, len(image_urls), limits)
    for i, message in enumerate(messages):
        _check_text(f"messages[{i}]", message.content, contents[i], image_token, reserved)
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    joined = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]
    return Conversation(joined, image_urls)


def _get_urls(message: Message, place: str, medium: str) -> list[str]:
    """The URLs of a message's images or clips; UserError where the model takes the other."""
    urls = []
    for number, part in enumerate(message.content):
        if part["type"] == "text":
            continue
        given = "image" if part["type"] == "image_url" else "audio"
        if given != medium:
            raise UserError(
                f"{place}.content[{number}] has the type {part['type']!r}, but the model takes text"
                f" and {medium} only; leave it out, or ask another model"
            )
        urls.append(_get_url(part))
    return urls


def _get_url(part: dict) -> str:
    if part["type"] == "input_audio":
        audio = part["input_audio"]
        return f"data:audio/{audio.get('format', 'wav')};base64,{audio['data']}"
    return part[part["type"]]["url"]


def _join_parts(parts: Sequence[dict], image_token: str) -> str:
    """One text; an image is the placeholder on a line of its own, as in training."""
    texts = []
    for i, part in enumerate(parts):
        if part["type"] == "text":
            texts.append(part["text"])
        else:
            is_last = i + 1 == len(parts)
            texts.append(image_token if is_last else f"{image_token}\n")
    return "".join(texts)


def _check_text(
    place: str,
    parts: Sequence[dict],
    content: str,
    image_token: str,
    reserved: Collection[str],
) -> None:
    """Refuse special tokens in a message's text, also those that its parts make together."""
    num_images = sum(part["type"] != "text" for part in parts)
    found = [image_token] if content.count(image_token) != num_images else []
    text = content.replace(image_token, "\n") if num_images else content
    found += [token for token in reserved if token in text]
    if found:
        raise UserError(
            f"{place}.content contains {found[0]}, a special token by which the model reads images"
            " and the like; leave it out, and send an image or sound as a part of its own"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{place}.content contains half a character (a lone surrogate); send whole characters"
        ) from None


def _check_conversation(
    messages: Sequence[Message], contents: Sequence[str], num_images: int, limits: RequestLimits
) -> None:
    num_characters = sum(len(content) for content in contents)
    if num_characters > limits.max_characters:
        raise UserError(
            f"the messages hold {num_characters} characters of text,"
            f" but this server takes {limits.max_characters}; shorten them"
        )
    last_role = messages[-1].role
    if last_role != "user":
        raise UserError(
            f"the last message has the role {last_role!r}, but must have 'user';"
            " end with a question"
        )
    if num_images > limits.max_images:
        raise UserError(
            f"the messages hold {num_images} images, but this server takes {limits.max_images};"
            " send fewer"
        )
