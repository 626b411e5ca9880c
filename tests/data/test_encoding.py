"""Labels: what is learned is exactly what the assistant says and the token that ends it, whatever
the template.
"""

import pytest
from helpers.tiny import SPECIAL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from sparsecut.data.encoding import example_encoder
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import Example
from sparsecut.data.length_limits import Limits
from sparsecut.processing import SparseCutProcessor

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%"
    " endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + '"
    " [/INST]' }}{% elif m.role == 'system' %}{{ raise_exception('no system turn here') }}{% else"
    " %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}{% elif m.role =="
    " 'system' %}{{ m.content + ' ' }}{% else %}{{ ' ASSISTANT: ' + m.content + eos_token }}{%"
    " endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{%"
    " generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}{% else %}{{ m.content +"
    " '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ m.role + ':' }}{% if loop.last or m.role == 'user' %}{{ m.content"
    " }}{% else %}(left out){% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt"
    " %}assistant:{% endif %}"
)
TARGETS = {  # template -> targets of the answers "a red cat" and "Yes, sure."
    "chatml": (CHATML, ["a red cat<|im_end|>", "Yes, sure.<|im_end|>"]),
    "llama2": (LLAMA2, [" a red cat </s>", " Yes, sure. </s>"]),
    "vicuna": (VICUNA, [" a red cat</s>", " Yes, sure.</s>"]),
    "marked": (MARKED, ["a red cat<|im_end|>", "Yes, sure.<|im_end|>"]),
    "none": (None, [" a red cat</s>", " Yes, sure.</s>"]),
}


def processor_with(template: str | None, core: Tokenizer | None = None) -> SparseCutProcessor:
    """A processor whose tokenizer has one token per byte, so that every character shows whether it
    is learned.
    """
    if core is None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]}
    )
    tokenizer.chat_template = template
    return SparseCutProcessor(
        CLIPImageProcessorPil(), tokenizer, image_size=8, tiles=2, num_image_tokens=4
    )


def make_example(*turns: str, images=("a.png",), system: str | None = None) -> Example:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Example("x", list(images), messages, source="talk.json record 0")


def encode(example, processor, template="chat", max_length=None) -> dict[str, list[int]]:
    """Token ids and labels of an example, as lists."""
    encoder = example_encoder(processor, template, Limits(max_length=max_length))
    return {name: values.tolist() for name, values in encoder.encode(example).items()}


def get_targets(encoded, processor) -> list[str]:
    """Runs of target tokens, as text."""
    runs = []
    before = -100
    for label in encoded["labels"]:
        if label != -100 and before == -100:
            runs.append([])
        if label != -100:
            runs[-1].append(label)
        before = label
    return [processor.tokenizer.decode(run) for run in runs]


EXAMPLE = make_example(
    "<image>\nWhat is this?", "a red cat", "Are you sure?\nSay <|im_start|> yes", "Yes, sure."
)


@pytest.mark.parametrize("name", TARGETS)
def test_labels_are_the_answers_and_their_end_tokens(name):
    template, expected = TARGETS[name]
    processor = processor_with(template)
    encoded = encode(EXAMPLE, processor)
    assert get_targets(encoded, processor) == expected
    num_image_tokens = 0
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        assert label in (-100, token)
        if token == processor.image_token_id:
            num_image_tokens += 1
            assert label == -100
    assert num_image_tokens == 4


@pytest.mark.parametrize("name", TARGETS)
def test_token_ids_are_those_of_inference(name):
    processor = processor_with(TARGETS[name][0])
    ids = encode(EXAMPLE, processor)["input_ids"]
    text = processor.apply_chat_template(EXAMPLE.messages, tokenize=False)
    special = not text.startswith(processor.tokenizer.bos_token)

    def tokenize(text: str) -> list[int]:
        expanded = processor.expand(text)
        return processor.tokenizer(expanded, add_special_tokens=special)["input_ids"]

    assert ids == tokenize(text)
    question = processor.apply_chat_template(
        EXAMPLE.messages[:1], tokenize=False, add_generation_prompt=True
    )
    prompt = tokenize(question)
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ["chatml", "vicuna", "marked", "none"])
def test_a_system_turn_is_no_target(name):
    template, expected = TARGETS[name]
    processor = processor_with(template)
    example = make_example(*(m["content"] for m in EXAMPLE.messages), system="Be brief.")
    assert get_targets(encode(example, processor), processor) == expected


def test_a_merge_across_the_boundary_is_a_target():
    characters = sorted(set("USER:ASTN qyes<image>/"))
    vocabulary = {token: i for i, token in enumerate([*characters, ": ", ": y", "es"])}
    merges = [(":", " "), (": ", "y"), ("e", "s")]
    processor = processor_with(None, Tokenizer(models.BPE(vocabulary, merges)))
    processor.chat_template = (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content + eos_token"
        " }}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    ).replace("Q", "U")
    encoded = encode(make_example("<image>", "yes"), processor)
    tokens = processor.tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    # In pieces it would be "A", ": ", "y", "es".
    assert tokens[-4:] == ["A", ": y", "es", "</s>"]
    assert [label != -100 for label in encoded["labels"]][-4:] == [False, True, True, True]


def test_targets_of_plain_are_caption_and_end_only():
    processor = processor_with(CHATML)
    encoded = encode(make_example("Describe it.\n<image>", " a red cat "), processor, "plain")
    assert processor.tokenizer.decode(encoded["input_ids"]) == "<image>" * 4 + "a red cat</s>"
    assert get_targets(encoded, processor) == ["a red cat</s>"]


def test_another_placeholder_is_written_where_the_processor_has_one():
    processor = processor_with(CHATML)
    processor.image_token = "<|im_start|>"
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = encode(make_example("<image>\nWhat?", "cat"), processor, "plain")["input_ids"]
    assert ids[:4] == [processor.image_token_id] * 4


def test_max_length_cuts_answers_but_never_images():
    processor = processor_with(VICUNA)
    full = encode(EXAMPLE, processor)["input_ids"]
    assert encode(EXAMPLE, processor, max_length=40)["input_ids"] == full[:40]
    with pytest.raises(RecordError, match=r"talk.json record 0: .*2 of 4"):
        encode(EXAMPLE, processor, max_length=full.index(processor.image_token_id) + 2)
    with pytest.raises(RecordError, match="raise max_length"):
        encode(EXAMPLE, processor, max_length=full.index(processor.image_token_id) + 6)


@pytest.mark.parametrize(
    "template, sentence",
    [
        (FORGETFUL, "turn 2"),
        (LLAMA2, "no system turn here"),
        (
            MARKED.replace("== 'assistant'", "== 'robot'"),
            "marks 0 answers.* 2",
        ),
    ],
)
def test_templates_that_hide_the_answers_are_refused(template, sentence):
    processor = processor_with(CHATML)
    processor.chat_template = template
    with pytest.raises(RecordError, match=rf"^talk.json record 0: .*{sentence}"):
        encode(
            make_example(*(m["content"] for m in EXAMPLE.messages), system="Be brief."), processor
        )


def test_a_tokenizer_that_does_not_say_where_tokens_stand_is_refused(monkeypatch):
    processor = processor_with(CHATML)
    monkeypatch.setattr(type(processor.tokenizer), "is_fast", False)
    with pytest.raises(RecordError, match="use_fast=True"):
        encode(EXAMPLE, processor)


def test_plain_needs_one_caption_and_an_end_token():
    processor = processor_with(CHATML)
    with pytest.raises(RecordError, match=r"one caption.* 2 answers"):
        encode(EXAMPLE, processor, "plain")
    processor.tokenizer.eos_token = None
    with pytest.raises(RecordError, match="eos_token"):
        encode(make_example("<image>", "a cat"), processor, "plain")
