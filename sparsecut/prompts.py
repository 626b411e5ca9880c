"""From a conversation to the answer, the same way in training, evaluation, chat and serving.

Message contents are strings with the processor's placeholder (`image_token`) for every image. There
are two kinds of processors. In ours every image takes the same number of image tokens. That of an
upgraded model is its base's own, and only a call of it shows how many tokens an image takes.
"""

from __future__ import annotations

import copy
import inspect
import re
from functools import lru_cache

from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, GenerationConfig
from transformers.utils.chat_template_utils import render_jinja_template

from .schema import UserError

# Names of settings, and tokens between brackets, that are about images, video or audio.
MEDIA = "image|img|vision|video|audio|speech|sound|media|tile|slice|pixel"
MEDIA_SETTING = re.compile(rf"{MEDIA}|^[be]o[aiv](?=_)|im_(start|end)|frame_")
MEDIA_ID = re.compile(rf"({MEDIA_SETTING.pattern}).*_token_(id|index)$")
MEDIA_MARK = re.compile(
    rf"[<\[|](?!loc|seg)(.*({MEDIA}).*|\W*patch\W*|im_\w+|row_\d+_col_\d+)[>\]|]",
    re.IGNORECASE,
)
PROBE = "probe"  # text that shows whether a chat template accepts a form of contents


def get_tokens_per_image(processor) -> int | None:
    """Return the image tokens of each image, or None where only a call of the processor shows it.

    The processor of a built model takes the same number for every image. That of an upgraded model
    is its base's own.
    """
    # Some bases' processors have `num_image_tokens` too, for another number, but none has views.
    if getattr(processor, "num_views", None) is None:
        return None
    return processor.num_image_tokens


def get_chat_template(processor) -> str | None:
    """Return the chat template of a processor or of its tokenizer; None where neither has one."""
    template = processor.chat_template or processor.tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def takes_suffix(processor) -> bool:
    """Whether a processor takes prefix and suffix instead of a chat template, as PaliGemma's."""
    if get_chat_template(processor) is not None:
        return False
    for cls in type(processor).__mro__:
        call = vars(cls).get("__call__")
        if call is not None and "suffix" in inspect.signature(call).parameters:
            return True
    return False


# --- from messages to text ---


def render_prompt(processor, messages: list[dict], *, cached: bool = True) -> str:
    """Render a conversation as the text that asks for the next answer.

    Args:
        processor: its template and tokenizer are used.
        messages: the conversation.
        cached: keep the text for the next time.

    Returns:
        The text, with one placeholder per image.

    Raises:
        UserError: The processor has no chat template, or its template refuses the conversation.
    """
    if takes_suffix(processor):
        return get_prefix(processor, messages)
    return apply_template(processor, messages, add_generation_prompt=True, cached=cached)[0]


def apply_template(
    processor,
    messages: list[dict],
    *,
    add_generation_prompt: bool = False,
    marks: bool = False,
    cached: bool = True,
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation by the chat template.

    Args:
        processor: its template and tokenizer are used.
        messages: the conversation. String contents are split into image and text items for
            templates that need these.
        add_generation_prompt: add the beginning of the next answer.
        marks: return the spans that the template marks as generated.
        cached: keep the text for the next time.

    Returns:
        The text, and the spans of characters (first, one after the last); [] without `marks`.

    Raises:
        UserError: There is no chat template, it refuses the conversation, or it drops images.
    """
    template = get_chat_template(processor)
    if template is None:
        raise UserError(
            f"{type(processor).__name__} has no chat template, so the prompt format of the model is"
            " not known; set processor.chat_template to the format the model was trained on"
        )
    special_tokens = _freeze_special_tokens(processor.tokenizer)
    split_at = None
    if get_tokens_per_image(processor) is None:  # our own templates accept strings
        placeholder = processor.image_token
        if _needs_items(template, placeholder, special_tokens):
            split_at = placeholder
    frozen_messages = tuple(tuple(message.items()) for message in messages)
    render = _render if cached else _render.__wrapped__
    return render(frozen_messages, template, add_generation_prompt, marks, split_at, special_tokens)


def _freeze_special_tokens(tokenizer) -> tuple:
    """A tokenizer's special tokens in a form that can be hashed."""
    frozen = []
    for name, value in tokenizer.special_tokens_map.items():
        frozen.append((name, tuple(value) if isinstance(value, list) else value))
    return tuple(frozen)


# A record is rendered when it is checked and when it is encoded, in a study once per run.
@lru_cache(maxsize=32768)
def _render(
    frozen_messages: tuple,
    template: str,
    add_generation_prompt: bool,
    marks: bool,
    split_at: str | None,
    special_tokens: tuple,
):
    messages = [dict(message) for message in frozen_messages]
    if split_at:
        for message in messages:
            message["content"] = split_at_images(message["content"], split_at)
    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=add_generation_prompt,
            **dict(special_tokens),
        )
    except TemplateError as error:
        raise UserError(
            f"the model's chat template refuses the conversation: {error}; change its messages"
            " (many templates need user and assistant in turn, and no system message), or set"
            " another processor.chat_template"
        ) from error
    return texts[0], spans[0] if spans else []


def split_at_images(content: str, image_token: str) -> list[dict]:
    """Split a string content into the image and text items that many templates take.

    The template writes its own line ends around images. So line ends beside an image are dropped,
    and so is whitespace between the first images and the text.
    """
    pieces = content.split(image_token)
    items = []
    has_text = False
    for number, text in enumerate(pieces):
        if number > 0:
            text = text.lstrip("\n") if has_text else text.lstrip()
            items.append({"type": "image"})
        if number + 1 < len(pieces):
            text = text.rstrip("\n")
        if text.strip():
            items.append({"type": "text", "text": text})
            has_text = True
    return items


@lru_cache(maxsize=64)
def _needs_items(template: str, image_token: str, special_tokens: tuple) -> bool:
    """Whether a template takes contents as items, found by rendering items and a string.

    Raises:
        UserError: It writes a placeholder for neither.
    """
    items = [{"type": "image"}, {"type": "text", "text": PROBE}]
    string = f"{image_token}\n{PROBE}"
    for content in (items, string):
        text = _try_template(template, content, special_tokens)
        if text.count(PROBE) == 1 and text.count(image_token) == 1 and "'type'" not in text:
            return content is items
    raise UserError(
        f"the chat template writes no {image_token} for an image, so images would be lost; set a"
        " processor.chat_template that takes content items such as {'type': 'image'}"
    )


def _try_template(template: str, content, special_tokens: tuple) -> str:
    """The text of one message; "" where the template cannot render it."""
    messages = [{"role": "user", "content": content}]
    try:
        texts, _ = render_jinja_template(
            conversations=[messages], chat_template=template, **dict(special_tokens)
        )
    except (TemplateError, TypeError):
        return ""
    return texts[0]


def get_prefix(processor, messages: list[dict]) -> str:
    """Return the one question of a conversation, images first, for a processor with prefixes.

    Raises:
        UserError: There are other messages than one question.
    """
    roles = [message["role"] for message in messages]
    if roles != ["user"]:
        raise UserError(
            f"{type(processor).__name__} has no chat template and takes one question with one"
            f" answer, but before the answer there are {', '.join(roles)}; split the conversation"
        )
    placeholder = processor.image_token
    content = messages[0]["content"]
    text = content.replace(placeholder, "").strip()
    return placeholder * content.count(placeholder) + text


# --- from text to model inputs ---


def prepare_inputs(
    model, processor, prompts: list[str], images: list[list[Image.Image]] | None
) -> BatchFeature:
    """Encode prompts by `encode_prompts` and move them to the model's device.

    Args:
        model: the model, which names the device.
        processor: its processor.
        prompts: texts of `render_prompt`.
        images: the images of each prompt, or None, see `encode_prompts`.
    """
    return encode_prompts(processor, prompts, images).to(model.device)


def encode_prompts(
    processor, prompts: list[str], images: list[list[Image.Image]] | None
) -> BatchFeature:
    """Encode prompts as model inputs, padded on the left.

    Args:
        processor: the model's processor.
        prompts: texts of `render_prompt`.
        images: the images of each prompt. None encodes the texts alone, their placeholders
            expanded, with our own processors only.
    """
    if images is not None:
        return run_processor(processor, prompts, images, padding_side="left")
    texts = [processor.expand(prompt) for prompt in prompts]
    return processor.tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=adds_special_tokens(processor, prompts[0]),
    )


def run_processor(
    processor, texts: list[str], images: list[list[Image.Image]], **settings
) -> BatchFeature:
    """Call the processor on a padded batch, the same way in training and at inference.

    Args:
        processor: the model's processor.
        texts: texts with placeholders.
        images: the images of each text.
        settings: further arguments of the call.
    """
    settings = {
        "padding": True,
        "return_tensors": "pt",
        "add_special_tokens": adds_special_tokens(processor, texts[0]),
        **settings,
    }
    features = processor(images=images if any(images) else None, text=texts, **settings)
    if "suffix" not in settings:
        features.pop("labels", None)  # PaliGemma's processor always makes labels
    return features


def adds_special_tokens(processor, text: str) -> bool:
    """Whether the tokenizer should add its first token: not where the template has written it."""
    first = processor.tokenizer.bos_token
    return not (first and text.startswith(first))


# --- special tokens of images, video and audio ---


def list_media_tokens(processor, config) -> frozenset[str]:
    """List the tokens that stand for images, video or audio in a model's prompts.

    In users' text they would be taken for images that are not there. They are the placeholder, what
    the processor and the configuration name, and marks in the tokenizer such as `<|image_pad|>`.
    Marks of places in an image, such as `<loc0001>`, are ordinary text.

    Args:
        processor: the model's processor.
        config: the model's configuration.
    """
    tokenizer = processor.tokenizer
    tokens = {str(processor.image_token)}
    for name, value in vars(processor).items():
        if name.endswith(("token", "tag")) and MEDIA_SETTING.search(name):
            tokens.add(str(value or ""))
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    ids = [id for id in _find_media_ids(config.to_dict()) if 0 <= id < len(tokenizer)]
    tokens |= added.intersection(tokenizer.convert_ids_to_tokens(ids))
    tokens |= {token for token in added if MEDIA_MARK.fullmatch(token)}
    return frozenset(tokens - {""})


def _find_media_ids(config: dict) -> list[int]:
    """The token ids of images, video and audio in a configuration and those inside it."""
    ids = []
    for key, value in config.items():
        if isinstance(value, dict):
            ids += _find_media_ids(value)
        elif isinstance(value, int) and MEDIA_ID.search(str(key)):
            ids.append(value)
    return ids


# --- generation ---


def make_greedy_config(model, max_new_tokens: int) -> GenerationConfig:
    """Return a copy of the model's generation settings without sampling and beams."""
    config = copy.deepcopy(model.generation_config)
    config.update(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        max_length=None,
        # neutral values, because generate warns of settings without effect
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        typical_p=1.0,
    )
    return config


def decode_answers(processor, inputs: BatchFeature, ids: Tensor) -> list[str]:
    """Decode the tokens after the prompts, without special tokens and outer whitespace.

    Args:
        processor: the model's processor.
        inputs: the encoded prompts.
        ids: what `generate` returned: prompts [B, L], each with its answer.
    """
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(new_ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


def get_max_length(model) -> int | None:
    """Return the language model's number of positions; None where its configuration has none."""
    config = model.config.text_config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def check_length(model, num_tokens: int, max_new_tokens: int, what: str, remedy: str) -> None:
    """Check that prompt and answer fit the language model's positions.

    Args:
        model: the model.
        num_tokens: tokens of the prompt, images included.
        max_new_tokens: longest answer, in tokens.
        what: what is too long, for the message.
        remedy: what to do, for the message.

    Raises:
        UserError: They do not fit.
    """
    limit = get_max_length(model)
    if limit is not None and num_tokens + max_new_tokens > limit:
        raise UserError(
            f"{what} has {num_tokens} tokens, images included; with max_new_tokens={max_new_tokens}"
            f" this is more than the {limit} tokens of the language model; {remedy}"
        )
