"""What vLLM knows of an image: how many tokens it takes, and the pixels our processor makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    PromptReplacement,
    PromptUpdate,
)

from ...processing import SparseCutProcessor
from ...view_sizes import as_pair
from .checks import check_servable


class ProcessingInfo(BaseProcessingInfo):
    """Facts of a model's processor.

    Raises:
        UserError: vLLM cannot serve the model exactly.
    """

    def __init__(self, ctx: InputProcessingContext):
        super().__init__(ctx)
        check_servable(ctx.model_config.hf_config)

    def get_hf_processor(self, **kwargs: object) -> SparseCutProcessor:
        return self.ctx.get_hf_processor(SparseCutProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}  # any number of images

    def count_tokens(self, height: int, width: int) -> int:
        """Return the image tokens of an image of this size."""
        counts = self.get_hf_processor()._get_num_multimodal_tokens([(height, width)])
        return counts.num_image_tokens[0]

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {"image": self.get_hf_processor().num_image_tokens}

    def get_largest_size(self) -> tuple[int, int]:
        """Return the height and width of an image that takes the most tokens."""
        processor = self.get_hf_processor()
        if not processor.is_any_size:
            _, height, width = self.get_hf_config().grid.view
            return height, width
        sides = as_pair(processor.patch_size)
        height, width = (side * processor.merge_size for side in sides)
        most = processor.max_pixels // (height * width)
        columns = max(range(1, math.isqrt(most) + 1), key=lambda number: most // number * number)
        return most // columns * height, columns * width


class DummyInputsBuilder(BaseDummyInputsBuilder[ProcessingInfo]):
    """Images that vLLM measures its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self,
        seq_len: int,
        mm_counts: Mapping[str, int],
        mm_options: MultiModalDummyOptions,
    ) -> MultiModalDataDict:
        height, width = self.info.get_largest_size()
        images = self._get_dummy_images(
            width=width,
            height=height,
            num_images=mm_counts.get("image", 0),
            overrides=mm_options.get("image"),
        )
        return {"image": images}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Turns one placeholder in a prompt into all tokens of its image."""

    def _get_hf_mm_text(self, mm_counts: Mapping[str, int]) -> None:
        return None  # our processor prepares images without a text, which vLLM has as tokens

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        if "image_grids" not in hf_inputs:
            return {"pixel_values": MultiModalFieldConfig.batched("image")}
        num_patches = hf_inputs["image_grids"].prod(dim=-1)
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", num_patches),
            "image_grids": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token = self.info.get_hf_config().image_token_id

        def repeat_token(number: int) -> list[int]:
            size = mm_items.get_items("image", ImageProcessorItems).get_image_size(number)
            return [token] * self.info.count_tokens(size.height, size.width)

        return [PromptReplacement(modality="image", target=[token], replacement=repeat_token)]
