"""Arguments of a chat template, such as `enable_thinking`: checked, and kept with a processor.

Arguments that are kept become defaults at the head of the processor's template. So training,
evaluation, chat and server render by them, and so does whoever loads the saved processor.
"""

from __future__ import annotations

import copy
import json
import re
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..schema import UserError, nearest
from .rendering import apply_template, get_chat_template
from .thoughts import find_open_thought

# What the caller of a template gives it by itself.
RESERVED = frozenset(
    ("messages", "add_generation_prompt", "tools", "documents", "raise_exception", "strftime_now")
)
GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
# Arguments that decide about thoughts, and values without any.
WITHOUT_THOUGHTS = (
    ("enable_thinking", False),
    ("thinking", False),
    ("add_thoughts", False),
    ("reasoning", False),
    ("thinking_mode", "chat"),
    ("think_render_option", "off"),
    ("reasoning_effort", "none"),
    ("reasoning_effort", "low"),
    ("thinking_budget", 0),
)


@lru_cache(maxsize=64)
def list_arguments(template: str) -> tuple[str, ...]:
    """Return the names of the arguments that a chat template reads, in order."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        names = meta.find_undeclared_variables(environment.parse(GENERATION_TAG.sub("", template)))
    except TemplateError as error:
        raise UserError(
            f"the chat template is not valid Jinja ({error}); set another processor.chat_template"
        ) from error
    return tuple(sorted(name for name in names - RESERVED if not name.endswith("_token")))


def check_arguments(processor, arguments: dict[str, Any]) -> None:
    """Raise UserError unless the processor's chat template reads all these arguments."""
    template = get_chat_template(processor)
    for name, value in arguments.items():
        allowed = list_arguments(template) if template else ()
        if name not in allowed:
            raise UserError(
                f"the chat template has no argument {name!r}{nearest(str(name), allowed)}; it reads"
                f" {', '.join(allowed) or 'none'}"
            )
        if not isinstance(value, bool | int | float | str):
            raise UserError(
                f"the chat template's argument {name} is {value!r}, but must be true, false, a"
                " number or a text"
            )


def set_arguments(processor, arguments: dict[str, Any]) -> None:
    """Make arguments the defaults of a processor's chat template, which is saved with it.

    Args:
        processor: a processor of a built or an upgraded model; it is changed.
        arguments: values by the names that the template reads.

    Raises:
        UserError: The template does not read one of them, or a value is of another kind.
    """
    if not arguments:
        return
    check_arguments(processor, arguments)
    template = get_chat_template(processor)
    head = "".join(_write_default(name, arguments[name]) for name in sorted(arguments))
    if not template.startswith(head):
        processor.chat_template = head + template


def copy_with_arguments(processor, arguments: dict[str, Any] | None):
    """Return a processor with arguments as defaults; itself where there are none."""
    if not arguments:
        return processor
    processor = copy.copy(processor)
    set_arguments(processor, arguments)
    return processor


def _write_default(name: str, value: bool | int | float | str) -> str:
    """A statement that sets a variable where the caller of the template does not."""
    literal = json.dumps(value)  # also Jinja's words for true, false, numbers and texts
    # The plus keeps a line end at the beginning of the template.
    return f"{{% set {name} = {name} if {name} is defined else {literal} +%}}"


def find_agreeing_arguments(processor, messages: list[dict]) -> list[tuple[str, Any]]:
    """Return arguments, each of which lets a conversation's text begin with its last prompt.

    Args:
        processor: its template and tokenizer are used.
        messages: a conversation that ends with an answer.

    Returns:
        (name, value) of each, those without thoughts first.
    """
    allowed = list_arguments(get_chat_template(processor))
    tried = [*WITHOUT_THOUGHTS, *((name, True) for name, value in WITHOUT_THOUGHTS if not value)]
    found = []
    for name, value in tried:
        if name not in allowed:
            continue
        arguments = {name: value}
        try:
            prompt, _ = apply_template(
                processor, messages[:-1], add_generation_prompt=True, arguments=arguments
            )
            text, _ = apply_template(processor, messages, arguments=arguments)
        except UserError:
            continue
        closing = find_open_thought(prompt)
        if text.startswith(prompt) and (closing is None or closing in text[len(prompt) :]):
            found.append((name, value))
    return found
