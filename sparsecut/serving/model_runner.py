"""The model behind the engine: prompts to tokens, images to vision features, batches to answers.

Images are encoded one by one, so that their features do not depend on the batch. The features are
cached by the image's digest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..audio import Clip
from ..modeling_base import SparseCutImageFeatures
from ..pixels import to_rgb
from ..prompts import get_max_length, get_medium, make_greedy_config, prepare_inputs
from ..schema import UserError
from .decoding import GenerationRow, PerRowSampler
from .image_cache import ImageFeatureCache, PreparedImage, hash_clip, hash_image
from .prompt_reader import PromptReader, list_grids

# Base models of which an image's features are known to be the same alone as in a batch.
CACHEABLE_BASES = ("llava", "qwen2_5_vl")
PIXELS = ("pixel_values", "fine_pixel_values")
ENCODER_INPUTS = (*PIXELS, "image_grid_thw")


class ModelRunner:
    """A model, its processor, and the cache of its vision features.

    `prepare_image` and the methods of `reader` may be called from any thread, `generate` from one
    alone.

    Attributes:
        model: The model.
        processor: Its processor.
        image_token: Its placeholder for an image in a prompt.
        medium: What it takes beside text, "image" or "audio".
        feature_cache: Features of images by (digest, shortcuts that are off).
        counts: Counts "images" and, of them, "cached_images".
        reader: Reads the prompts of requests.
    """

    def __init__(self, model, processor, cache_bytes: int):
        """
        Args:
            model: A SparseCut model, joined or upgraded.
            processor: Its processor.
            cache_bytes: Bytes of vision features to keep; 0 keeps none.

        Raises:
            UserError: For a processor without a placeholder for images or audio.
        """
        self.image_token = getattr(processor, "image_token", None)
        if self.image_token is None:
            raise UserError(
                f"{type(processor).__name__} has no placeholder for images or audio; the server"
                " answers about these, so give a model with an encoder of them"
            )
        self.medium = get_medium(processor)
        self.model = model.eval()
        self.processor = processor
        # A joined model reads equally many views of every image; a base decides for itself.
        self.uses_views = not model.is_upgrade
        self.uses_cache = self.uses_views or model.config.base_config.model_type in CACHEABLE_BASES
        if model.plan.needs_prompt:  # an image's features then differ by prompt
            self.uses_cache = False
        self.feature_cache = ImageFeatureCache(cache_bytes if self.uses_cache else 0)
        self.counts: Counter = Counter()
        end_ids = model.generation_config.eos_token_id
        self.end_ids = set(end_ids if isinstance(end_ids, list) else [end_ids]) - {None}
        self.reader = PromptReader(model, processor, uses_views=self.uses_views)

    @property
    def max_positions(self) -> int | None:
        """How many tokens the language model takes; None where its configuration has no limit."""
        return get_max_length(self.model)

    def prepare_image(self, image: Image.Image | Clip) -> PreparedImage:
        """An image, or a clip of sound, as it waits for the model.

        Views are cached in place of the image where they are enough, because photographs would fill
        the memory.
        """
        if isinstance(image, Clip):
            return PreparedImage(hash_clip(image), views=self.processor.pixels([image]))
        image = to_rgb(image)
        digest = hash_image(image)
        if self.uses_views:
            inputs = self.processor.prepare_images([image])
            return PreparedImage(digest, None, inputs["pixel_values"], inputs.get("image_grids"))
        return PreparedImage(digest, image=image)

    @torch.inference_mode()
    def generate(
        self,
        rows: list[GenerationRow],
        prompts: list[str],
        images: list[Sequence[PreparedImage]],
        shortcuts_off: tuple[int, ...],
        is_wanted: Callable[[int], bool],
    ) -> None:
        """Write the answers of a batch.

        Args:
            rows: One per answer.
            prompts: The prompt of each row.
            images: The images of each row.
            shortcuts_off: Numbers of the shortcuts that add nothing.
            is_wanted: Whether somebody still reads the row of this number.
        """
        sampler = PerRowSampler(rows, is_wanted)
        longest = max(row.sampling.max_new_tokens for row in rows)
        with self.model.fusion.switched_off(*shortcuts_off):
            self.model.generate(
                **self._build_inputs(prompts, images, shortcuts_off),
                generation_config=make_greedy_config(self.model, longest),
                logits_processor=LogitsProcessorList([sampler.choose]),
                stopping_criteria=StoppingCriteriaList([sampler.find_ended]),
            )

    def _process(self, prompts: list[str], images: Sequence[Sequence[PreparedImage]]) -> dict:
        """What the processor makes of prompts; pixels only where images are not held as views."""
        whole_images = None
        if not self.uses_views:
            whole_images = []
            for row in images:
                whole_images.append([image.image for image in row])
        grids = list_grids(images)
        return dict(prepare_inputs(self.model, self.processor, prompts, whole_images, grids))

    def _build_inputs(
        self,
        prompts: list[str],
        images: list[Sequence[PreparedImage]],
        shortcuts_off: tuple[int, ...],
    ) -> dict:
        """What `generate` takes: the padded prompts, and pixels or the images' features."""
        inputs = self._process(prompts, images)
        all_images = [image for row in images for image in row]
        if not all_images or not self.uses_cache:
            self.counts["images"] += len(all_images)
            return inputs | self._join_views(all_images)
        features = [self._get_features(image, shortcuts_off) for image in all_images]
        by_layer = [list(layer) for layer in zip(*features, strict=True)]
        output = SparseCutImageFeatures(
            pooler_output=by_layer[0], deepstack_features=by_layer[1:] or None
        )
        for name in PIXELS:
            inputs.pop(name, None)
        inputs["mm_encoder_outputs"] = {"image": output}
        return inputs

    def _join_views(self, images: Sequence[PreparedImage]) -> dict[str, Tensor]:
        """The pixels of images that wait as views; nothing for those that wait whole."""
        if not images or not self.uses_views:
            return {}
        device = self.model.device
        joined = {"pixel_values": torch.cat([image.views for image in images]).to(device)}
        if images[0].grid is not None:
            joined["image_grids"] = torch.cat([torch.as_tensor(image.grid) for image in images])
        return joined

    def _get_features(self, image: PreparedImage, shortcuts_off: tuple[int, ...]) -> list[Tensor]:
        """An image's features for every layer, from the input up: from the cache or encoded now."""
        key = (image.digest, shortcuts_off)
        self.counts["images"] += 1
        features = self.feature_cache.get(key)
        if features is not None:
            self.counts["cached_images"] += 1
            return features
        # Copies: a part of a larger tensor would keep more memory than is counted.
        features = [feature.clone() for feature in self._encode(image)]
        self.feature_cache.put(key, features)
        return features

    def _encode(self, image: PreparedImage) -> list[Tensor]:
        """An image's features [N, D] for every layer, from the input up."""
        return self._encode_views(image) if self.uses_views else self._encode_whole(image)

    def _encode_views(self, image: PreparedImage) -> list[Tensor]:
        views = image.views.to(self.model.device)
        output = self.model.get_image_features(views, image_grids=image.grid)
        by_layer = [output.pooler_output]
        if output.deepstack_features:
            by_layer += output.deepstack_features
        return [features[0] for features in by_layer]

    def _encode_whole(self, image: PreparedImage) -> list[Tensor]:
        inputs = self._process([self.image_token], [[image]])
        pixels = {name: inputs[name] for name in ENCODER_INPUTS if name in inputs}
        output = self.model.get_image_features(**pixels)
        # A base's features hold those of the shortcuts side by side.
        return [torch.cat(list(output.pooler_output))]
