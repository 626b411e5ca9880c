"""The processor of images: images to views, and text to token ids.

Training and inference call the same steps, so the inputs of a model never depend on the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .chat_markup import (
    drop_end_token,
    get_placeholder_id,
    make_chat_template,
    mend_chat_template,
)
from .cutting import (
    check_pixel_limits,
    choose_grid,
    cut_levels,
    cut_patches,
    normalize,
)
from .cutting import cut_views as cut_views
from .pixels import (
    WHITE,
    array_to_rgb,
    list_images,
    open_image,
    parse_color,
    put_channels_last,
)
from .plan import MIXERS
from .saved_code import SavesCode
from .schema import UserError
from .view_sizes import COARSE_VIEWS, NATIVE, as_pair

# settings of an image processor that change pixel values
NORMALIZATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


class SparseCutProcessor(SavesCode, ProcessorMixin):
    r"""Prepares images and text for a SparseCut model.

    It joins a tokenizer and the image processor of an encoder. Of the image processor, only the
    normalization counts: mean, standard deviation and rescaling.

    Attributes:
        image_size: side of a view in pixels, or [height, width].
        tiles: fine views per side; 0 for none.
        num_image_tokens: positions per image in the prompt; with "native" the most.
        coarse: "squash" (aligned with the fine views) or "crop" (see `cut_views`). Or "native":
            every image keeps its aspect ratio and takes as many tokens as its size needs.
        image_token: placeholder in the text, one per image; it becomes its image tokens.
        image_token_id: id of the placeholder.
        background: colour that transparent parts of images are laid on.
        min_pixels: with "native", the fewest pixels of an image after it was resized.
        max_pixels: with "native", the most.
        patch_size: with "native", height and width of a patch in pixels.
        merge_size: with "native", rows and columns of patches are multiples of it.
        mix: with "native", the mixer of the shortcuts, which decides how many tokens there are.
        num_taps: with "native", the taps of such a shortcut.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_size: Any = None,
        tiles: Any = 0,
        num_image_tokens: Any = None,
        coarse: Any = "squash",
        image_token: Any = "<image>",
        chat_template: Any = None,
        background: Any = WHITE,
        min_pixels: Any = None,
        max_pixels: Any = None,
        patch_size: Any = None,
        merge_size: Any = 1,
        mix: Any = "pick",
        num_taps: Any = 1,
    ) -> None:
        parse_color(background)
        self.background = background
        if coarse not in COARSE_VIEWS:
            raise UserError(f"coarse is {coarse!r}, but must be one of {', '.join(COARSE_VIEWS)}")
        self.image_size = image_size
        self.tiles = tiles
        self.coarse = coarse
        self.num_image_tokens = num_image_tokens
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.patch_size, self.merge_size = patch_size, merge_size
        self.mix, self.num_taps = mix, num_taps
        if self.is_any_size:
            self._set_limits()
        self.image_token = image_token
        # Generation continues from the last column. A saved tokenizer forgets this setting.
        tokenizer.padding_side = "left"
        self.image_token_id = get_placeholder_id(tokenizer, image_token)
        drop_end_token(tokenizer)
        if chat_template:
            chat_template = mend_chat_template(tokenizer, image_token, chat_template)
        else:
            chat_template = make_chat_template(tokenizer, image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def num_views(self) -> int:
        """Views per image: one coarse view and all fine views."""
        return 1 + self.tiles**2

    @property
    def is_any_size(self) -> bool:
        """Whether images keep their aspect ratio and take different numbers of image tokens."""
        return self.coarse == NATIVE

    @property
    def _unit(self) -> tuple[int, int]:
        """Height and width that resized images are a multiple of."""
        height, width = as_pair(self.patch_size)
        return height * self.merge_size, width * self.merge_size

    def _set_limits(self) -> None:
        """Check the limits, and count the tokens of the largest image."""
        if self.patch_size is None:
            raise UserError("coarse='native' needs patch_size, the pixels of a patch; give it")
        check_pixel_limits(self.min_pixels, self.max_pixels, self._unit)
        height, width = self._unit
        most = self.max_pixels // (height * width) * self.merge_size**2
        self.num_image_tokens = self.count_tokens((1, most))

    def choose_grid(self, height: int, width: int) -> tuple[int, int]:
        """Choose how many rows and columns of patches an image of any size becomes.

        Args:
            height: Of the image, upright, in pixels.
            width: The same.
        """
        rows, columns = choose_grid((height, width), self._unit, self.min_pixels, self.max_pixels)
        return rows * self.merge_size, columns * self.merge_size

    def count_tokens(self, grid: Sequence[int]) -> int:
        """Count the image tokens of an image of this many rows and columns of patches."""
        rows, columns = grid
        mixer = MIXERS[self.mix]
        num_windows = mixer.count_windows(int(rows) * int(columns), int(rows))
        return mixer.count_tokens(self.num_taps, self.num_views, num_windows)

    def expand(self, text: str, grids: Sequence | None = None) -> str:
        """Repeat every placeholder once per image token.

        Args:
            text: The text.
            grids: With "native", rows and columns of every image of the text, in order.
        """
        if not self.is_any_size:
            return text.replace(self.image_token, self.image_token * self.num_image_tokens)
        first, *others = text.split(self.image_token)
        grids = [] if grids is None else list(grids)
        if len(others) != len(grids):
            raise UserError(
                f"the text has {len(others)} placeholders {self.image_token}, but the grids of"
                f" {len(grids)} images; images of any size need one for each"
            )
        for grid, other in zip(grids, others, strict=True):
            first += self.image_token * self.count_tokens(grid) + other
        return first

    def prepare_images(
        self, images: list, *, input_data_format: Any = None, **settings: Any
    ) -> dict[str, Tensor]:
        """Make what the model reads of images.

        Args:
            images: As `pixels` takes them.
            input_data_format: The same.
            settings: The same.

        Returns:
            `pixel_values`, and with "native" `image_grids`, int64 [images, 2]: the rows and columns
            of patches of every image.
        """
        if not self.is_any_size:
            pixels = self.pixels(images, input_data_format=input_data_format, **settings)
            return {"pixel_values": pixels}
        patch = as_pair(self.patch_size)
        pixels = [torch.empty(0, self.num_views, 3, *patch)]
        grids = []
        for image in images:
            opened, is_fraction = self._open_rgb(image, input_data_format)
            grids.append(self.choose_grid(opened.height, opened.width))
            patches = cut_patches(opened, self.tiles, grids[-1], patch)
            pixels.append(torch.empty(*patches.shape[:2], 3, *patch))
            views = patches.reshape(-1, *patches.shape[2:])
            self._normalize(views, is_fraction, settings, pixels[-1].flatten(0, 1))
        return {
            "pixel_values": torch.cat(pixels),
            "image_grids": torch.tensor(grids, dtype=torch.long).reshape(-1, 2),
        }

    def _normalize(
        self, views: Sequence[np.ndarray], is_fraction: bool, settings: dict, out: Tensor
    ) -> None:
        """Write the pixels of one image's views; fractions of white are scaled already."""
        values = {name: getattr(self.image_processor, name) for name in NORMALIZATION} | settings
        if is_fraction and not values["do_rescale"]:
            values |= {"do_rescale": True, "rescale_factor": 1 / 255}
        normalize(views, values, out.numpy())

    def pixels(self, images: list, *, input_data_format: Any = None, **settings: Any) -> Tensor:
        """Cut images into views and normalize them.

        Args:
            images: PIL images, paths, bytes, arrays or tensors.
            input_data_format: "channels_first" or "channels_last", for arrays and tensors.
            settings: values of `NORMALIZATION` that replace those of the image processor.

        Returns:
            Float32 [images, 1 + tiles^2, 3, height, width], the coarse view first. With "native"
            [patches, 1 + tiles^2, 3, height, width] of all images; see `prepare_images`.

        Raises:
            UserError: An image cannot be read, or its values have no known scale.
        """
        if self.is_any_size:
            inputs = self.prepare_images(images, input_data_format=input_data_format, **settings)
            return inputs["pixel_values"]
        pixels = torch.empty(len(images), self.num_views, 3, *as_pair(self.image_size))
        first: dict[int, int] = {}  # a batch may ask about one image several times
        for number, image in enumerate(images):
            same = first.setdefault(id(image), number)
            if same != number:
                pixels[number] = pixels[same]
                continue
            opened, is_fraction = self._open_rgb(image, input_data_format)
            views = cut_levels(opened, self.tiles, self.image_size, self.coarse)
            self._normalize(views, is_fraction, settings, pixels[number])
        return pixels

    def _open_rgb(self, image: Any, input_data_format: Any) -> tuple[Image.Image, bool]:
        """An image in RGB, and whether it had fractions of white."""
        if isinstance(image, Image.Image | str | Path | bytes):
            return open_image(image, self.background), False
        return array_to_rgb(image, input_data_format, self.background)

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        settings = {name: kwargs[name] for name in NORMALIZATION if kwargs.get(name) is not None}
        inputs = self.prepare_images(images, input_data_format="channels_last", **settings)
        return inputs, [self.replace_image_token(inputs, i) for i in range(len(images))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that replaces one placeholder: its image's tokens."""
        if not self.is_any_size:
            return self.expand(self.image_token)
        return self.expand(self.image_token, [image_inputs["image_grids"][image_idx].tolist()])

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        """Tokens of images (height, width), and the rows of `pixel_values` that belong to each."""
        sizes = image_sizes or []
        if not self.is_any_size:
            num_tokens = [self.num_image_tokens] * len(sizes)
            num_rows = [self.num_views] * len(sizes)
            return MultiModalData(num_image_tokens=num_tokens, num_image_patches=num_rows)
        grids = [self.choose_grid(*size) for size in sizes]
        return MultiModalData(
            num_image_tokens=[self.count_tokens(grid) for grid in grids],
            num_image_patches=[rows * columns for rows, columns in grids],
        )

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Convert texts to token ids and their images to pixel values.

        Args:
            images: one image, a list of images in the order of the placeholders, or one list per
                text. Images are PIL, paths, bytes, URLs, arrays or tensors.
            text: one text or several.
            kwargs: those of Hugging Face processors, such as `padding` and `return_tensors`.

        Returns:
            input_ids and attention_mask [B, L]. With images also what `prepare_images` returns.

        Raises:
            UserError: A text has more or fewer placeholders than images, an image cannot be read,
                or pixel limits are given.
        """
        self._check_no_limits({**kwargs, **(kwargs.get("images_kwargs") or {})})
        layout = (kwargs.get("images_kwargs") or {}).get("input_data_format")
        layout = kwargs.pop("input_data_format", layout)
        images = [] if images is None else list_images(images)
        if text is not None:
            self._check_placeholders(images, [text] if isinstance(text, str) else text)
        if any(isinstance(row, list) for row in images):
            images = [image for row in images for image in row]
        opened = [self._open(image, layout) for image in images]
        return super().__call__(images=opened or None, text=text, **kwargs)

    def _check_no_limits(self, settings: dict) -> None:
        """Refuse limits for one call: counts of tokens elsewhere would be of other limits."""
        given = [name for name in ("min_pixels", "max_pixels") if settings.get(name) is not None]
        if self.is_any_size and given:
            raise UserError(
                f"{given[0]} is given for one call, but holds for all images of a processor; load"
                f" it with AutoProcessor.from_pretrained(..., {given[0]}={settings[given[0]]!r})"
            )

    def _open(self, image: Any, layout: Any) -> Image.Image | np.ndarray:
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
    def model_input_names(self) -> Any:
        """Names of what `__call__` returns."""
        names = ["pixel_values", "image_grids"] if self.is_any_size else ["pixel_values"]
        return [*self.tokenizer.model_input_names, *names]
