"""From the messages of a request to what the model reads: texts with placeholders, and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..schema import UserError
from .protocol import ImagePart, Message, RequestLimits, TextPart


@dataclass(frozen=True)
class Conversation:
    """What the model reads.

    Attributes:
        messages: Role and content of each message; a content is text with one placeholder for
            every image.
        image_urls: URLs of the images, in the order of the placeholders.
    """

    messages: list[dict]
    image_urls: list[str]


def build_conversation(
    messages: Sequence[Message], image_token: str, limits: RequestLimits
) -> Conversation:
    """Join the parts of each message to one text.

    Args:
        messages: Checked messages.
        image_token: The model's placeholder for an image.
        limits: Limits of this server.

    Raises:
        UserError: There are too many images or too much text. Or a text contains the placeholder
            or half a character. Or an image is in a message that is not the user's, or the last
            message is not the user's.
    """
    contents = []
    image_urls: list[str] = []
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        urls = _get_image_urls(message)
        if urls and message.role != "user":
            raise UserError(
                f"{place} holds an image and has the role {message.role!r};"
                " send images in messages of the role 'user'"
            )
        image_urls += urls
        contents.append(_join_parts(message.content, place, image_token))
    _check_conversation(messages, contents, len(image_urls), limits)
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    joined = [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]
    return Conversation(joined, image_urls)


def _get_image_urls(message: Message) -> list[str]:
    return [part["image_url"]["url"] for part in message.content if part["type"] == "image_url"]


def _join_parts(parts: Sequence[TextPart | ImagePart], place: str, image_token: str) -> str:
    """One text; an image is the placeholder on a line of its own, as in training."""
    content = ""
    for i, part in enumerate(parts):
        if part["type"] == "text":
            _check_text(part["text"], place, image_token)
            content += part["text"]
        else:
            is_last = i + 1 == len(parts)
            content += image_token if is_last else f"{image_token}\n"
    return content


def _check_text(text: str, place: str, image_token: str) -> None:
    if image_token in text:
        raise UserError(
            f"{place}.content contains {image_token}, the model's placeholder for an image;"
            " leave it out and send the image as a part of type image_url"
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
