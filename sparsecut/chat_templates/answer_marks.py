"""Chat templates that mark answers, made of any template that does not.

`assistant_only_loss` of TRL and `return_assistant_tokens_mask` of transformers read the marks
`{% generation %}`. Most templates have none. A marked one writes the same text: it renders the own
template as a whole, and up to each answer, and puts the marks where these texts part. Our own
training finds answers in the same way.
"""

from __future__ import annotations

import copy
import json

from ..schema import UserError
from .arguments import GENERATION_TAG
from .markers import find_markers
from .rendering import TURN_PROBE, apply_template, get_chat_template

# The plus keeps line ends and spaces at both ends of the own template.
MACRO = "{%- macro marks_write(messages, add_generation_prompt) +%}OWN{%+ endmacro -%}"
# Where an answer begins and ends in `marks.text`. The last branch is for templates that write an
# answer in another way once more turns follow, as many do with thoughts.
FIND = """\
{%- set marks_prompt = marks_write(messages[:loop.index0], true) -%}
{%- set marks_after = marks_write(messages[:loop.index], false).rstrip() -%}
{%- set marks_follows = marks.text.startswith(marks_prompt) -%}
{%- set marks_fits = marks_follows and marks.text.startswith(marks_after) -%}
{%- if marks_fits and marks_prompt | length < marks_after | length -%}
{%- set marks.start = marks_prompt | length -%}
{%- set marks.end = marks_after | length -%}
{%- else -%}
{%- set marks_probe = 'marksprobe' -%}
{%- if marks_turn['content'] is not string -%}
{%- set marks_probe = [dict(type='text', text='marksprobe')] -%}
{%- endif -%}
{%- set marks_others = messages[:loop.index0] + [dict(marks_turn, content=marks_probe)] -%}
{%- set marks_others = marks_others + messages[loop.index:] -%}
{%- set marks_pieces = marks_write(marks_others, add_generation_prompt).split('marksprobe') -%}
{%- if marks_pieces | length != 2 or not marks.text.startswith(marks_pieces[0])
       or not marks.text.endswith(marks_pieces[1]) -%}
{{- raise_exception('the answer of turn ' ~ loop.index0 ~ ' cannot be found in the text') -}}
{%- endif -%}
{%- set marks.start = marks_pieces[0] | length -%}
{%- if marks_follows and marks_prompt | length < marks.start -%}
{%- set marks.start = marks_prompt | length -%}
{%- endif -%}
{%- set marks.end = marks.text | length - marks_pieces[1] | length -%}
{%- set marks.end = marks.start + marks.text[marks.start:marks.end].rstrip() | length -%}
{%- endif -%}
{%- for marks_token in ENDS -%}
{%- if marks.text[marks.end:].startswith(marks_token) and not marks.is_ended -%}
{%- set marks.end = marks.end + marks_token | length -%}
{%- set marks.is_ended = true -%}
{%- endif -%}
{%- endfor -%}
"""
TEMPLATE = (
    MACRO
    + """\
{%- set marks = namespace(text=marks_write(messages, add_generation_prompt), done=0) -%}
{%- for marks_turn in messages -%}
{%- if marks_turn['role'] == 'assistant' -%}
{%- set marks.is_ended = false -%}
"""
    + FIND
    + """\
{{- marks.text[marks.done:marks.start] -}}
{%- generation -%}{{- marks.text[marks.start:marks.end] -}}{%- endgeneration -%}
{%- set marks.done = marks.end -%}
{%- endif -%}
{%- endfor -%}
{{- marks.text[marks.done:] -}}"""
)
TURNS = ({"role": "user"}, {"role": "assistant"})


def mark_answers(processor):
    """Return a processor whose chat template marks answers by `{% generation %}`.

    The text stays the same. A processor whose template marks answers already is returned as it is.

    Args:
        processor: A processor of a built or an upgraded model. It is not changed.

    Raises:
        UserError: There is no chat template, or its answers cannot be found by rendering.
    """
    template = get_chat_template(processor)
    if template is None:
        raise UserError(
            f"{type(processor).__name__} has no chat template, so there are no answers to mark; set"
            " processor.chat_template"
        )
    if GENERATION_TAG.search(template):
        return processor
    marked = copy.copy(processor)
    marked.chat_template = _build_template(template, find_markers(processor, ends_only=True))
    _check(processor, marked)
    return marked


def _build_template(own: str, end_tokens: tuple[str, ...]) -> str:
    ends = json.dumps(list(end_tokens), ensure_ascii=False)
    # Jinja drops one line end at the end of a template.
    return TEMPLATE.replace("ENDS", ends).replace("OWN", own.removesuffix("\n"), 1)


def _check(processor, marked) -> None:
    """Raise UserError where a marked template writes other text than the own one, or marks none."""
    messages = []
    for number, turn in enumerate(TURNS):
        messages.append({**turn, "content": TURN_PROBE.format(number)})
    expected, _ = apply_template(processor, messages)
    text, spans = apply_template(marked, messages, marks=True)
    answer = messages[-1]["content"]
    if text == expected and len(spans) == 1 and answer in text[slice(*spans[0])]:
        return
    raise UserError(
        "the answers of this chat template cannot be marked by rendering it; put {% generation %}"
        " and {% endgeneration %} around the assistant's turn in processor.chat_template"
    )
