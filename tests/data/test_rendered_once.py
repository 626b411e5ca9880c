"""A conversation is rendered once for checking and encoding, and anew where anything differs."""

import pytest
from helpers.tiny import tiny_model

from sparsecut.chat_templates import rendering as templates
from sparsecut.data import rendering
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import Example
from sparsecut.schema import UserError


def make_example(*texts: str) -> Example:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return Example("one", [], messages)


@pytest.fixture
def count(monkeypatch):
    """How often a template was rendered since the fixture was made."""
    calls = []
    render = templates.render_jinja_template
    monkeypatch.setattr(
        templates, "render_jinja_template", lambda **given: calls.append(1) or render(**given)
    )
    monkeypatch.setattr(rendering, "RENDERED", {})
    return lambda: len(calls)


@pytest.fixture
def processor():
    return tiny_model()[1]


def test_many_conversations_are_rendered_once_and_encoded_alike(count, processor, monkeypatch):
    # As with more texts than the templates' own memory holds.
    monkeypatch.setattr(rendering, "apply_template", apply_uncached)
    examples = [make_example("what", f"{i}", "is", "it", "so", "yes") for i in range(20)]
    encoder = example_encoder(processor)
    first = [encoder.encode(example) for example in examples]
    rendered = count()
    assert rendered >= 20
    again = [encoder.encode(example) for example in examples]
    assert count() == rendered
    for one, other in zip(first, again, strict=True):
        assert one["input_ids"].equal(other["input_ids"])
        assert one["labels"].equal(other["labels"])


def apply_uncached(*args, **kwargs):
    return templates.apply_template(*args, **{**kwargs, "cached": False})


def render(example, processor, add_end_token=False):
    return rendering.render_example(example, processor, "chat", add_end_token=add_end_token)


def test_another_template_answer_or_token_is_rendered_anew(processor):
    example = make_example("what", "yes")
    before = render(example, processor)
    other_answer = render(make_example("what", "no"), processor)
    assert other_answer != before
    template = templates.get_chat_template(processor)
    processor.chat_template = template.replace("USER", "HUMAN")
    assert processor.chat_template != template
    assert render(example, processor).text.count("HUMAN") == 1
    processor.chat_template = template
    assert render(example, processor) == before


def test_what_is_kept_has_a_limit(count, processor, monkeypatch):
    monkeypatch.setattr(rendering, "MOST_RENDERED", 5)
    for number in range(23):
        render(make_example("what", f"{number}"), processor)
        assert len(rendering.RENDERED) <= 5


def test_a_refused_conversation_is_refused_again(processor):
    processor.chat_template = "{{ messages[0]['content'] }}"
    for _ in range(2):
        with pytest.raises(UserError):
            render(make_example("what", "yes"), processor)
