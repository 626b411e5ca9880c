"""What a processor adds to a tokenizer: the placeholder, and a chat template that takes images."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from tokenizers.processors import TemplateProcessing

from .schema import UserError

PROBE = "probe"  # text that shows which form of contents a chat template writes

# Precedes the tokenizer's chat template, which often accepts string contents only. It turns a list
# of {"type": "image"} and {"type": "text"} items into one string, with one placeholder per image on
# a line of its own.
FLATTEN = """\
{%- set ns = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is not iterable -%}
{%- set ns.messages = ns.messages + [message] -%}
{%- else -%}
{%- set ns.text = '' -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{%- set ns.text = ns.text + 'IMAGE_TOKEN' + ('' if loop.last else '\\n') -%}
{%- elif item['type'] == 'text' -%}
{%- set ns.text = ns.text + item['text'] -%}
{%- else -%}
{{- raise_exception('content items are images or texts, but one has type ' + item['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- set ns.messages = ns.messages + [dict(message, content=ns.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ns.messages %}"""

# Follows FLATTEN before templates that take lists of parts only: the text becomes one part.
WRAP = """\
{%- set ns.messages = [] -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set part = dict(type='text', text=message['content']) -%}
{%- set ns.messages = ns.messages + [dict(message, content=[part])] -%}
{%- else -%}
{%- set ns.messages = ns.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ns.messages %}"""

# For tokenizers without a template. Its words are plain, so that any vocabulary has them.
DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
ASSISTANT:{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{%- elif message['role'] == 'system' -%}
{{ message['content'] + ' ' }}
{%- else -%}
{{ ('' if loop.first else ' ') + 'USER: ' + message['content'] + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""


def get_placeholder_id(tokenizer: Any, placeholder: str) -> int:
    """The id of the placeholder; UserError where the tokenizer has no such token."""
    token_id = tokenizer.convert_tokens_to_ids(placeholder)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise UserError(
            f"the tokenizer has no token {placeholder!r}; add it with"
            f" tokenizer.add_special_tokens({{'additional_special_tokens': [{placeholder!r}]}})"
            " or name another token"
        )
    if placeholder not in tokenizer.get_added_vocab():
        # An ordinary word of the vocabulary: two of them in a row would be read as another word.
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [placeholder]}, replace_extra_special_tokens=False
        )
    return token_id


def drop_end_token(tokenizer: Any) -> None:
    """Let a tokenizer append no end token to texts, as generation would go on after the end.

    What it writes before texts, such as a first token, stays.
    """
    if not tokenizer.is_fast:
        return
    ids = tokenizer("a")["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    num_added = len(ids) - len(inner)
    starts = [i for i in range(num_added + 1) if ids[i : i + len(inner)] == inner]
    if not starts or starts[0] == num_added:
        return
    before = ids[: starts[0]]
    tokens = tokenizer.convert_ids_to_tokens(before)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*tokens, "$A"]),
        special_tokens=list(dict(zip(tokens, before, strict=True)).items()),
    )


def make_chat_template(tokenizer: Any, placeholder: str) -> str:
    """The tokenizer's chat template, or ours if it has none, extended to accept image items."""
    own_template = tokenizer.get_chat_template() if tokenizer.chat_template else DEFAULT_TEMPLATE
    head = FLATTEN.replace("IMAGE_TOKEN", placeholder)
    if _takes_strings(tokenizer, own_template):
        return head + own_template
    return head + WRAP + own_template


def mend_chat_template(tokenizer: Any, placeholder: str, template: str) -> str:
    """A saved chat template, made fit for its own part where an older version did not see to it."""
    head = FLATTEN.replace("IMAGE_TOKEN", placeholder)
    own_template = template.removeprefix(head)
    if own_template == template or own_template.startswith(WRAP):
        return template
    return template if _takes_strings(tokenizer, own_template) else head + WRAP + own_template


def _takes_strings(tokenizer: Any, template: str) -> bool:
    """Whether a template writes contents that are strings; some take lists of parts only."""

    def writes(content: Any) -> bool:
        messages = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (TemplateError, TypeError):
            return False
        return PROBE in text and "'type'" not in text

    return writes(PROBE) or not writes([{"type": "text", "text": PROBE}])
