"""Words that a tokenizer does not know: refused where they are learned, told where they are read."""

import json
import logging
from pathlib import Path

import pytest
from helpers.runs import recipe, stage
from helpers.tiny import TEMPLATE, tiny_llava, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparsecut.chat import Chat
from sparsecut.chat_templates.unknown_words import find_unknown_words, get_unknown_id
from sparsecut.data import validation
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import Example
from sparsecut.data.unknown_records import UnknownCount
from sparsecut.data.validation import check_examples
from sparsecut.profiling.dry_run_data import read_record_facts
from sparsecut.schema import UserError
from sparsecut.shapes.vocabulary import make_tokenizer
from sparsecut.training.stages import check_recipe, train

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
MAKERS = {"built": tiny_model, "upgraded": tiny_llava}
DOCS = Path(__file__).parents[2] / "docs"
CHANGES = {"built": {}, "upgraded": {"model": {"base": "tiny"}}}


def write_texts(folder, pairs):
    """A recipe's stage of records without images, from questions and answers."""
    records = []
    for number, (question, answer) in enumerate(pairs):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": f"id{number}", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return stage(folder)


def make_byte_tokenizer(**special):
    """A byte-level tokenizer, which can write any word."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = list(dict.fromkeys(special.values()))
    core.train_from_iterator(
        ["what is it"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_word_tokenizer(**special):
    """A tokenizer of four words and some special tokens."""
    words = [*dict.fromkeys(special.values()), "what", "cat", "USER", "ASSISTANT", ":"]
    ids = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def count(processor, pairs, **limits):
    """What the check of some records counts."""
    examples = []
    for number, (question, answer) in enumerate(pairs):
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        examples.append(Example(str(number), [], turns))
    unknown = UnknownCount()
    check_examples(examples, example_encoder(processor, **limits), unknown=unknown)
    return unknown


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("changes", [{}, {"pack": 64}], ids=["rows", "packed"])
def test_unknown_answers_are_refused_before_anything_is_written(tmp_path, kind, changes):
    model, processor = MAKERS[kind]()
    pairs = [("what is it", "a cat"), ("what is it", "a zebra"), ("what is it", "gnu zebra")]
    written = write_texts(tmp_path, pairs)
    parsed = recipe(tmp_path, {**written, **changes}, **CHANGES[kind])
    facts = r"(?s)stage one: in 2 of 3 records.*<unk>.*'id1'.*'zebra'.*small_backbones"
    for act in (check_recipe, train):
        with pytest.raises(UserError, match=facts):
            act(parsed, model=model, processor=processor)
    assert not (tmp_path / "out").exists()


def test_unknown_answers_of_a_stream_and_in_a_dry_run_are_refused(tmp_path):
    model, processor = tiny_model()
    written = write_texts(tmp_path, [("what is it", "zebra")])
    parsed = recipe(tmp_path, written)
    with pytest.raises(UserError, match=r"1 of 1 .*'zebra'"):
        read_record_facts(parsed.stages[0], example_encoder(processor))
    (tmp_path / "data.jsonl").write_text(
        "\n".join(map(json.dumps, json.loads((tmp_path / "data.json").read_text())))
    )
    written["data"] = {"path": str(tmp_path / "data.jsonl"), "streaming": True}
    with pytest.raises(UserError, match=r"1 of 1 .*'zebra'"):
        check_recipe(recipe(tmp_path, written), model=model, processor=processor)


@pytest.mark.parametrize("kind", MAKERS)
def test_unknown_prompts_are_told_once(tmp_path, caplog, kind):
    model, processor = MAKERS[kind]()
    words = [f"{kind}{number}" for number in range(7)]
    written = write_texts(tmp_path, [("what is it", "a cat"), (" ".join(words), "a cat")])
    stages = [written, {**written, "name": "two"}]
    with caplog.at_level(logging.WARNING):
        check_recipe(recipe(tmp_path, *stages, **CHANGES[kind]), model=model, processor=processor)
    told = [text for text in caplog.messages if repr(words[0]) in text]
    assert len(told) == 1
    assert "1 of 2" in told[0] and "'id1'" in told[0] and "2 more" in told[0]
    assert words[5] not in told[0] and "cat" not in told[0]


def test_a_few_rare_words_are_told_but_not_refused(tmp_path, caplog):
    model, processor = tiny_model()
    pairs = [("what is it", "a cat")] * 150 + [("what is it", "rarest")]
    parsed = recipe(tmp_path, write_texts(tmp_path, pairs))
    with caplog.at_level(logging.WARNING):
        check_recipe(parsed, model=model, processor=processor)
    assert any("1 of 151" in text and "'rarest'" in text for text in caplog.messages)


def test_tokenizers_that_can_write_any_word_are_left_alone():
    processor = tiny_model()[1]
    for unknown in ("<unk>", "</s>"):
        processor.tokenizer = make_byte_tokenizer(**SPECIAL, unk_token=unknown)
        processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
        assert get_unknown_id(processor.tokenizer) is None
        found = count(processor, [("was ist ꙮ", "ein Zebra")])
        assert (found.records, found.learned, found.prompts) == (1, 0, 0)


@pytest.mark.parametrize("unknown", ["</s>", "<pad>", "<s>"])
def test_special_tokens_that_also_stand_for_unknown_words_are_told_from_these(unknown):
    processor = tiny_model()[1]
    processor.tokenizer = make_word_tokenizer(**SPECIAL, unk_token=unknown)
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    found = count(processor, [("what", "cat"), ("what what", "cat cat")])
    assert (found.records, found.learned, found.prompts) == (2, 0, 0)
    found = count(processor, [("what", "cat"), ("what", "a dog"), ("where", "cat")])
    assert (found.learned, found.prompts) == (1, 1)
    assert found.first_learned.id == "1" and found.first_prompt.id == "2"


def test_processes_count_as_one_does(monkeypatch):
    processor = tiny_model()[1]
    pairs = [("what is it", f"a {'zebra' if number % 3 else 'cat'}") for number in range(20)]
    expected = count(processor, pairs)
    monkeypatch.setattr(validation, "MANY", 10)
    monkeypatch.setattr(validation, "CHUNK", 2)
    monkeypatch.setattr(validation, "count_processes", lambda: 2)
    assert count(processor, pairs) == expected
    assert (expected.records, expected.learned) == (20, 13)


def test_a_question_names_the_words_that_a_model_does_not_know(caplog):
    chat = Chat(*tiny_model(), max_new_tokens=2)
    chat.ask("what is it")
    assert not caplog.messages
    chat.ask("what zebra is a gnu")
    assert len(caplog.messages) == 1
    assert "'zebra', 'gnu'" in caplog.messages[0]


def test_the_model_shapes_knows_as_many_words_as_the_page_says():
    tokenizer = make_tokenizer()
    num_words = len(tokenizer) - len(tokenizer.all_special_tokens)
    for page in ("training", "data"):
        assert f"{num_words} words" in (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert find_unknown_words(tokenizer, "what shape is disc top-left disc?") == ["disc", "disc?"]
