"""Models, records and settings of tests with the trainers of TRL."""

import numpy as np
from datasets import Dataset
from helpers.bases import randomize_fusion
from helpers.example_bases import build_example_base
from helpers.tiny import tiny_model
from PIL import Image

from sparsecut import upgrade
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import Example

KINDS = ("built", "llava", "qwen2_5_vl")
# LLaVA-1.5's own template ends answers without a token, which our own training adds.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ':' }}{% for c in m['content'] if c['type'] =="
    " 'image' %}{{ '<image>\n' }}{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}{%"
    " if m['role'] == 'assistant' %}{% generation %}{{ ' ' + c['text'] + eos_token }}{%"
    " endgeneration %}{% else %}{{ ' ' + c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}{% if"
    " add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ANSWER = "a red cat"
QUICK = {
    "max_steps": 1,
    "per_device_train_batch_size": 3,
    "report_to": [],
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_strategy": "no",
}


def build_for_trl(kind: str):
    """(model, processor): a tiny model of a kind, whose shortcuts have an effect."""
    if kind == "built":
        model, processor = tiny_model()
    else:
        base, base_processor = build_example_base("llava" if kind == "llava" else "qwen")
        model, processor = upgrade(base, processor=base_processor)
    if kind == "llava":
        processor.chat_template = LLAVA_TEMPLATE
    return randomize_fusion(model), processor


def make_image(seed: int) -> Image.Image:
    """An image of noise."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8))


def ask(num_images: int) -> list[dict]:
    """A user's turn with images, in the form of TRL."""
    parts = [{"type": "image"}] * num_images
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it"}]}]


def answer(text: str) -> list[dict]:
    """An assistant's turn, in the form of TRL."""
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def make_records(form: str, counts=(1, 2, 0)) -> Dataset:
    """Records with these numbers of images: messages, completion, preference or prompt."""
    records = []
    for count in counts:
        record = {"images": [make_image(len(records) + seed) for seed in range(count)]}
        if form == "messages":
            record["messages"] = ask(count) + answer(ANSWER)
        else:
            record["prompt"] = ask(count)
        if form == "completion":
            record["completion"] = answer(ANSWER)
        if form == "preference":
            record |= {"chosen": answer(ANSWER), "rejected": answer("no dog")}
        records.append(record)
    return Dataset.from_list(records)


def encode_as_we_do(processor, counts=(1, 2, 0)) -> dict:
    """The batch that our own training makes of `make_records`."""
    encoder = example_encoder(processor)
    items = []
    for number, count in enumerate(counts):
        question = "{image}\n" * count + "what is it"
        messages = [
            {"role": "user", "content": question.replace("{image}", "<image>")},
            {"role": "assistant", "content": ANSWER},
        ]
        names = [f"{seed}.png" for seed in range(count)]
        example = Example("x", names, messages, source="made for a test")
        images = [make_image(number + seed) for seed in range(count)]
        items.append({**encoder.encode(example), **encoder.encode_images(images)})
    return encoder.build_batch(items)
