"""Conversations to text by a chat template: what it takes, and that it writes every turn."""

from __future__ import annotations

from functools import lru_cache

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from ..schema import UserError

PROBE = "probe"  # text that shows whether a chat template accepts a form of contents
TURN_PROBE = "turnprobe{}end"  # the same for a turn of a conversation
# Forms of a message's content.
TEXT = "text"  # a string
TEXT_PART = "text part"  # a list of one part, a text with placeholders
PARTS = "parts"  # a list of parts, images and texts

Messages = list[dict]


def get_chat_template(processor) -> str | None:
    """Return the chat template of a processor or of its tokenizer; None where neither has one."""
    template = processor.chat_template or processor.tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def get_tokens_per_image(processor) -> int | None:
    """Return the image tokens of each image, or None where only a call of the processor shows it.

    The processor of a built model takes the same number for every image. That of an upgraded model
    is its base's own.
    """
    # Some bases' processors have `num_image_tokens` too, for another number, but none has views.
    if getattr(processor, "num_views", None) is None:
        return None
    return processor.num_image_tokens


def apply_template(
    processor,
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
    marks: bool = False,
    arguments: dict | None = None,
    cached: bool = True,
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation by the chat template.

    Args:
        processor: its template and tokenizer are used.
        messages: the conversation. String contents are split into image and text items for
            templates that need these.
        add_generation_prompt: add the beginning of the next answer.
        marks: return the spans that the template marks as generated.
        arguments: the template's arguments, such as {"enable_thinking": False}.
        cached: keep the text for the next time.

    Returns:
        The text, and the spans of characters (first, one after the last); [] without `marks`.

    Raises:
        UserError: There is no chat template, it refuses the conversation, or it leaves out images
            or turns.
    """
    template = get_chat_template(processor)
    if template is None:
        raise UserError(
            f"{type(processor).__name__} has no chat template, so the prompt format of the model is"
            " not known; set processor.chat_template to the format the model was trained on"
        )
    _check_characters(messages)
    special_tokens = freeze_special_tokens(processor.tokenizer)
    if get_tokens_per_image(processor) is None:
        form = _find_form_with_images(template, processor.image_token, special_tokens)
    else:
        form = _find_form_of_text(template, special_tokens)
    frozen_arguments = tuple(sorted((arguments or {}).items()))
    roles = tuple(message["role"] for message in messages)
    _check_turns(roles, template, form, special_tokens, frozen_arguments)
    render = _render if cached else _render.__wrapped__
    return render(
        tuple(tuple(message.items()) for message in messages),
        template,
        add_generation_prompt,
        marks,
        (form, getattr(processor, "image_token", None)),
        special_tokens + frozen_arguments,
    )


def freeze_special_tokens(tokenizer) -> tuple:
    """Return a tokenizer's special tokens in a form that can be hashed."""
    frozen = []
    for name, value in tokenizer.special_tokens_map.items():
        frozen.append((name, tuple(value) if isinstance(value, list) else value))
    return tuple(frozen)


def _check_characters(messages: Messages) -> None:
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise UserError(
                f"a text of the role {message['role']!r} contains half a character (a lone"
                " surrogate); write whole characters"
            ) from None


# A record is rendered when it is checked and when it is encoded, in a study once per run.
@lru_cache(maxsize=32768)
def _render(
    frozen_messages: tuple,
    template: str,
    add_generation_prompt: bool,
    marks: bool,
    form: tuple[str, str | None],
    variables: tuple,
):
    messages = [dict(message) for message in frozen_messages]
    for message in messages:
        message["content"] = _shape_content(message["content"], *form)
    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **dict(variables),
        )
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"the model's chat template refuses the conversation: {error}; change its messages"
            " (many templates need user and assistant in turn, and no system message), or set"
            " another processor.chat_template"
        ) from error
    return texts[0], spans[0] if spans else []


def _shape_content(content: str, form: str, image_token: str | None) -> str | list[dict]:
    if form == PARTS:
        return split_at_images(content, image_token)
    if form == TEXT_PART:
        return [{"type": "text", "text": content}]
    return content


def split_at_images(content: str, image_token: str) -> list[dict]:
    """Split a string content into the image and text items that many templates take.

    The template writes its own line ends around images. So line ends beside an image are dropped,
    and so is whitespace between the first images and the text.
    """
    pieces = content.split(image_token)
    items = []
    has_text = False
    for number, text in enumerate(pieces):
        if number > 0:
            text = text.lstrip("\n") if has_text else text.lstrip()
            items.append({"type": "image"})
        if number + 1 < len(pieces):
            text = text.rstrip("\n")
        if text.strip():
            items.append({"type": "text", "text": text})
            has_text = True
    return items


# --- what a template takes, found by trying ---


@lru_cache(maxsize=64)
def _find_form_with_images(template: str, image_token: str, special_tokens: tuple) -> str:
    """Whether a template takes contents as parts, found by rendering parts and a string.

    Raises:
        UserError: It writes a placeholder for neither, or cannot render either.
    """
    parts = [{"type": "image"}, {"type": "text", "text": PROBE}]
    string = f"{image_token}\n{PROBE}"
    texts = []
    for form, content in ((PARTS, parts), (TEXT, string)):
        text = _try_template(template, [{"role": "user", "content": content}], special_tokens)
        if text.count(PROBE) == 1 and text.count(image_token) == 1 and "'type'" not in text:
            return form
        texts.append(text)
    if not any(texts):  # images are not the reason: let the template's own error be told
        message = (("role", "user"), ("content", string))
        _render((message,), template, False, False, (TEXT, None), special_tokens)
    raise UserError(
        f"the chat template writes no {image_token} for an image, so images would be lost; set a"
        " processor.chat_template that takes content items such as {'type': 'image'}"
    )


@lru_cache(maxsize=64)
def _find_form_of_text(template: str, special_tokens: tuple) -> str:
    """Whether a template takes contents as strings or as lists of one text part.

    Raises:
        UserError: It writes the text of neither.
    """
    for form in (TEXT, TEXT_PART):
        messages = []
        for number, role in enumerate(("user", "assistant")):
            content = _shape_content(TURN_PROBE.format(number), form, None)
            messages.append({"role": role, "content": content})
        text = _try_template(template, messages, special_tokens)
        is_written = [TURN_PROBE.format(number) in text for number in range(2)]
        if all(is_written) and "'type'" not in text:
            return form
    return TEXT  # `_check_turns` names the turn that is left out


def _try_template(template: str, messages: Messages, variables: tuple) -> str:
    """The text of messages; "" where the template cannot render them."""
    try:
        texts, _ = render_jinja_template(
            conversations=[messages], chat_template=template, **dict(variables)
        )
    except (TemplateError, TypeError):
        return ""
    return texts[0]


@lru_cache(maxsize=4096)
def _check_turns(
    roles: tuple[str, ...], template: str, form: str, special_tokens: tuple, arguments: tuple
) -> None:
    """Raise UserError where the template leaves out a turn of a conversation with these roles."""
    messages = []
    for number, role in enumerate(roles):
        content = TURN_PROBE.format(number)
        if form != TEXT:
            content = [{"type": "text", "text": content}]
        messages.append({"role": role, "content": content})
    text = _try_template(template, messages, special_tokens + arguments).lower()
    if not text:
        return  # the true conversation shows why
    left_out = [i for i in range(len(roles)) if TURN_PROBE.format(i) not in text]
    # A lost answer is the worse mistake, so it is named first.
    for number in sorted(left_out, key=lambda i: roles[i] == "system"):
        role = roles[number]
        remedy = "set another processor.chat_template"
        if role == "system":
            remedy = f"put its text before the first question, or {remedy}"
        raise UserError(
            f"the chat template leaves out the {role} turn (turn {number}), so the model would not"
            f" see it; {remedy}"
        )
