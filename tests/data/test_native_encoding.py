"""Base models' own processors: ids are those of inference, and every answer is found."""

import pytest
import torch
from helpers.native import PROCESSORS, TALKS, get_talks, llava, paligemma
from helpers.records import encode_batch
from transformers import LlavaProcessor

from sparsecut.data.encoding import example_encoder
from sparsecut.data.errors import RecordError
from sparsecut.data.length_limits import Limits
from sparsecut.data.native_encoding import estimate_length
from sparsecut.prompts import render_prompt, run_processor


def get_prompt_ids(processor, example, images, num_turns: int) -> torch.Tensor:
    """The ids at inference of the prompt that asks for the answer after so many turns."""
    messages = example.get_messages(processor.image_token)[:num_turns]
    num_images = str(messages).count(processor.image_token)
    prompt = render_prompt(processor, messages)
    return run_processor(processor, [prompt], [images[:num_images]])["input_ids"][0]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", PROCESSORS)
def test_targets_follow_exactly_the_prompt_of_inference(name, reverse):
    processor = PROCESSORS[name]()
    talks = get_talks(processor)[:: -1 if reverse else 1]
    batch = encode_batch(processor, [one for one, _ in talks], [images for _, images in talks])
    for row, (example, images) in enumerate(talks):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row, :length]
        labels = batch["labels"][row, :length]
        start = 0
        for number, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            prompt = get_prompt_ids(processor, example, images, number)
            assert torch.equal(ids[: len(prompt)], prompt)
            assert (labels[start : len(prompt)] == -100).all()
            learned = labels[len(prompt) :].tolist()
            assert learned[0] != -100
            learned = learned[: learned.index(-100)] if -100 in learned else learned
            answer = processor.decode(learned)
            assert answer.removesuffix("</s>").strip() == message["content"].strip()
            is_last = message is example.messages[-1]
            assert answer.endswith("</s>") == (is_last or not name.startswith("llava"))
            start = len(prompt) + len(learned)
        assert (labels[start:] == -100).all()
        assert (batch["labels"][row, length:] == -100).all()


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_cut_spares_images_and_needs_a_target(name):
    processor = PROCESSORS[name]()
    example, images = TALKS[3]
    full = encode_batch(processor, [example], [images])
    length = full["input_ids"].shape[1]
    cut = encode_batch(processor, [example], [images], Limits(max_length=length - 3))
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(cut[key], full[key][:, : length - 3])
    with pytest.raises(RecordError, match=r"^talk.json record 0: .*max_length=3 .*image"):
        encode_batch(processor, [example], [images], Limits(max_length=3))
    with pytest.raises(RecordError, match=r"^talk.json record 0: .*\b9\b"):
        encode_batch(processor, [example], [images], Limits(model_limit=9))
    text = example_encoder(processor).encode(example)["text"]
    assert length / 3 < estimate_length(processor, text, images) < 2 * length


def test_a_processor_that_rewrites_texts_is_refused():
    class Rewriting(LlavaProcessor):
        def prepare_inputs_layout(self, images=None, text=None, **kwargs):
            text = ["Look: " + line for line in text]
            return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    processor = llava()
    processor.__class__ = Rewriting
    for example, images in (TALKS[0], TALKS[3]):
        with pytest.raises(RecordError, match=r"Rewriting .*changes texts"):
            encode_batch(processor, [example], [images])


def test_what_a_processor_cannot_take_is_refused():
    example, images = TALKS[1]
    with pytest.raises(RecordError, match=r"PaliGemmaProcessor .*one question"):
        encode_batch(paligemma(), [example], [images])
    with pytest.raises(RecordError, match="'plain'"):
        example_encoder(llava(), "plain").encode(example)
