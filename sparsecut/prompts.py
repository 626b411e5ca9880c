"""From a conversation to the model's answer: what training, evaluation and chat have in common.

Conversations have string contents with the processor's placeholder (`image_token`) for every picture. A processor of ours knows
how many image tokens a picture takes, whatever the picture; that of an upgraded model is its base's own, and only its own call
knows. What differs between the two is decided here.
"""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, GenerationConfig
from transformers.utils.chat_template_utils import render_jinja_template

from .schema import UserError

PROBE = "probe"


def is_fixed(processor) -> bool:
    """Whether every picture takes equally many image tokens, known without seeing it: a processor
    of ours, not a base's own.
    """
    return hasattr(
        processor, "num_views"
    )  # some bases have a num_image_tokens, which is not what a picture takes


def takes_suffix(processor) -> bool:
    """Whether the processor has a prefix and a suffix in place of a chat template, as
    PaliGemma's.
    """
    calls = (vars(one)["__call__"] for one in type(processor).__mro__ if "__call__" in vars(one))
    return get_chat_template(processor) is None and any(
        "suffix" in inspect.signature(call).parameters for call in calls
    )


def get_chat_template(processor) -> str | None:
    """The chat template that the processor uses, or else its tokenizer's; None where neither has
    one.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def apply_template(
    processor, messages: list[dict], *, add_generation_prompt: bool = False, marks: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as one string by the chat template, and, with marks, the spans that it marks
    as generated.

    Contents become lists of pictures and texts where the template is made for these. Raises
    ValueError where it refuses.
    """
    template = get_chat_template(processor)
    if template is None:
        raise UserError(
            f"{type(processor).__name__} has no chat template, so it is not known how the model"
            " wants its conversations; set one (processor.chat_template = ...), with the prompt"
            " format that the model was trained on"
        )
    names = processor.tokenizer.special_tokens_map
    special = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in names.items())
    token = processor.image_token
    split = token if not is_fixed(processor) and _in_parts(template, token, special) else None
    return _rendered(
        tuple(tuple(m.items()) for m in messages),
        template,
        add_generation_prompt,
        marks,
        split,
        special,
    )


@lru_cache(
    maxsize=32768
)  # a record is rendered to be checked and again to be learned, in a study by every run
def _rendered(
    turns: tuple,
    template: str,
    add_generation_prompt: bool,
    marks: bool,
    split: str | None,
    special: tuple,
):
    messages = [dict(turn) for turn in turns]
    if split:
        messages = [{**m, "content": split_at_images(m["content"], split)} for m in messages]
    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **dict(special),
        )
    except TemplateError as error:
        raise UserError(
            f"the model's chat template refuses the conversation: {error}; change the turns (many"
            " templates want user and assistant to alternate and know no system turn) or give the"
            " processor another chat_template"
        ) from None
    return texts[0], spans[0] if spans else []


def split_at_images(content: str, image_token: str) -> list[dict]:
    """Content as the list of pictures and texts that many templates want.

    Line ends beside a picture, and blanks between the first pictures and the text, are the
    template's business and left out.
    """
    pieces, parts = content.split(image_token), []
    for i, piece in enumerate(pieces):
        if i > 0:
            piece = (
                piece.lstrip()
                if all(part["type"] == "image" for part in parts)
                else piece.lstrip("\n")
            )
            parts.append({"type": "image"})
        if i + 1 < len(pieces):
            piece = piece.rstrip("\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


@lru_cache(maxsize=64)
def _in_parts(template: str, image_token: str, special: tuple) -> bool:
    """Whether a template is made for contents in parts, seen by rendering both; ValueError where
    neither keeps a picture.
    """
    parts, string = [{"type": "image"}, {"type": "text", "text": PROBE}], f"{image_token}\n{PROBE}"
    for content in (parts, string):
        try:
            turn = [{"role": "user", "content": content}]
            text = render_jinja_template(
                conversations=[turn], chat_template=template, **dict(special)
            )[0][0]
        except (TemplateError, TypeError):
            continue
        if text.count(PROBE) == 1 and text.count(image_token) == 1 and "'type'" not in text:
            return content is parts
    raise UserError(
        f"the chat template writes no {image_token} for a picture, so pictures would be lost; give"
        " the processor a chat_template that knows contents such as {'type': 'image'}"
    )


def render_prompt(processor, messages: list[dict]) -> str:
    """The conversation as the text that asks for the next answer, one placeholder per picture;
    ValueError if refused.
    """
    if takes_suffix(processor):
        return get_prefix(processor, messages)
    return apply_template(processor, messages, add_generation_prompt=True)[0]


def get_prefix(processor, messages: list[dict]) -> str:
    """The one question of a conversation, pictures first, as processors with prefix and suffix want
    it.
    """
    if [m["role"] for m in messages] != ["user"]:
        raise UserError(
            f"{type(processor).__name__} has no chat template and takes one question with one"
            f" answer, but the turns are {', '.join(m['role'] for m in messages)} before the"
            " answer; split the conversation"
        )
    token, text = processor.image_token, messages[0]["content"]
    return token * text.count(token) + text.replace(token, "").strip()


def prepare_inputs(
    model, processor, prompts: list[str], pictures: list[list[Image.Image]] | None
) -> BatchFeature:
    """Left-padded model inputs of prompts and each prompt's own pictures, on the model's device;
    None: the texts alone.
    """
    return encode_prompts(processor, prompts, pictures).to(model.device)


def encode_prompts(
    processor, prompts: list[str], pictures: list[list[Image.Image]] | None
) -> BatchFeature:
    """The same before they are on any device."""
    if pictures is None:
        settings = {
            "padding": True,
            "padding_side": "left",
            "add_special_tokens": adds_special_tokens(processor, prompts[0]),
        }
        texts = [processor.expand(prompt) for prompt in prompts]
        return processor.tokenizer(texts, return_tensors="pt", **settings)
    return run_processor(processor, prompts, pictures, padding_side="left")


def run_processor(
    processor, texts: list[str], pictures: list[list[Image.Image]], **settings
) -> BatchFeature:
    """What the processor makes of a padded batch of texts and each text's own pictures, alike in
    training and at inference.
    """
    settings = {
        "padding": True,
        "return_tensors": "pt",
        "add_special_tokens": adds_special_tokens(processor, texts[0]),
        **settings,
    }
    if not is_fixed(processor) and not any(pictures):
        pictures = None
    features = processor(images=pictures, text=texts, **settings)
    if "suffix" not in settings:
        features.pop("labels", None)  # PaliGemma's processor always makes some
    return features


def adds_special_tokens(processor, text: str) -> bool:
    """Whether the tokenizer adds its own first token: a template that writes it itself gets no
    second one.
    """
    begin = processor.tokenizer.bos_token
    return not (begin and text.startswith(begin))


def make_greedy_config(model, max_new_tokens: int) -> GenerationConfig:
    """The model's own generation settings, made greedy: no sampling, no beams."""
    config = copy.deepcopy(model.generation_config)
    neutral = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "typical_p": 1.0,
    }  # else generate warns that they have no effect
    config.update(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, max_length=None, **neutral
    )
    return config


def decode_answers(processor, inputs: BatchFeature, ids: Tensor) -> list[str]:
    """What was generated after the prompts, as text without special tokens and outer blanks."""
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def get_max_length(model) -> int | None:
    """How many tokens the language model takes; None where its configuration does not say."""
    return getattr(model.config.text_config.get_text_config(), "max_position_embeddings", None)


def check_length(model, num_tokens: int, max_new_tokens: int, what: str, remedy: str) -> None:
    """Raise ValueError where prompt and answer do not fit the language model's positions."""
    limit = get_max_length(model)
    if limit is not None and num_tokens + max_new_tokens > limit:
        raise UserError(
            f"{what} has {num_tokens} tokens, pictures included, which with"
            f" max_new_tokens={max_new_tokens} is more than the {limit} the language model takes;"
            f" {remedy}"
        )
