"""Templates that mark answers, made of templates that do not: same text, our training's spans."""

import pytest
from helpers.native import GEMMA, IDEFICS
from helpers.tiny import TEMPLATE, tiny_model
from helpers.trl_runs import KINDS, answer, ask, build_for_trl, make_image

from sparsecut.chat_templates.answer_marks import mark_answers
from sparsecut.chat_templates.arguments import GENERATION_TAG
from sparsecut.chat_templates.rendering import apply_template
from sparsecut.data.examples import Example
from sparsecut.data.rendering import render_example
from sparsecut.schema import UserError

TALK = ["what is it", "a cat", "are you sure", "yes"]
# It drops an empty thought once more turns follow, has a macro and variables of its own, and ends
# with an empty line.
THINKING = """\
{%- macro write(role) %}<s>{{ role }}
{% endmacro %}
{%- set marked = namespace(last=0) %}
{%- for message in messages if message['role'] == 'user' %}{% set marked.last = loop.index0 %}
{%- endfor %}
{%- for message in messages %}
{{- write(message['role']) }}
{%- if message['role'] == 'assistant' and loop.last %}<think></think>

{% endif %}
{%- set text = message['content'] %}
{{- text }}</s>
{% endfor %}
{%- if add_generation_prompt %}{{ write('assistant') }}{% endif %}

"""
TEMPLATES = {
    "plain": GENERATION_TAG.sub("", TEMPLATE),
    "gemma": GEMMA,
    "idefics": IDEFICS.replace("'Assistant:'", "'Assistant: '"),
    "thinking": THINKING,
}


def talk(turns):
    roles = ["user", "assistant"] * len(turns)
    return [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]


@pytest.mark.parametrize("turns", [TALK, TALK[:2]])
@pytest.mark.parametrize("name", TEMPLATES)
def test_marks_stand_where_our_own_training_learns(name, turns):
    _, processor = tiny_model()
    if name == "idefics":
        turns = [f" {turn}" for turn in turns]
    processor.chat_template = TEMPLATES[name]
    rendered = render_example(
        Example("x", [], talk(turns), source="x"), processor, "chat", add_end_token=False
    )
    marked = mark_answers(processor)
    text, spans = apply_template(marked, talk(turns), marks=True)
    assert (text, spans) == (rendered.text, rendered.spans)
    again = render_example(
        Example("x", [], talk(turns), source="x"), marked, "chat", add_end_token=False
    )
    assert again == rendered
    prompt, _ = apply_template(marked, talk(turns[:1]), add_generation_prompt=True)
    assert prompt == apply_template(processor, talk(turns[:1]), add_generation_prompt=True)[0]
    assert processor.chat_template == TEMPLATES[name]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_cover_the_answers_after_image_tokens(kind, tmp_path):
    processor = mark_answers(build_for_trl(kind)[1])
    processor.save_pretrained(tmp_path)
    inputs = processor.apply_chat_template(
        [ask_with_images(2) + answer("a red cat") + ask_with_images(1) + answer("no")],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    tokenizer = processor.tokenizer
    learned = tokenizer.decode(inputs["input_ids"][inputs["assistant_masks"] == 1])
    end = "<|im_end|>" if kind == "qwen2_5_vl" else tokenizer.eos_token
    assert learned.replace(" ", "") == f"aredcat{end}no{end}"
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape


def ask_with_images(count):
    turn = ask(count)[0]
    parts = [
        {**part, "image": make_image(1)} if part["type"] == "image" else part
        for part in turn["content"]
    ]
    return [{**turn, "content": parts}]


def test_a_template_with_marks_stays_and_one_without_answers_is_refused():
    _, processor = tiny_model()
    assert mark_answers(processor) is processor
    processor.chat_template = "{% for m in messages %}{{ m['content'].upper() }}{% endfor %}"
    with pytest.raises(UserError):
        mark_answers(processor)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(UserError):
        mark_answers(processor)
