"""A server answers without thoughts, takes arguments of the chat template, and no turn markers."""

import pytest
import torch
from helpers.native import byte_tokenizer
from helpers.tiny import tiny_language, tiny_vision
from transformers import CLIPImageProcessorPil

from sparsecut import build
from sparsecut.schema import UserError
from sparsecut.serving.decoding import GenerationRow, SamplingParams, join_deltas
from sparsecut.serving.prompt_reader import PromptReader
from sparsecut.serving.protocol import RequestLimits, parse_chat_request

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{{ date }}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "what"}]


@pytest.fixture(scope="module")
def reader():
    """The reader of requests for a tiny model with a thinking template."""
    tokenizer = byte_tokenizer("<image>", "<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    language = tiny_language()
    language.resize_token_embeddings(len(tokenizer))
    model, processor = build(
        tiny_vision(), language, image_processor=CLIPImageProcessorPil(), tokenizer=tokenizer
    )
    return PromptReader(model, processor, uses_views=True)


def write_answer(text: str, closing: str | None = None, **settings):
    """What a client gets of an answer whose tokens, one per byte, are those of a text."""
    tokenizer = byte_tokenizer()
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    sampling = SamplingParams(max_new_tokens=500, temperature=0.0, **settings)
    deltas = []
    row = GenerationRow(0, sampling, tokenizer, {ids[-1]}, deltas.append, closing=closing)
    for token in ids:
        if row.finish_reason is None:
            row.choose(torch.zeros(len(tokenizer)).index_fill(0, torch.tensor(token), 9.0))
    return deltas, join_deltas(deltas, 1)[0]


@pytest.mark.parametrize(
    ("text", "closing", "answer"),
    [
        ("a red cat", None, "a red cat"),
        ("<think>\nred?\n</think>\n\na red cat", None, "a red cat"),
        ("red?\n</think>\n\na red cat", "</think>", "a red cat"),
        ("<think>red?", None, ""),
        ("<th", None, "<th"),
        ("  <b>bold</b>", None, "<b>bold</b>"),
    ],
)
def test_an_answer_is_sent_without_its_thought(text, closing, answer):
    deltas, whole = write_answer(text, closing, top_logprobs=0)
    assert (whole.text, whole.finish_reason) == (answer, "stop")
    assert "".join(entry["token"] for entry in whole.tokens).strip() == answer
    assert len(deltas) >= len(answer.split())


def test_stop_strings_count_in_the_answer_alone():
    _, whole = write_answer("<think>red or blue</think>a red cat", stop=("red",))
    assert (whole.text.strip(), whole.finish_reason) == ("a", "stop")


def test_arguments_of_the_template_come_with_a_request(reader):
    limits = RequestLimits()
    body = {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}}
    arguments = parse_chat_request(body, limits).chat_template_kwargs
    assert arguments == {"enable_thinking": False}
    assert reader.build_prompt(MESSAGES, arguments).endswith("assistant\n<think></think>")
    assert reader.build_prompt(MESSAGES).endswith("assistant\n")
    for mistaken in ({"enable_thinkin": False}, {"date": "x<|im_end|>"}, {"date": "x" * 1000}):
        with pytest.raises(UserError, match=next(iter(mistaken))):
            reader.build_prompt(MESSAGES, mistaken)
    for mistaken in ([], {"enable_thinking": [1]}, {"enable_thinking": {}}):
        with pytest.raises(UserError, match="chat_template_kwargs"):
            parse_chat_request({**body, "chat_template_kwargs": mistaken}, limits)


def test_turn_markers_are_reserved(reader):
    assert {"<|im_start|>", "<|im_end|>", "<image>"} <= set(reader.reserved)
