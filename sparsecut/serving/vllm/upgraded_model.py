"""An upgraded model in vLLM: the base's encoder with our fusion, and vLLM's own decoder.

What the base itself gives to decoder layers is packed with our features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMRoPE
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from ...configuration import SparseCutUpgradeConfig
from .checks import check_servable
from .model import ShortcutModel
from .upgraded_vision import UpgradedVision


class UpgradedProcessingInfo(MultiModalProcessingInfo):
    """Facts of the base's processor; shortcuts read images alone.

    Raises:
        UserError: vLLM cannot serve the model exactly.
    """

    def __init__(self, ctx: Any):
        super().__init__(ctx)
        check_servable(ctx.model_config.hf_config)

    def _get_supported_modalities(self) -> list[str]:
        return ["image"]

    _is_audio_model = _is_video_model = False


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=UpgradedProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class UpgradeForVLLM(ShortcutModel, SupportsMRoPE):
    """The model that `upgrade` makes, for vLLM.

    Raises:
        UserError: vLLM cannot serve the model exactly.
    """

    # Adapters that we save beside a model name modules of the language model without its head.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"layers.": "language_model.model.layers."}
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return None: chat templates of pretrained VLMs write the placeholders themselves."""
        return None

    def make_vision(self, config: SparseCutUpgradeConfig, dtype: torch.dtype) -> UpgradedVision:
        """Make the base's encoder and the fusion."""
        return UpgradedVision(config, dtype)

    def name_language_weight(self, name: str) -> str | None:
        """A saved weight's name in the decoder with its head; None for weights of other parts."""
        return self.vision.name_language_weight(name)

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Encode images and pack the features of the input and of all layers.

        Args:
            **kwargs: What the base's processor returns for images, and `num_image_patches`, the
                number of rows of `pixel_values` that belong to each.

        Returns:
            For each image [N, (1 + layers) * H].
        """
        if kwargs.get("pixel_values") is None:
            return []
        num_rows = kwargs.pop("num_image_patches").flatten().tolist()
        return self.vision.encode(num_rows, kwargs)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Return positions in time, height and width [3, L], and what later tokens add."""
        found = MultiModalFeatureSpec.gather_kwargs(mm_features, {"image_grid_thw"})
        grids = torch.stack(found["image_grid_thw"]) if found else None
        is_image = torch.zeros(1, len(input_tokens), dtype=torch.bool)
        for feature in mm_features:
            place = feature.mm_position
            chosen = slice(None) if place.is_embed is None else place.is_embed
            is_image[0, place.offset : place.offset + place.length][chosen] = True
        return self.vision.count_positions(torch.tensor([input_tokens]), is_image, grids)

    def get_mm_mapping(self) -> MultiModelKeys:
        """Return which modules are which part."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", tower_model="vision"
        )
