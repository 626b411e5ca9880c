"""A tiny upgraded LLaVA whose shortcuts do something, with and without a processor: for tests of
what surrounds it.
"""

import importlib.util
from pathlib import Path

import torch
from helpers import bases
from PIL import Image
from transformers import AutoModelForImageTextToText

from sparsecut import upgrade

spec = importlib.util.spec_from_file_location(
    "upgrade_vlm", Path(__file__).parents[2] / "examples" / "upgrade_vlm.py"
)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
TEXTS = [
    "what is it is it a red cat yes no ASSISTANT USER user assistant a red dog blue are you sure"
] * 3
SHORT = {"max_new_tokens": 5, "min_new_tokens": 5}


class AnyProcessor:
    """Stands for the base's processor where none is used."""


def tiny(depth: int = 4):
    """(base, its inputs): a tiny LLaVA with so many blocks and layers, and two prompts with a
    picture each.
    """
    torch.manual_seed(0)
    config = bases.config("llava")
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = depth
    base = AutoModelForImageTextToText.from_config(config).eval()
    base.generation_config.suppress_tokens = [bases.IMAGE]
    return base, bases.inputs_of("llava", base, bases.pictures("llava")[:1] * 2)


def stir(model):
    """Give the fusion weights that do something."""
    torch.manual_seed(1)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def upgraded(depth: int = 4):
    """(model, inputs, logits): an upgraded tiny LLaVA whose shortcuts do something."""
    base, inputs = tiny(depth)
    model = stir(upgrade(base)[0])
    inputs |= bases.fine_of(model, inputs)
    return model, inputs, logits_of(model, inputs)


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs, use_cache=False).logits


def with_processor():
    """(model, processor) of the example, the shortcuts doing something, and a conversation about a
    picture.
    """
    torch.manual_seed(0)
    base, own = example.llava(TEXTS, width=32, vocabulary=300, view=16)
    torch.nn.init.normal_(base.get_output_embeddings().weight, std=0.5)
    model, processor = upgrade(base, processor=own)
    return stir(model), processor


def talk():
    content = [
        {"type": "image", "image": Image.radial_gradient("L").convert("RGB")},
        {"type": "text", "text": "what is it"},
    ]
    return [{"role": "user", "content": content}]


def asked(processor):
    how = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    return processor.apply_chat_template([talk()], **how)


def trains(model, inputs, more=()):
    """Whether one pass gives a gradient to the fusion's parameters that learn, and to every one in
    `more`.
    """
    model.train()
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    learning = [*(p for p in model.fusion.parameters() if p.requires_grad), *more]
    return len(learning) > len(more) and all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in learning
    )
