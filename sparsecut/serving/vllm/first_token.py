"""A prompt's first token in vLLM's chat completions, as in all other prompts of a model."""

from __future__ import annotations

import json
import logging
from typing import Any

from ...chat_markup import PROBE, drop_end_token
from ...chat_templates.rendering import get_chat_template
from ...prompts import adds_special_tokens, render_prompt

logger = logging.getLogger(__name__)


def make_chat_template(processor: Any) -> str | None:
    """Return a chat template that writes what the tokenizer writes before a text.

    Where the model's own template does not write a first token, the tokenizer does. vLLM's chat
    completions take from the tokenizer nothing that a request does not ask for, so the template has
    to write it.

    Args:
        processor: The model's processor.

    Returns:
        The template, or None where the model's own does.
    """
    tokenizer = processor.tokenizer
    drop_end_token(tokenizer)
    template = get_chat_template(processor)
    if template is None:
        return None
    text = render_prompt(processor, [{"role": "user", "content": PROBE}])
    ids = tokenizer(text, add_special_tokens=adds_special_tokens(processor, text))["input_ids"]
    inner = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids == inner:
        return None
    first = "".join(tokenizer.convert_ids_to_tokens(ids[: len(ids) - len(inner)]))
    if tokenizer(first + text, add_special_tokens=False)["input_ids"] != ids:
        logger.warning(
            "The tokenizer writes %s before a prompt, and no chat template can write the same; give"
            " add_special_tokens: true in requests to vLLM.",
            first,
        )
        return None
    return "{{- " + json.dumps(first, ensure_ascii=False) + " }}" + template
