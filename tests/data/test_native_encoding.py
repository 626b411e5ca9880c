"""Finished models' own processors: ids are those of inference, answers are found behind any
expansion, and training works.
"""

import json

import numpy as np
import pytest
import torch
from helpers import bases
from helpers.runs import log, stage, write_records
from helpers.tiny import SPECIAL
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Processor,
    Idefics3Processor,
    LlavaNextProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from sparsecut import train
from sparsecut.config.recipe import parse_recipe
from sparsecut.data.dataset import read_examples
from sparsecut.data.encoding import written
from sparsecut.data.examples import IMAGE, Example
from sparsecut.data.native_encoding import encode_batch, num_tokens_about
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.prompts import render_prompt, run_processor

# Templates as the families have them: with and without marks, with parts and pictures in their
# places or first.
LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] if c['type'] =="
    " 'image' %}{{ '<image>\n' }}{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}{%"
    " if m['role'] == 'assistant' %}{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% else"
    " %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{"
    " 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else"
    " m['role']) + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in"
    " m['content'] %}{% if c['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ c['text'] |"
    " trim }}{% endif %}{% endfor %}{% endif %}{{ '</s>\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
IDEFICS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}{{ ':' if"
    " m['content'][0]['type'] == 'image' else ': ' }}{% for c in m['content'] %}{{ c['text'] if"
    " c['type'] == 'text' else '<image>' }}{% endfor %}{{ '</s>\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def byte_tokenizer(*tokens: str, **named: str) -> PreTrainedTokenizerFast:
    """One token per byte, so that every character shows whether it is learned."""
    core = Tokenizer(
        models.BPE(
            {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
        )
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL, **named)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False
    )
    return tokenizer


def llava():
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    settings = {
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": LLAVA,
    }
    return LlavaProcessor(images, byte_tokenizer("<image>"), patch_size=8, **settings)


def llava_next():
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    images = LlavaNextImageProcessorPil(
        **sizes, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]
    )
    settings = {
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": LLAVA,
    }
    return LlavaNextProcessor(images, byte_tokenizer("<image>"), patch_size=8, **settings)


def gemma3():
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(
        images,
        byte_tokenizer("<turn>", extra_special_tokens=names),
        chat_template=GEMMA,
        image_seq_length=4,
    )


def idefics3():
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    return Idefics3Processor(images, byte_tokenizer(), image_seq_len=4, chat_template=IDEFICS)


def paligemma():
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    return PaliGemmaProcessor(images, byte_tokenizer())


PROCESSORS = {
    "llava": llava,
    "llava_next": llava_next,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "paligemma": paligemma,
}


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    return Image.fromarray(values)


def talk(*turns: str, sizes=()) -> tuple[Example, list[Image.Image]]:
    messages = [
        {"role": role, "content": turn}
        for role, turn in zip(["user", "assistant"] * 2, turns, strict=False)
    ]
    return Example("x", ["x.png"] * len(sizes), messages, source="talk.json record 0"), [
        picture(*s) for s in sizes
    ]


TALKS = [
    talk("what is blue ?", "it is a dog", "sure ?", "a"),
    talk(f"{IMAGE}\nwhat is it", "a red cat", "are you sure ?", "yes", sizes=[(40, 20)]),
    talk(f"is {IMAGE} it\n{IMAGE} or", " no, it\nis not ", sizes=[(16, 30), (64, 48)]),
    talk(f"{IMAGE}\nwhat is it", "two\n\nparagraphs", sizes=[(30, 30)]),
]


def talks_for(processor) -> list:
    return (
        TALKS if processor.chat_template else TALKS[2:]
    )  # without a template: one question, one answer, with pictures


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_learned_follows_exactly_the_prompt_of_inference(name, turned):
    processor = PROCESSORS[name]()
    talks = talks_for(processor)[:: -1 if turned else 1]
    batch = encode_batch(
        [one for one, _ in talks], processor, pictures=[shown for _, shown in talks]
    )
    for row, (one, shown) in enumerate(talks):
        length = int(batch["attention_mask"][row].sum())
        ids, labels, start = batch["input_ids"][row, :length], batch["labels"][row, :length], 0
        for number, message in enumerate(one.messages):
            if message["role"] != "assistant":
                continue
            asked = [
                {**m, "content": m["content"].replace(IMAGE, processor.image_token)}
                for m in one.messages[:number]
            ]
            seen = run_processor(
                processor,
                [render_prompt(processor, asked)],
                [shown[: str(asked).count(processor.image_token)]],
            )
            prompt = seen["input_ids"][0]
            assert torch.equal(ids[: len(prompt)], prompt), (
                "the model is trained after another prompt than it will be asked with"
            )
            assert (labels[start : len(prompt)] == -100).all() and labels[len(prompt)] != -100
            learned = labels[len(prompt) :].tolist()
            learned = learned[: learned.index(-100)] if -100 in learned else learned
            ended = message is one.messages[-1] or not name.startswith("llava")
            said = processor.decode(learned)
            assert (
                said.removesuffix("</s>").strip() == message["content"].strip()
                and said.endswith("</s>") == ended
            )
            start = len(prompt) + len(learned)
        assert (labels[start:] == -100).all() and (batch["labels"][row, length:] == -100).all()


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_cut_spares_pictures_and_needs_something_to_learn(name):
    processor = PROCESSORS[name]()
    one, shown = TALKS[3]
    full = encode_batch([one], processor, pictures=[shown])
    length = full["input_ids"].shape[1]
    cut = encode_batch([one], processor, pictures=[shown], max_length=length - 3)
    assert all(
        torch.equal(cut[key], full[key][:, : length - 3])
        for key in ("input_ids", "attention_mask", "labels")
    )
    with pytest.raises(ValueError, match=r"talk.json record 0: .* would cut off image tokens"):
        encode_batch([one], processor, pictures=[shown], max_length=3)
    with pytest.raises(ValueError, match=r"talk.json record 0: .* but the language model takes 9"):
        encode_batch([one], processor, pictures=[shown], limit=9)
    text, _ = written(one, processor)
    assert length / 3 < num_tokens_about(processor, text, shown) < 2 * length


def test_a_processor_that_rewrites_texts_is_refused():
    class Rewriting(LlavaProcessor):
        def prepare_inputs_layout(self, images=None, text=None, **kwargs):
            return super().prepare_inputs_layout(
                images=images, text=["Look: " + line for line in text], **kwargs
            )

    processor = llava()
    processor.__class__ = Rewriting
    for one, shown in (TALKS[0], TALKS[3]):
        with pytest.raises(ValueError, match="changes texts before it expands placeholders"):
            encode_batch([one], processor, pictures=[shown])
    with pytest.raises(ValueError, match="takes one question with one answer"):
        encode_batch([TALKS[1][0]], paligemma(), pictures=[TALKS[1][1]])


def model_for(name: str, processor):
    """A tiny random model of the family whose vocabulary and pictures are the processor's."""
    config, tokenizer = bases.base_config(name), processor.tokenizer
    config.image_token_id = tokenizer.convert_tokens_to_ids(
        "<image_soft_token>" if name == "gemma3" else "<image>"
    )
    text = config.get_text_config()
    text.vocab_size = len(tokenizer)
    text.bos_token_id, text.eos_token_id, text.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    if name.startswith("llava"):
        config.vision_config.patch_size = 8
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval().float()
    if name == "gemma3":  # starts at zero, which would hide every picture
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.generation_config.suppress_tokens = [config.image_token_id]
    return model


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_goes_from_a_recipe_to_answers(name, tmp_path):
    processor = PROCESSORS[name]()
    if name == "paligemma":
        processor.image_seq_length = 16
    base = model_for(name, processor)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    write_records(tmp_path)
    records = [
        r
        for r in json.loads((tmp_path / "data.json").read_text())
        if r["image"] or name != "paligemma"
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    args = {"max_steps": 12, "per_device_train_batch_size": 5}
    plain = {
        "model": {"base": "given"},
        "stages": [stage(tmp_path, args=args)],
        "output": str(tmp_path / "out"),
    }
    model, processor = train(parse_recipe(plain), model=base, processor=processor, shown=False)
    losses = [line["loss"] for line in log(tmp_path) if "loss" in line]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())
    asked, said = read_examples(tmp_path / "data.json"), []
    for size in (1, 5):
        evaluate(
            model, processor, asked, max_new_tokens=4, batch_size=size, out=tmp_path / str(size)
        )
        said.append((tmp_path / str(size) / "predictions.jsonl").read_text())
    assert said[0] == said[1]
