"""Answers found by words that stand for others are those found by rendering up to each answer."""

import pytest
from helpers.native import GEMMA, IDEFICS
from helpers.tiny import TEMPLATE, tiny_model

from sparsecut.chat_templates import rendering as templates
from sparsecut.data import alike_conversations, rendering
from sparsecut.data.examples import Example
from sparsecut.schema import UserError

ENDS = "<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {
    "marked": TEMPLATE,
    "gemma": GEMMA,
    "idefics": IDEFICS,
    "no marks": "{% for m in messages %}" + ENDS + "<|assistant|>{% endif %}",
    "marks after a line": (
        "{% for m in messages %}{{ m.role + ':\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
    "thought in the last answer": (
        "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' and loop.last %}"
        "{{ '<think></think>' }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "instructions with the last question": (
        "{% for m in messages %}{% if m.role == 'user' and loop.index0 >= messages|length - 2 %}"
        "{{ 'be brief ' }}{% endif %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "strips": "{% for m in messages %}{{ m.role + ':' + m.content.strip() + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    "another case": "{% for m in messages %}{{ m.role + ':' + m.content.upper() + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    "reacts to a word": (
        "{% for m in messages %}{{ m.role + ':' }}{% if 'cat' in m.content and not loop.last %}"
        "{{ ' (animal) ' }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
}
TALKS = [
    ["what is it", "a cat", "are you sure", "yes"],
    ["what is it", "a dog", "are you sure", "yes, it is a dog", "where", "left", "when", "now"],
    ["what ", " a dog", "sure?\n", "yes"],
    ["what", "<think>hm</think>a dog", "sure", "<think>oh</think>yes"],
    ["wordprobe00003", "wordprobe00000", "wordprobe00001", "yes"],
    ["what", "yes", "yes", "yes", "", "yes"],
]


def render_all(processor) -> list:
    results = []
    for texts in TALKS:
        roles = ["user", "assistant"] * len(texts)
        turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
        rendering.RENDERED.clear()
        try:
            example = Example("x", [], turns, source="x")
            results.append(rendering.render_example(example, processor, "chat", add_end_token=True))
        except UserError as error:
            results.append(str(error))
    return results


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_where_rendering_up_to_each_finds_them(name, monkeypatch):
    _, processor = tiny_model()
    processor.chat_template = TEMPLATES[name]
    alike = render_all(processor)
    monkeypatch.setattr(rendering, "find_alike", lambda *given: None)
    assert alike == render_all(processor)


def test_many_turns_are_rendered_twice(monkeypatch):
    _, processor = tiny_model()
    calls = []
    render = templates.render_jinja_template
    monkeypatch.setattr(
        templates, "render_jinja_template", lambda **given: calls.append(1) or render(**given)
    )
    monkeypatch.setattr(alike_conversations, "_known", {})
    numbers = []
    for talk in range(3):
        turns = []
        for turn in range(8):
            turns.append({"role": "user", "content": f"question {talk} {turn}"})
            turns.append({"role": "assistant", "content": f"answer {talk} {turn}"})
        calls.clear()
        example = Example("x", [], turns, source="x")
        rendering.render_example(example, processor, "chat", add_end_token=False)
        numbers.append(len(calls))
    assert numbers[0] > 8
    assert numbers[1:] == [2, 2]
