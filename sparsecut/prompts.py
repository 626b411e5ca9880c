"""From a conversation to the answer, the same way in training, evaluation, chat and serving.

Message contents are strings with the processor's placeholder (`image_token`) for every image. There
are two kinds of processors. Ours knows the image tokens of an image by its size. That of an
upgraded model is its base's own, and only a call of it shows how many tokens an image takes.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import BatchFeature, GenerationConfig

from .audio import Clip, open_audio
from .chat_markup import drop_end_token
from .chat_templates.arguments import check_arguments
from .chat_templates.rendering import apply_template, get_chat_template
from .chat_templates.rendering import get_tokens_per_image as get_tokens_per_image
from .chat_templates.rendering import split_at_images as split_at_images
from .chat_templates.thoughts import PROMPT_TAIL, Answer, find_open_thought, read_answer
from .hooks import is_processor_argument
from .pixels import ImageSource, open_image
from .schema import UserError

# Names of settings, and tokens between brackets, that are about images, video or audio.
MEDIA = "image|img|vision|video|audio|speech|sound|media|tile|slice|pixel"
MEDIA_SETTING = re.compile(rf"{MEDIA}|^[be]o[aiv](?=_)|im_(start|end)|frame_")
MEDIA_ID = re.compile(rf"({MEDIA_SETTING.pattern}).*_token_(id|index)$")
MEDIA_MARK = re.compile(
    rf"[<\[|](?!loc|seg)(.*({MEDIA}).*|\W*patch\W*|im_\w+|row_\d+_col_\d+)[>\]|]",
    re.IGNORECASE,
)


def takes_suffix(processor: Any) -> bool:
    """Whether a processor takes prefix and suffix instead of a chat template, as PaliGemma's."""
    return get_chat_template(processor) is None and is_processor_argument(processor, "suffix")


# --- what a model takes beside text ---


def get_medium(processor: Any) -> str:
    """Return what a model takes beside text, "image" or "audio"."""
    return getattr(processor, "medium", "image")


def open_medium(processor: Any, source: ImageSource | Clip) -> Image.Image | Clip:
    """Open an image, or a clip of sound where the model takes audio.

    Args:
        processor: the model's processor.
        source: see `open_image` and `open_audio`.

    Raises:
        UserError: It cannot be read, or the model takes something else.
    """
    medium = get_medium(processor)
    if isinstance(source, Image.Image | Clip):
        given = "image" if isinstance(source, Image.Image) else "audio"
        check_medium(processor, given)
    return open_audio(source) if medium == "audio" else open_image(source)


def check_medium(processor: Any, given: str, what: str = "this") -> None:
    """Raise UserError where a model does not take what is given.

    Args:
        processor: the model's processor.
        given: "image", "audio" or "video".
        what: what holds it, for the message.
    """
    medium = get_medium(processor)
    if given == medium:
        return
    remedy = "give a model with an encoder of that kind"
    if given == "video":
        remedy = "give some of its frames as images"
    raise UserError(f"{what} has {given}, but the model takes text and {medium} only; {remedy}")


# --- from messages to text ---


def render_prompt(
    processor: Any,
    messages: list[dict],
    arguments: dict[str, Any] | None = None,
    *,
    cached: bool = True,
) -> str:
    """Render a conversation as the text that asks for the next answer.

    Args:
        processor: its template and tokenizer are used.
        messages: the conversation.
        arguments: arguments of the chat template for this prompt, such as
            {"enable_thinking": False}.
        cached: keep the text for the next time.


    Returns:
        The text, with one placeholder per image.

    Raises:
        UserError: The processor has no chat template, or its template refuses the conversation,
            leaves out a turn, or does not read an argument.
    """
    if arguments:
        check_arguments(processor, arguments)
    if takes_suffix(processor):
        return get_prefix(processor, messages)
    text, _ = apply_template(
        processor, messages, add_generation_prompt=True, arguments=arguments, cached=cached
    )
    return text


def get_prefix(processor: Any, messages: list[dict]) -> str:
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
    model: Any,
    processor: Any,
    prompts: list[str],
    images: list[list[Image.Image]] | None,
    grids: list[list] | None = None,
) -> BatchFeature:
    """Encode prompts by `encode_prompts` and move them to the model's device.

    Args:
        model: the model, which names the device.
        processor: its processor.
        prompts: texts of `render_prompt`.
        images: the images of each prompt, or None, see `encode_prompts`.
        grids: see there, too.
    """
    return encode_prompts(processor, prompts, images, grids).to(model.device)


def encode_prompts(
    processor: Any,
    prompts: list[str],
    images: list[list[Image.Image]] | None,
    grids: list[list] | None = None,
) -> BatchFeature:
    """Encode prompts as model inputs, padded on the left.

    Args:
        processor: the model's processor.
        prompts: texts of `render_prompt`.
        images: the images of each prompt. None encodes the texts alone, their placeholders
            expanded, with our own processors only.
        grids: rows and columns of the images of each prompt. They are needed without images,
            where images are of any size.
    """
    if images is not None:
        return run_processor(processor, prompts, images, padding_side="left")
    drop_end_token(processor.tokenizer)
    if grids is None:
        texts = [processor.expand(prompt) for prompt in prompts]
    else:
        texts = [processor.expand(*pair) for pair in zip(prompts, grids, strict=True)]
    return processor.tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=adds_special_tokens(processor, prompts[0]),
    )


def run_processor(
    processor: Any, texts: list[str], images: list[list[Image.Image]], **settings: Any
) -> BatchFeature:
    """Call the processor on a padded batch, the same way in training and at inference.

    Args:
        processor: the model's processor.
        texts: texts with placeholders.
        images: the images of each text.
        settings: further arguments of the call.
    """
    drop_end_token(processor.tokenizer)
    settings = {
        "padding": True,
        "return_tensors": "pt",
        "add_special_tokens": adds_special_tokens(processor, texts[0]),
        **settings,
    }
    name = "audio" if get_medium(processor) == "audio" else "images"
    features = processor(text=texts, **{name: images if any(images) else None}, **settings)
    if "suffix" not in settings:
        features.pop("labels", None)  # PaliGemma's processor always makes labels
    return features


def adds_special_tokens(processor: Any, text: str) -> bool:
    """Whether the tokenizer should add its first token: not where the template has written it."""
    first = processor.tokenizer.bos_token
    return not (first and text.startswith(first))


# --- special tokens of images, video and audio ---


def list_media_tokens(processor: Any, config: Any) -> frozenset[str]:
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


def make_greedy_config(model: Any, max_new_tokens: int) -> GenerationConfig:
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


def decode_answers(processor: Any, inputs: BatchFeature, ids: Tensor) -> list[str]:
    """Decode the tokens after the prompts, without thoughts, special tokens and outer whitespace.

    Arguments are those of `read_answers`.
    """
    return [answer.text for answer in read_answers(processor, inputs, ids)]


def read_answers(processor: Any, inputs: BatchFeature, ids: Tensor) -> list[Answer]:
    """Decode the tokens after the prompts, and tell answers from thoughts.

    Args:
        processor: the model's processor.
        inputs: the encoded prompts, padded on the left.
        ids: what `generate` returned: prompts [B, L], each with its answer.
    """
    length = inputs["input_ids"].shape[1]
    marks = find_closing_marks(processor, inputs)
    if len(ids) > len(marks):  # several answers to each prompt
        marks = [closing for closing in marks for _ in range(len(ids) // len(marks))]
    answers = []
    for row, closing in zip(ids, marks, strict=True):
        answers.append(read_answer(processor.tokenizer, row[length:], closing))
    return answers


def find_closing_marks(processor: Any, inputs: BatchFeature) -> list[str | None]:
    """Return for each prompt the mark that ends the thought which it has opened, or None."""
    ends = processor.tokenizer.batch_decode(inputs["input_ids"][:, -PROMPT_TAIL:])
    return [find_open_thought(end) for end in ends]


def get_max_length(model: Any) -> int | None:
    """Return the language model's number of positions; None where its configuration has none."""
    config = model.config.text_config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def check_length(model: Any, num_tokens: int, max_new_tokens: int, what: str, remedy: str) -> None:
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
