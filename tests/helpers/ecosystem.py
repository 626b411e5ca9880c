"""A tiny upgraded LLaVA with random shortcuts, with and without a processor.

It serves the tests of the software around the model: saving, quantization, adapters, pipelines.
"""

import torch
from helpers import bases
from helpers.base_configs import IMAGE
from helpers.bases import randomize_fusion
from helpers.example_bases import build_example_base
from PIL import Image
from transformers import AutoModelForImageTextToText

from sparsecut import upgrade

SHORT = {"max_new_tokens": 5, "min_new_tokens": 5}


class AnyProcessor:
    """Stands for the processor of a base in tests that need none."""


def tiny_base(depth: int = 4):
    """(base, inputs): a tiny LLaVA of `depth` blocks and layers, and two prompts with an image."""
    torch.manual_seed(0)
    config = bases.base_config("llava")
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = depth
    base = AutoModelForImageTextToText.from_config(config).eval()
    base.generation_config.suppress_tokens = [IMAGE]
    return base, bases.build_inputs("llava", base, bases.build_images("llava")[:1] * 2)


def tiny_upgraded(depth: int = 4):
    """(model, inputs, logits): an upgraded tiny LLaVA with random shortcuts."""
    base, inputs = tiny_base(depth)
    model = randomize_fusion(upgrade(base)[0])
    inputs |= bases.build_fine_views(model, inputs)
    return model, inputs, get_logits(model, inputs)


@torch.no_grad()
def get_logits(model, inputs):
    return model(**inputs, use_cache=False).logits


def upgraded_with_processor():
    """(model, processor): an upgraded LLaVA of the example with random shortcuts."""
    base, base_processor = build_example_base("llava")
    model, processor = upgrade(base, processor=base_processor)
    return randomize_fusion(model), processor


def image_messages():
    """A conversation of one question about an image, in the form of chat templates."""
    image = Image.radial_gradient("L").convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it"}]
    return [{"role": "user", "content": content}]


def encode_messages(processor):
    """Model inputs of `image_messages`."""
    return processor.apply_chat_template(
        [image_messages()],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def assert_trains(model, inputs, more=()):
    """One training pass gives a gradient to the trained fusion parameters and to `more`."""
    model.train()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    trained = [p for p in model.fusion.parameters() if p.requires_grad]
    assert trained
    for parameter in [*trained, *more]:
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
