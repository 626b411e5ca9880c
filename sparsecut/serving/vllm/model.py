"""Models in vLLM: our encoder and fusion, and vLLM's own decoder.

The encoder runs once for an image. What it gives is packed on the last axis: the features that
replace the embeddings of the image's tokens, then those of every layer. vLLM caches the pack by
image and cuts it by tokens, so chunked prefill and prefix caching need nothing more.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsLoRA,
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from ...configuration import SparseCutConfig
from ...hooks import find_layers
from .checks import check_adapters, check_servable
from .decoders import get_decoder_class, list_layers, prepare_decoder
from .inputs import DummyInputsBuilder, ProcessingInfo, Processor
from .layers import ShortcutBuffers
from .vision import VisionPart

LANGUAGE = "language_model."  # the prefix of the language model's weights


class ShortcutModel(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """What built and upgraded models have in common in vLLM.

    Raises:
        UserError: vLLM cannot serve the model exactly.
    """

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        check_servable(config)
        check_adapters(vllm_config.model_config.model, vllm_config.lora_config is not None)
        self.config = config
        text_config = config.text_config.get_text_config()
        self.width = text_config.hidden_size
        self.configure_mm_token_handling(
            vocab_size=text_config.vocab_size, mm_token_ids=[config.image_token_id]
        )
        with self._mark_tower_model(vllm_config, "image"):
            self.vision = self.make_vision(config, vllm_config.model_config.dtype)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=prepare_decoder(config),
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[get_decoder_class(config.text_config)],
            )
        stages = get_pp_group()
        self.buffers_of_layers = ShortcutBuffers(
            find_layers(self.language_model, config.language_depth, "language model"),
            list_layers(config),
            vllm_config.scheduler_config.max_num_batched_tokens,
            self.width,
            vllm_config.model_config.dtype,
            range(*get_pp_indices(config.language_depth, stages.rank_in_group, stages.world_size)),
        )

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Return zeros in the form of what the stage before this one sends."""
        tensors = self.language_model.make_empty_intermediate_tensors(batch_size, dtype, device)
        features = self.buffers_of_layers.make_empty(batch_size, dtype, device)
        return IntermediateTensors(tensors.tensors | features)

    @abstractmethod
    def make_vision(self, config: Any, dtype: torch.dtype) -> nn.Module:
        """Make the half that reads images; it has `load`, which takes its weights by name."""

    @abstractmethod
    def name_language_weight(self, name: str) -> str | None:
        """A saved weight's name in the decoder with its head; None for weights of other parts."""

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embed the tokens of a step, and write its features into the buffers of their layers."""
        if multimodal_embeddings is None or not len(multimodal_embeddings):
            self.buffers_of_layers.write(None, None)
            return super().embed_input_ids(input_ids, is_multimodal=is_multimodal)
        packed = torch.cat(list(multimodal_embeddings))
        embedded, features = packed[:, : self.width], packed[:, self.width :]
        self.buffers_of_layers.write(features, is_multimodal)
        return super().embed_input_ids(input_ids, [embedded], is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        """One step of the decoder; its layers add what `embed_input_ids` wrote.

        Stages of a pipeline after the first one get these features from the stage before them.
        """
        buffers = self.buffers_of_layers
        num_tokens = positions.shape[-1]
        if intermediate_tensors is not None:
            intermediate_tensors = IntermediateTensors(
                buffers.receive(intermediate_tensors.tensors)
            )
        outputs = self.language_model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )
        if isinstance(outputs, IntermediateTensors):
            outputs = IntermediateTensors(outputs.tensors | buffers.copy_later(num_tokens))
        buffers.clear(num_tokens)
        return outputs

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of a saved model.

        Raises:
            UserError: Weights of the encoder or of the shortcuts are missing or unknown.
        """
        own: dict[str, Tensor] = {}
        decoder_weights = []
        for name, value in weights:
            decoder_name = self.name_language_weight(name)
            if decoder_name is None:
                own[name] = value
            else:
                decoder_weights.append((decoder_name, value))
        self.vision.load(own)
        loaded = self.language_model.load_weights(decoder_weights)
        own_names = {f"vision.{name}" for name, _ in self.vision.named_parameters()}
        return own_names | {f"language_model.{name}" for name in loaded or ()}


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=ProcessingInfo, dummy_inputs=DummyInputsBuilder
)
class SparseCutForVLLM(ShortcutModel):
    """The model that `build` makes, for vLLM.

    Raises:
        UserError: vLLM cannot serve the model exactly.
    """

    # Adapters that we save beside a model name modules of the language model alone.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return the placeholder of an image in a prompt."""
        if modality.startswith("image"):
            return "<image>"
        raise ValueError(f"{modality} is no input of this model; only images are")

    def make_vision(self, config: SparseCutConfig, dtype: torch.dtype) -> VisionPart:
        """Make the encoder and the fusion."""
        return VisionPart(config)

    def name_language_weight(self, name: str) -> str | None:
        """A saved weight's name in the decoder with its head; None for weights of other parts."""
        return name.removeprefix(LANGUAGE) if name.startswith(LANGUAGE) else None

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Encode images and pack the features of the input and of all layers.

        Args:
            **kwargs: pixel_values [images, 1 + tiles^2, 3, h, w]. Of images of any size the patches
                of all images, and image_grids [images, 2].

        Returns:
            For each image [N', (1 + layers) * H].
        """
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        grids = kwargs.get("image_grids")
        if grids is None:
            pixel_values = join_images(pixel_values, torch.stack)
        else:
            pixel_values = join_images(pixel_values, torch.cat)
            grids = join_images(grids, torch.stack)
        return self.vision(pixel_values, grids)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits; the placeholder's is the lowest, as `generate` never answers with it."""
        logits = super().compute_logits(hidden_states)
        if logits is not None:
            logits[:, self.config.image_token_id] = float("-inf")
        return logits

    def get_mm_mapping(self) -> MultiModelKeys:
        """Return which modules are which part."""
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector="vision.fusion",
            tower_model="vision.vision_tower",
        )


def join_images(values: Tensor | list[Tensor], join: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Values of several images as one tensor; vLLM gives a list where their shapes differ."""
    return join(values) if isinstance(values, list) else values
