"""Processors: images to views, audio to spectrograms, and text to token ids.

Training and inference call the same steps, so the inputs of a model never depend on the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .encoders import as_pair
from .pixels import (
    WHITE,
    array_to_rgb,
    list_images,
    open_image,
    parse_color,
    put_channels_last,
    to_rgb,
)
from .saved_code import SavesCode
from .schema import UserError

PROBE = "probe"  # text that shows which form of contents a chat template writes
COARSE_VIEWS = ("squash", "crop")
# settings of an image processor that change pixel values
NORMALIZATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")

# Precedes the tokenizer's chat template, which often accepts string contents only. It turns a list
# of {"type": "image"} and {"type": "text"} items into one string, with one placeholder per image on
# a line of its own.
FLATTEN = """\
{%- set ns = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is not iterable -%}
{%- set ns.messages = ns.messages + [message] -%}
{%- else -%}
{%- set ns.text = '' -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{%- set ns.text = ns.text + 'IMAGE_TOKEN' + ('' if loop.last else '\\n') -%}
{%- elif item['type'] == 'text' -%}
{%- set ns.text = ns.text + item['text'] -%}
{%- else -%}
{{- raise_exception('content items are images or texts, but one has type ' + item['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- set ns.messages = ns.messages + [dict(message, content=ns.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ns.messages %}"""

# Follows FLATTEN before templates that take lists of parts only: the text becomes one part.
WRAP = """\
{%- set ns.messages = [] -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set part = dict(type='text', text=message['content']) -%}
{%- set ns.messages = ns.messages + [dict(message, content=[part])] -%}
{%- else -%}
{%- set ns.messages = ns.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ns.messages %}"""

# For tokenizers without a template. Its words are plain, so that any vocabulary has them.
DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
ASSISTANT:{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{%- elif message['role'] == 'system' -%}
{{ message['content'] + ' ' }}
{%- else -%}
{{ ('' if loop.first else ' ') + 'USER: ' + message['content'] + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""


def cut_views(image: Image.Image, tiles: int, size, coarse: str = "squash") -> list[Image.Image]:
    """Cut an image into encoder-sized views: one coarse view, then tiles x tiles fine views.

    All views are resized from the original with Pillow's bicubic filter. "squash" ignores the
    aspect ratio, so that fine patches lie under coarse ones.

    Args:
        image: an image of any size and mode.
        tiles: fine views per side; 0 for none.
        size: pixels of a view, one number or (height, width).
        coarse: "squash", or "crop" as in the released training loader (arXiv 2602.00505): the
            smallest image that covers the view, then its center. With "crop", fine views of a
            non-square image do not lie under the coarse view.

    Returns:
        1 + tiles^2 RGB images, the fine ones row by row.
    """
    image = to_rgb(image)
    height, width = as_pair(size)
    make_coarse = _crop_center if coarse == "crop" else _squash
    coarse_view = make_coarse(image, height, width)
    if not tiles:
        return [coarse_view]
    large = _squash(image, tiles * height, tiles * width)
    fine_views = []
    for top in range(0, tiles * height, height):
        for left in range(0, tiles * width, width):
            fine_views.append(large.crop((left, top, left + width, top + height)))
    return [coarse_view, *fine_views]


def _squash(image: Image.Image, height: int, width: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _crop_center(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize an image until it covers (height, width), then cut out its center."""
    is_wide = width * image.height <= height * image.width
    scaled_width = int(height * image.width / image.height)
    scaled_height = int(width * image.height / image.width)
    scaled_size = (scaled_width, height) if is_wide else (width, scaled_height)
    scaled = image.resize(scaled_size, Image.Resampling.BICUBIC)
    left = (scaled.width - width) // 2
    top = (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def _get_placeholder_id(tokenizer, placeholder: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(placeholder)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise UserError(
            f"the tokenizer has no token {placeholder!r}; add it with"
            f" tokenizer.add_special_tokens({{'additional_special_tokens': [{placeholder!r}]}})"
            " or name another token"
        )
    if placeholder not in tokenizer.get_added_vocab():
        # An ordinary word of the vocabulary: two of them in a row would be read as another word.
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [placeholder]}, replace_extra_special_tokens=False
        )
    return token_id


def drop_end_token(tokenizer) -> None:
    """Let a tokenizer append no end token to texts, as generation would go on after the end.

    What it writes before texts, such as a first token, stays.
    """
    if not tokenizer.is_fast:
        return
    ids = tokenizer("a")["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    num_added = len(ids) - len(inner)
    starts = [i for i in range(num_added + 1) if ids[i : i + len(inner)] == inner]
    if not starts or starts[0] == num_added:
        return
    before = ids[: starts[0]]
    tokens = tokenizer.convert_ids_to_tokens(before)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*tokens, "$A"]),
        special_tokens=list(dict(zip(tokens, before, strict=True)).items()),
    )


def _make_chat_template(tokenizer, placeholder: str) -> str:
    """The tokenizer's chat template, or ours if it has none, extended to accept image items."""
    own_template = tokenizer.get_chat_template() if tokenizer.chat_template else DEFAULT_TEMPLATE
    head = FLATTEN.replace("IMAGE_TOKEN", placeholder)
    if _takes_strings(tokenizer, own_template):
        return head + own_template
    return head + WRAP + own_template


def _mend_chat_template(tokenizer, placeholder: str, template: str) -> str:
    """A saved chat template, made fit for its own part where an older version did not see to it."""
    head = FLATTEN.replace("IMAGE_TOKEN", placeholder)
    own_template = template.removeprefix(head)
    if own_template == template or own_template.startswith(WRAP):
        return template
    return template if _takes_strings(tokenizer, own_template) else head + WRAP + own_template


def _takes_strings(tokenizer, template: str) -> bool:
    """Whether a template writes contents that are strings; some take lists of parts only."""

    def writes(content) -> bool:
        messages = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (TemplateError, TypeError):
            return False
        return PROBE in text and "'type'" not in text

    return writes(PROBE) or not writes([{"type": "text", "text": PROBE}])


class SparseCutProcessor(SavesCode, ProcessorMixin):
    r"""Prepares images and text for a SparseCut model.

    It joins a tokenizer and the image processor of an encoder. Of the image processor, only the
    normalization counts: mean, standard deviation and rescaling.

    Attributes:
        image_size: side of a view in pixels, or [height, width].
        tiles: fine views per side; 0 for none.
        num_image_tokens: positions per image in the prompt.
        coarse: "squash" (aligned with the fine views) or "crop" (see `cut_views`).
        image_token: placeholder in the text, one per image; it becomes `num_image_tokens` tokens.
        image_token_id: id of the placeholder.
        background: colour that transparent parts of images are laid on.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_size=None,
        tiles=0,
        num_image_tokens=None,
        coarse="squash",
        image_token="<image>",
        chat_template=None,
        background=WHITE,
    ):
        parse_color(background)
        self.background = background
        if coarse not in COARSE_VIEWS:
            raise UserError(f"coarse is {coarse!r}, but must be one of {', '.join(COARSE_VIEWS)}")
        self.image_size = image_size
        self.tiles = tiles
        self.coarse = coarse
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        # Generation continues from the last column. A saved tokenizer forgets this setting.
        tokenizer.padding_side = "left"
        self.image_token_id = _get_placeholder_id(tokenizer, image_token)
        drop_end_token(tokenizer)
        if chat_template:
            chat_template = _mend_chat_template(tokenizer, image_token, chat_template)
        else:
            chat_template = _make_chat_template(tokenizer, image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def num_views(self) -> int:
        """Views per image: one coarse view and all fine views."""
        return 1 + self.tiles**2

    def expand(self, text: str) -> str:
        """Repeat every placeholder once per image token."""
        return text.replace(self.image_token, self.image_token * self.num_image_tokens)

    def pixels(self, images: list, *, input_data_format=None, **settings) -> Tensor:
        """Cut images into views and normalize them.

        Args:
            images: PIL images, paths, bytes, arrays or tensors.
            input_data_format: "channels_first" or "channels_last", for arrays and tensors.
            settings: values of `NORMALIZATION` that replace those of the image processor.

        Returns:
            Float32 [images, 1 + tiles^2, 3, height, width], the coarse view first.

        Raises:
            UserError: An image cannot be read, or its values have no known scale.
        """
        if not len(images):
            return torch.empty(0, self.num_views, 3, *as_pair(self.image_size))
        read = [self._read_levels(image, input_data_format) for image in images]
        levels = np.stack([views for views, _ in read])
        values = {name: getattr(self.image_processor, name) for name in NORMALIZATION} | settings
        pixels = _normalize(levels, values)
        if not values["do_rescale"]:
            # Fractions are scaled already. Levels stay as they are, as in transformers.
            is_fraction = np.array([fraction for _, fraction in read])
            scaled = values | {"do_rescale": True, "rescale_factor": 1 / 255}
            pixels[is_fraction] = _normalize(levels[is_fraction], scaled)
        return torch.from_numpy(pixels)

    def _read_levels(self, image, input_data_format) -> tuple[np.ndarray, bool]:
        """The views of an image as levels from 0 to 255, and whether it had fractions of white.

        The views are uint8 [views, height, width, 3].
        """
        is_fraction = False
        if isinstance(image, Image.Image | str | Path | bytes):
            image = open_image(image, self.background)
        else:
            image, is_fraction = array_to_rgb(image, input_data_format, self.background)
        views = cut_views(image, self.tiles, self.image_size, self.coarse)
        return np.stack([np.asarray(view) for view in views]), is_fraction

    def _process_images(self, images, **kwargs):
        settings = {name: kwargs[name] for name in NORMALIZATION if kwargs.get(name) is not None}
        pixels = self.pixels(images, input_data_format="channels_last", **settings)
        inputs = {"pixel_values": pixels}
        return inputs, [self.replace_image_token(inputs, i) for i in range(len(pixels))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that replaces one placeholder: the same number of image tokens for any image."""
        return self.expand(self.image_token)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        num_images = len(image_sizes or [])
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * num_images,
            num_image_patches=[self.num_views] * num_images,
        )

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs
    ) -> BatchFeature:
        """Convert texts to token ids and their images to pixel values.

        Args:
            images: one image, a list of images in the order of the placeholders, or one list per
                text. Images are PIL, paths, bytes, URLs, arrays or tensors.
            text: one text or several.
            kwargs: those of Hugging Face processors, such as `padding` and `return_tensors`.

        Returns:
            input_ids and attention_mask [B, L]. With images also pixel_values
            [images, 1 + tiles^2, 3, height, width].

        Raises:
            UserError: A text has more or fewer placeholders than images, or an image cannot be
                read.
        """
        layout = (kwargs.get("images_kwargs") or {}).get("input_data_format")
        layout = kwargs.pop("input_data_format", layout)
        images = [] if images is None else list_images(images)
        if text is not None:
            self._check_placeholders(images, [text] if isinstance(text, str) else text)
        if any(isinstance(row, list) for row in images):
            images = [image for row in images for image in row]
        opened = [self._open(image, layout) for image in images]
        return super().__call__(images=opened or None, text=text, **kwargs)

    def _open(self, image, layout) -> Image.Image | np.ndarray:
        """An image as transformers takes it: PIL in RGB, or an array with channels last."""
        if isinstance(image, Image.Image | str | Path | bytes):
            return open_image(image, self.background)
        return put_channels_last(image, layout)

    def _check_placeholders(self, images: list, texts: Sequence[str]) -> None:
        counts = [text.count(self.image_token) for text in texts]
        is_nested = any(isinstance(row, list) for row in images)
        if not is_nested:
            if len(images) != sum(counts):
                raise UserError(
                    f"the texts have {sum(counts)} placeholders {self.image_token}, but there are"
                    f" {len(images)} images; write one placeholder per image"
                )
            return
        if len(images) != len(texts):
            raise UserError(
                f"there are {len(texts)} texts, but lists of images for {len(images)}; give one"
                " list per text, [] for a text without images"
            )
        for row, (row_images, count) in enumerate(zip(images, counts, strict=True)):
            if count != len(row_images):
                raise UserError(
                    f"text {row} has {count} placeholders {self.image_token}, but"
                    f" {len(row_images)} images; write one placeholder per image"
                )

    @property
    def model_input_names(self):
        """Names of what `__call__` returns."""
        return [*self.tokenizer.model_input_names, "pixel_values"]


def _normalize(levels: np.ndarray, values: dict) -> np.ndarray:
    """Normalized levels [images, views, height, width, 3]; the channels come third."""
    table = np.arange(256, dtype=np.float64)
    if values["do_rescale"]:
        table = table * values["rescale_factor"]
    table = np.tile(table.astype(np.float32), (3, 1))
    if values["do_normalize"]:
        mean = np.asarray(values["image_mean"], dtype=np.float32).reshape(-1, 1)
        std = np.asarray(values["image_std"], dtype=np.float32).reshape(-1, 1)
        table = (table - mean) / std
    return np.stack([table[channel][levels[..., channel]] for channel in range(3)], axis=2)


class SparseCutAudioProcessor(SavesCode, ProcessorMixin):
    r"""Prepares audio and text for a SparseCut model with an audio encoder.

    It joins a tokenizer and the feature extractor of an encoder such as Whisper's. A spectrogram
    takes the place of an image's views: `pixel_values` are [clips, 1, mels, frames].

    Recipes, evaluation and chat read images only. Train a model with an audio encoder by a Trainer
    or a loop of your own (examples/audio.py).

    Attributes:
        num_audio_tokens: positions per audio clip in the prompt.
        audio_token: placeholder in the text, one per clip; it becomes `num_audio_tokens` tokens.
        audio_token_id: id of the placeholder.
    """

    def __init__(
        self,
        feature_extractor=None,
        tokenizer=None,
        num_audio_tokens=None,
        audio_token="<audio>",
        chat_template=None,
    ):
        self.num_audio_tokens = num_audio_tokens
        self.audio_token = audio_token
        tokenizer.padding_side = "left"  # as above
        self.audio_token_id = _get_placeholder_id(tokenizer, audio_token)
        drop_end_token(tokenizer)
        if not chat_template:
            chat_template = _make_chat_template(tokenizer, audio_token)
            chat_template = chat_template.replace("'image'", "'audio'")
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    def _process_audio(self, audio, **kwargs):
        """Spectrograms, and the text that replaces each placeholder."""
        extractor = self.feature_extractor
        num_samples = max(len(clip) for clip in audio)
        if num_samples > extractor.n_samples:
            raise UserError(
                f"an audio clip has {num_samples} samples, but the encoder takes at most"
                f" {extractor.n_samples} ({extractor.chunk_length} s at {extractor.sampling_rate}"
                " Hz); cut the clip into parts"
            )
        # The other keywords (padding, truncation) are for text: all spectrograms have one length.
        rate = kwargs.get("sampling_rate") or extractor.sampling_rate
        features = extractor(audio, sampling_rate=rate, return_tensors="pt")["input_features"]
        replacements = [self.audio_token * self.num_audio_tokens] * len(audio)
        return {"pixel_values": features.unsqueeze(1)}, replacements

    def _get_num_multimodal_tokens(self, audio_lengths=None, **kwargs):
        return MultiModalData(num_audio_tokens=[self.num_audio_tokens] * len(audio_lengths or []))

    @property
    def model_input_names(self):
        """Names of what `__call__` returns."""
        return [*self.tokenizer.model_input_names, "pixel_values"]
