"""Pictures to views, conversations to token ids: the processor of a SparseCut model.

The same steps at training and at inference, so that what a model sees never depends on who calls it.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .encoders import pair
from .schema import UserError

COARSE = ("squash", "crop")
NORMALISING = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")

# Put before a tokenizer's own chat template, which often knows string contents only: lists of
# {"type": "image"} and {"type": "text"} items become one string, pictures as the placeholder on a
# line of its own.
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

# Used where a tokenizer brings no template; plain words, so that any vocabulary has them.
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


def views(image: Image.Image, tiles: int, size, coarse: str = "squash") -> list[Image.Image]:
    """Cut the encoder-sized views of a picture: the coarse one, then tiles x tiles fine ones, row
    by row.

    size: pixels of a view, or (height, width). Pillow bicubic from the original, ignoring the
    aspect ratio, so that fine patches lie under coarse ones. coarse="crop" is what the released
    training loader does instead (the smallest picture that covers the view, then its centre): for
    comparison only, because fine views of a picture of another shape no longer lie under it.
    """
    image = image.convert("RGB")
    h, w = pair(size)
    if coarse == "crop":
        width, height = image.size
        wide = w * height <= h * width  # the height decides
        scaled = (int(h * width / height), h) if wide else (w, int(w * height / width))
        scaled = image.resize(scaled, Image.Resampling.BICUBIC)
        left, top = (scaled.width - w) // 2, (scaled.height - h) // 2
        out = [scaled.crop((left, top, left + w, top + h))]
    else:
        out = [image.resize((w, h), Image.Resampling.BICUBIC)]
    if tiles:
        big = image.resize((tiles * w, tiles * h), Image.Resampling.BICUBIC)
        corners = [(x * w, y * h) for y in range(tiles) for x in range(tiles)]
        out += [big.crop((x, y, x + w, y + h)) for x, y in corners]
    return out


class SparseCutProcessor(ProcessorMixin):
    r"""An encoder's image processor (its mean, standard deviation and rescaling) and a tokenizer,
    with views and image tokens.

    image_size: side of a view in pixels, or [height, width]. tiles: fine views per side, 0 for
    none.
    num_image_tokens: positions per picture. coarse: "squash" (aligned with the fine views) or
    "crop" (the released training loader).
    image_token: one placeholder per picture in a text, expanded to `num_image_tokens` copies.
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
    ):
        if coarse not in COARSE:
            raise UserError(f"coarse is {coarse!r}, but must be one of {', '.join(COARSE)}")
        self.image_size, self.tiles, self.coarse = image_size, tiles, coarse
        self.num_image_tokens, self.image_token = num_image_tokens, image_token
        # generation continues from the last column; a saved tokenizer forgets this
        tokenizer.padding_side = "left"
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise UserError(
                f"the tokenizer has no token {image_token!r}; add it with"
                f" tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})"
                " or name another one"
            )
        super().__init__(
            image_processor,
            tokenizer,
            chat_template=chat_template or self.flattening(tokenizer, image_token),
        )

    @staticmethod
    def flattening(tokenizer, image_token: str) -> str:
        """The tokenizer's chat template (or ours, where it has none), made to accept pictures in
        contents.
        """
        return FLATTEN.replace("IMAGE_TOKEN", image_token) + (
            tokenizer.get_chat_template() if tokenizer.chat_template else DEFAULT_TEMPLATE
        )

    @property
    def num_views(self) -> int:
        """Views per picture, coarse and fine."""
        return 1 + self.tiles**2

    def expand(self, text: str) -> str:
        """Replace every placeholder by as many image tokens as a picture takes."""
        return text.replace(self.image_token, self.image_token * self.num_image_tokens)

    def pixels(self, images: list, **settings) -> Tensor:
        """Normalised views of pictures: float32 [pictures, 1 + tiles^2, 3, h, w], coarse view
        first.

        settings: of NORMALISING, instead of the image processor's own.
        """
        pictures = [
            image if isinstance(image, Image.Image) else to_pil_image(image) for image in images
        ]
        levels = [
            [np.asarray(v) for v in views(p, self.tiles, self.image_size, self.coarse)]
            for p in pictures
        ]
        if not levels:
            return torch.empty(0, self.num_views, 3, *pair(self.image_size))
        table = self._normalised_levels(**settings)
        levels = np.stack([np.stack(v) for v in levels])
        return torch.from_numpy(np.stack([table[c][levels[..., c]] for c in range(3)], axis=2))

    def _normalised_levels(self, **settings) -> np.ndarray:
        """What the encoder's image processor makes of the 256 levels of each channel: float32 [3,
        256].
        """
        p = {name: getattr(self.image_processor, name) for name in NORMALISING} | settings
        levels = np.arange(256, dtype=np.float64)
        if p["do_rescale"]:
            levels = levels * p["rescale_factor"]
        levels = np.tile(levels.astype(np.float32), (3, 1))
        if p["do_normalize"]:
            mean, std = (
                np.asarray(p[name], dtype=np.float32).reshape(-1, 1)
                for name in ("image_mean", "image_std")
            )
            levels = (levels - mean) / std
        return levels

    def _process_images(self, images, **kwargs):
        settings = {name: kwargs[name] for name in NORMALISING if kwargs.get(name) is not None}
        pixels = self.pixels(make_flat_list_of_images(images), **settings)
        inputs = {"pixel_values": pixels}
        return inputs, [self.replace_image_token(inputs, i) for i in range(len(pixels))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What a placeholder becomes: as many image tokens as a picture takes, whichever it is."""
        return self.expand(self.image_token)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        sizes = image_sizes or []
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * len(sizes),
            num_image_patches=[self.num_views] * len(sizes),
        )

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs
    ) -> BatchFeature:
        """Token ids of texts and pixel values of their pictures, as Hugging Face processors return
        them.

        images: a picture, a list of pictures in the order of the placeholders, or one list per
        text. text: one or several. Returns input_ids and attention_mask [B, L] and, only where
        pictures are given, pixel_values [pictures, 1 + tiles^2, 3, h, w]. Raises ValueError where
        the numbers of placeholders and pictures differ.
        """
        if isinstance(images, (list, tuple)) and not any(
            len(i) if isinstance(i, (list, tuple)) else 1 for i in images
        ):
            images = None  # a batch of texts without any picture
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if (
                images is not None
                and isinstance(images, (list, tuple))
                and any(isinstance(i, (list, tuple)) for i in images)
            ):
                if len(images) == len(texts):
                    self._check_rows(images, texts)
                images = [picture for row in images for picture in row]
        return super().__call__(images=images, text=text, **kwargs)

    def _check_rows(self, images, texts):
        for row, (pictures, line) in enumerate(zip(images, texts, strict=True)):
            if line.count(self.image_token) != len(pictures):
                raise UserError(
                    f"text {row} has {line.count(self.image_token)} placeholders"
                    f" {self.image_token}, but {len(pictures)} pictures were given for it; write"
                    " one placeholder per picture"
                )

    @property
    def model_input_names(self):
        """Names of what `__call__` returns."""
        return [*self.tokenizer.model_input_names, "pixel_values"]
