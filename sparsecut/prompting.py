"""From a conversation to the model's answer: what evaluation and chat have in common."""

from __future__ import annotations

import copy

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, GenerationConfig


def render(processor, messages: list[dict]) -> str:
    """The conversation as the text that asks for the next answer, one placeholder per picture; ValueError if refused."""
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(
            f"the model's chat template refuses the conversation: {error}; change the turns (many templates want user and assistant "
            "to alternate and know no system turn) or give the processor another chat_template"
        ) from None


def inputs_of(model, processor, prompts: list[str], pictures: list[list[Image.Image]] | None) -> BatchFeature:
    """Left-padded model inputs of prompts and each prompt's own pictures, on the model's device; None: the texts alone."""
    # As in training: a template that writes the first token itself gets no second one.
    begin = processor.tokenizer.bos_token
    special = not (begin and prompts[0].startswith(begin))
    settings = {"padding": True, "padding_side": "left", "add_special_tokens": special, "return_tensors": "pt"}
    if pictures is None:
        return processor.tokenizer([processor.expand(prompt) for prompt in prompts], **settings).to(model.device)
    return processor(images=pictures, text=prompts, **settings).to(model.device)


def greedy(model, max_new_tokens: int) -> GenerationConfig:
    """The model's own generation settings, made greedy: no sampling, no beams."""
    config = copy.deepcopy(model.generation_config)
    neutral = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "typical_p": 1.0,
    }  # else generate warns that they have no effect
    config.update(do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, max_length=None, **neutral)
    return config


def decode(processor, inputs: BatchFeature, ids: Tensor) -> list[str]:
    """What was generated after the prompts, as text without special tokens and outer blanks."""
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def check_length(model, num_tokens: int, max_new_tokens: int, what: str, remedy: str) -> None:
    """Raise ValueError where prompt and answer do not fit the language model's positions."""
    limit = getattr(model.config.text_config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and num_tokens + max_new_tokens > limit:
        raise ValueError(
            f"{what} has {num_tokens} tokens, pictures included, which with max_new_tokens={max_new_tokens} is more than the "
            f"{limit} the language model takes; {remedy}"
        )
