"""Thinking templates: prompt + learned = the whole text, and what was learned scores 1.

The templates imitate kinds of public ones, in a few lines each.
"""

import pytest
import torch
from helpers.native import byte_tokenizer
from transformers import CLIPImageProcessorPil

from sparsecut.chat_templates.answer_stream import AnswerStreamer
from sparsecut.chat_templates.arguments import set_arguments
from sparsecut.chat_templates.thoughts import read_answer, strip_thoughts
from sparsecut.data.encoding import example_encoder
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import Example
from sparsecut.evaluation.exact_match import exact_match
from sparsecut.evaluation.judging import get_answer, judge
from sparsecut.processing import SparseCutProcessor
from sparsecut.prompts import encode_prompts, read_answers, render_prompt
from sparsecut.schema import UserError

IM = "{{ '<|im_start|>' + m.role + '\n' }}"
# Writes an empty thought into the last answer, drops those of earlier ones, and asks without.
FORGETS = (
    "{% for m in messages %}" + IM + "{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' }}{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}"
    "{{ '\n</think>\n\n' }}{% endif %}{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Asks with an open thought, and writes answers without; an argument closes it.
OPENS = (
    "{% for m in messages %}" + IM + "{{ ('<think></think>' if m.role == 'assistant' else '')"
    " + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n<think>' + ('</think>' if enable_thinking is false else '\n') }}"
    "{% endif %}"
)
OPENS_ALWAYS = (
    "{% for m in messages %}" + IM + "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# Ends the last answer by another token, and answers in a channel of special tokens.
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}"
    "{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
ENDS_TWICE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else eos_token }}"
)
MARKED = FORGETS.replace(
    "{{ c + '<|im_end|>\n' }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ c + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ c + '<|im_end|>\n' }}{% endif %}",
)
TOKENS = ("<image>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|return|>")
CHANNEL_TOKENS = ("<|channel|>", "<|message|>")
QUESTION = "<image>\nWhat is this?"
EMPTY = "<think>\n\n</think>\n\n"


def make_processor(template: str, arguments: dict | None = None) -> SparseCutProcessor:
    """A processor with this template; every byte is a token."""
    tokenizer = byte_tokenizer(*TOKENS, *CHANNEL_TOKENS)
    tokenizer.chat_template = template
    processor = SparseCutProcessor(
        CLIPImageProcessorPil(), tokenizer, image_size=8, tiles=2, num_image_tokens=4
    )
    set_arguments(processor, arguments or {})
    return processor


def make_example(*turns: str, system: str | None = None) -> Example:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Example("x", ["a.png"], messages, source="talk.json record 0")


def find_learned(encoded: dict) -> list[list[int]]:
    """Runs of learned tokens."""
    runs = []
    before = -100
    for label in encoded["labels"].tolist():
        if label != -100:
            if before == -100:
                runs.append([])
            runs[-1].append(label)
        before = label
    return runs


def learn(processor, example: Example) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """(learned texts, ids of the last prompt, ids that the last prompt's answer has)."""
    encoded = example_encoder(processor).encode(example)
    runs = find_learned(encoded)
    prompt = render_prompt(processor, example.messages[:-1])
    ids = encode_prompts(processor, [prompt], None)["input_ids"][0]
    length = len(ids)
    assert encoded["input_ids"][:length].tolist() == ids.tolist()
    assert encoded["input_ids"][length : length + len(runs[-1])].tolist() == runs[-1]
    return [processor.tokenizer.decode(run) for run in runs], ids, torch.tensor(runs[-1])


TWO = make_example(QUESTION, "a red cat", "Are you sure?", "Yes, sure.")
ONE = make_example(QUESTION, "a red cat")


@pytest.mark.parametrize(
    ("template", "arguments", "learned"),
    [
        (FORGETS, {}, ["a red cat<|im_end|>", EMPTY + "Yes, sure.<|im_end|>"]),
        (FORGETS, {"enable_thinking": False}, ["a red cat<|im_end|>", "Yes, sure.<|im_end|>"]),
        (OPENS, {"enable_thinking": False}, ["a red cat<|im_end|>", "Yes, sure.<|im_end|>"]),
        (
            CHANNELS,
            {},
            [
                f"<|channel|>final<|message|>{text}"
                for text in ("a red cat<|end|>", "Yes, sure.<|return|>")
            ],
        ),
        (ENDS_TWICE, {}, ["a red cat<|im_end|>", "Yes, sure.<|im_end|>\n</s>"]),
        (MARKED, {"enable_thinking": False}, ["a red cat<|im_end|>", "Yes, sure.<|im_end|>"]),
    ],
)
def test_what_follows_the_prompt_is_learned_and_scores(template, arguments, learned):
    processor = make_processor(template, arguments)
    for example, expected in ((TWO, learned), (ONE, None)):
        texts, prompt, answer = learn(processor, example)
        if expected:
            assert texts == expected
        reference = example.messages[-1]["content"]
        ids = torch.cat([prompt, answer])[None]
        read = read_answers(processor, {"input_ids": prompt[None]}, ids)[0]
        assert read.text == reference
        record = {"reference": reference, "prompt": "x"}
        assert judge(record, read, "exact_match")["correct"]


def test_a_thought_of_the_record_is_learned_in_the_last_answer_only(caplog):
    thoughtful = "<think>\nIt is round.\n</think>\n\n"
    processor = make_processor(FORGETS)
    example = make_example(QUESTION, thoughtful + "a red cat", "Sure?", thoughtful + "yes")
    texts, _, answer = learn(processor, example)
    assert texts == ["a red cat<|im_end|>", f"{thoughtful}yes<|im_end|>"]
    read = read_answer(processor.tokenizer, answer.tolist())
    assert (read.text, read.raw) == ("yes", f"{thoughtful}yes")
    judged = judge({"reference": thoughtful + "yes"}, read, "exact_match")
    assert judged == {"prediction": f"{thoughtful}yes", "correct": True, "answer": "yes"}
    with pytest.raises(RecordError, match="enable_thinking: true"):
        learn(make_processor(FORGETS, {"enable_thinking": False}), example)


@pytest.mark.parametrize("template", [OPENS, OPENS_ALWAYS])
def test_a_prompt_with_an_open_thought_is_told_from_dropped_thoughts(template):
    with pytest.raises(RecordError, match=r"^talk.json record 0: .*<think>") as error:
        learn(make_processor(template), TWO)
    assert ("enable_thinking: false" in str(error.value)) == (template == OPENS)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("red", "red"),
        (EMPTY + "red", "red"),
        ("<think>It may be blue.</think>red", "red"),
        (EMPTY * 2 + "No, it is not.", "No, it is not."),
        ("</think>red", "red"),
        ("<think>It may be", ""),
        ("[THINK]x[/THINK]red", "red"),
        ("◁think▷x◁/think▷red", "red"),
        ("<|channel>thought\nx<channel|>red", "red"),
        ("The tag <think> opens a thought, </think> ends it.",) * 2,
        ("a <b> c", "a <b> c"),
    ],
)
def test_thoughts_before_an_answer_are_no_part_of_it(text, answer):
    assert strip_thoughts(text) == answer
    tokenizer = byte_tokenizer()
    read = read_answer(tokenizer, tokenizer(text)["input_ids"])
    assert (read.text, read.raw) == (answer, text.strip())
    streamer = AnswerStreamer(tokenizer)
    streamer.put(torch.tensor([[1, 2]]))
    for token in tokenizer(text)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(streamer).strip() == answer


def test_answers_after_a_prompt_that_opens_a_thought():
    tokenizer = byte_tokenizer()
    for text, answer in (("x\n</think>\n\nred", "red"), ("still thinking", "")):
        ids = tokenizer(text)["input_ids"]
        assert read_answer(tokenizer, ids, "</think>").text == answer
        record = {"prompt": "user: what?\nassistant: <think>\n", "prediction": text}
        assert get_answer(record) == answer
    assert exact_match("Red.", "red")


def test_arguments_become_defaults_that_are_saved_and_can_be_given_anew(tmp_path):
    processor = make_processor(FORGETS, {"enable_thinking": False})
    messages = [{"role": "user", "content": "what"}]
    closed = render_prompt(processor, messages)
    assert closed.endswith(EMPTY)
    assert not render_prompt(processor, messages, {"enable_thinking": True}).endswith(EMPTY)
    before = processor.chat_template
    set_arguments(processor, {"enable_thinking": False})
    assert processor.chat_template == before
    processor.save_pretrained(tmp_path)
    loaded = SparseCutProcessor.from_pretrained(tmp_path)
    assert render_prompt(loaded, messages) == closed
    set_arguments(loaded, {"enable_thinking": True})
    assert not render_prompt(loaded, messages).endswith(EMPTY)


def test_mistaken_arguments_are_named():
    processor = make_processor(FORGETS)
    for arguments, fact in (
        ({"enable_thinkin": False}, "'enable_thinking'"),
        ({"messages": "x"}, "'messages'"),
        ({"enable_thinking": [1]}, r"\[1\]"),
    ):
        with pytest.raises(UserError, match=fact):
            set_arguments(processor, arguments)
        with pytest.raises(UserError, match=fact if "[" not in fact else "1"):
            render_prompt(processor, [{"role": "user", "content": "x"}], arguments)


# Asks with an open thought, and writes the thoughts of records into it.
KEEPS = OPENS_ALWAYS.replace("m.content.split('</think>')[-1]", "m.content")
# Asks with a thought that is ended, before it was begun.
ENDED = KEEPS.replace("<think>\n' }}{% endif %}", "</think>' }}{% endif %}")


def test_a_thought_of_the_record_goes_on_where_the_prompt_has_opened_it():
    thoughtful = "<think>\nIt is round.\n</think>\n\n"
    texts, prompt, answer = learn(make_processor(KEEPS), make_example(QUESTION, thoughtful + "red"))
    assert texts == [thoughtful.removeprefix("<think>\n") + "red<|im_end|>"]
    processor = make_processor(KEEPS)
    ids = torch.cat([prompt, answer])[None]
    read = read_answers(processor, {"input_ids": prompt[None]}, ids)[0]
    assert read.text == "red"
    for template in (OPENS_ALWAYS, ENDED):
        with pytest.raises(RecordError):
            learn(make_processor(template), make_example(QUESTION, thoughtful + "red"))
