"""The joined model: a vision encoder, the fusion, and a causal language model used as it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .any_size import check_patches, find_grids, list_grids, read_patches, read_plan
from .configuration import SparseCutConfig, check_language_model
from .decoder_pass import gather_features, run_decoder
from .encoders import make_encoder
from .fusion import Fusion
from .hooks import (
    CACHE,
    accepts,
    check_vision_tower,
    connect_decoder,
    connect_encoder,
    get_cache,
    get_unsplit_classes,
    read_taps,
)
from .modeling_base import (
    SparseCutCausalLMOutputWithPast,
    SparseCutImageFeatures,
    SparseCutModelOutputWithPast,
    SparseCutPreTrainedModel,
    check_image_tokens,
    check_pixels,
    get_requested_records,
    has_begun,
    has_part_below_head,
    record_encoder,
    share_modules,
    without_head,
)
from .placeholders import ignore_placeholder, mask_placeholder
from .prompt_vectors import PromptGeneration, PromptSummaries
from .schema import UserError


class SparseCutModel(PromptSummaries, SparseCutPreTrainedModel):
    r"""A vision encoder and a decoder, joined by sparse shortcuts (arXiv 2602.00505); no head.

    Features of layer 0 replace the embeddings of image tokens. Features of a layer above are
    added to the hidden states that enter it, at the image tokens, once per prompt.

    Args:
        config: Both parts' configurations and the plan.
        vision_tower: The encoder, if it is loaded already. Default: a new one.
        language_model: The causal language model, if it is loaded already. Default: a new one.

    Raises:
        UserError: A part needs inputs that cannot be given to it.
    """

    config: SparseCutConfig
    config_class = SparseCutConfig
    _can_compile_fullgraph = True

    def __init__(
        self,
        config: SparseCutConfig,
        vision_tower: nn.Module | None = None,
        language_model: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        self.plan = config.get_plan()
        self.grid = config.grid
        self.tokens_per_image = config.num_image_tokens
        if vision_tower is None:
            vision_tower = make_encoder(config.vision_config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        check_vision_tower(vision_tower, self.grid)
        check_language_model(language_model)
        if not self.has_head:
            language_model = without_head(language_model)
            above = rf"^language_model\.(?!{language_model.base_model_prefix}\.)"
            self._keys_to_ignore_on_load_unexpected = [above]
        self.vision_tower, self.language_model = vision_tower, language_model
        self.vision_depth = config.vision_depth
        self.fusion = Fusion.from_config(config)
        connect_encoder(self.vision_tower, self.vision_depth, self.grid.blocks)
        connect_decoder(self.language_model, config.language_depth)
        self.post_init()
        self._no_split_modules = get_unsplit_classes(self)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> Any:
        return self.language_model.get_decoder()

    def encode(self, pixel_values: Tensor, image_grids: Tensor | None = None) -> dict[int, Tensor]:
        """Run the encoder and return the vision features that the plan reads.

        Fine views run no further than the deepest tap that is read from them.

        Args:
            pixel_values: Images [P, 1 + tiles^2, 3, h, w], coarse view first. Without fine views
                also [P, 3, h, w]. Audio: spectrograms [P, 1, mels, frames]. Images of any size:
                their patches [S, 1 + tiles^2, 3, patch height, patch width].
            image_grids: Of images of any size, the rows and columns of patches, [P, 2].

        Returns:
            Tap -> [P, V, N, D], of images of any size [S, V, D]. V is 1 for taps that are read from
            the coarse view alone.

        Raises:
            UserError: The pixels have another shape.
        """
        num_views = self.plan.num_views
        if tuple(pixel_values.shape[1:]) == self.grid.view and num_views == 1:
            pixel_values = pixel_values.unsqueeze(1)
        if image_grids is None:
            check_pixels(pixel_values, self.grid, self.plan)
            read = self._read
        else:
            grids = list_grids(image_grids)
            check_patches(pixel_values, grids, self.grid, self.plan)
            read = partial(read_patches, self.vision_tower, self.grid, grids)
        pixels = pixel_values.to(self.vision_tower.dtype)
        return read_plan(read, pixels, self.plan, self.vision_depth)

    def _read(self, pixels: Tensor, taps: tuple[int, ...]) -> dict[int, Tensor]:
        """Run the encoder on [P, V, *view] and return tap -> [P, V, N, D]."""
        features = read_taps(self.vision_tower, pixels.flatten(0, 1), self.grid, taps)
        return {tap: x.unflatten(0, (-1, pixels.shape[1])) for tap, x in features.items()}

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_states: dict[int, Tensor] | None = None,
        image_grids: Tensor | None = None,
        prompts: Tensor | None = None,
        **kwargs: Any,
    ) -> SparseCutImageFeatures:
        """Encode images and fuse their taps for every layer of the plan.

        Args:
            pixel_values: Images, as `encode` takes them.
            vision_states: What `encode` returned for them, instead of pixels.
            image_grids: As `encode` takes them, beside either.
            prompts: What `summarize_prompts` returns, [P, H], where the plan needs it.
            **kwargs: output_hidden_states and output_attentions add the encoder's own, for coarse
                views of pixels, by another pass. The configuration can set them too. There are
                none of images of any size.

        Raises:
            UserError: The pixels have another shape, both arguments or none were given, or prompts
                are missing.
        """
        if (pixel_values is None) == (vision_states is None):
            raise UserError("give either pixel_values or vision_states, and not both")
        images = next(iter(vision_states.values())) if pixel_values is None else pixel_values
        if not len(images):
            return SparseCutImageFeatures(pooler_output=[])
        grids = find_grids(image_grids, vision_states)
        states = self.encode(pixel_values, grids) if vision_states is None else vision_states
        input_features, *layer_features = self.fusion(
            states, grids=grids, **self.check_prompts(prompts, len(images), grids)
        )
        records = {}
        names = get_requested_records(self.config, kwargs)
        if names and pixel_values is not None and grids is None:
            records = record_encoder(self.vision_tower, self.grid, pixel_values, names)
        return SparseCutImageFeatures(
            last_hidden_state=states[max(states)][:, 0],
            **records,
            pooler_output=list(input_features),
            deepstack_features=[list(features) for features in layer_features] or None,
            pixel_values=pixel_values,
            image_grids=image_grids,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **inputs: Any,
    ) -> SparseCutModelOutputWithPast:
        """Hidden states of a prompt.

        Args:
            **inputs: All arguments are those of the whole model, without labels.

        Returns:
            `last_hidden_state` [B, L, H] is what the whole model's head reads.
        """
        outputs, image_hidden_states = self._run(
            self.language_model.base_model,
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            **inputs,
        )
        has_images = image_hidden_states is not None
        return SparseCutModelOutputWithPast(
            last_hidden_state=self.include_fusion(outputs.last_hidden_state, has_images),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_hidden_states,
            **{CACHE: get_cache(outputs)},
        )

    def _run(
        self,
        decoder: nn.Module,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        vision_states: dict[int, Tensor] | None = None,
        image_grids: Tensor | None = None,
        mm_encoder_outputs: dict[str, SparseCutImageFeatures] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        continued: bool | None = None,
        labels: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[ModelOutput, Tensor | None]:
        """Run a decoder, with or without its head, on a prompt and its images.

        Args:
            decoder: What to run; the other arguments are those of `forward`.
            **kwargs: For the decoder, as far as it takes them and they are not None.

        Returns:
            The decoder's output, and the features that entered the input [tokens, H].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds, and not both")
        cache = past_key_values if cache is None else cache
        precomputed = (mm_encoder_outputs or {}).get("image")
        has_source = _has_one_source(pixel_values, vision_states, precomputed)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        mask = self.image_mask(input_ids, inputs_embeds)
        sources = {
            "pixel_values": pixel_values,
            "vision_states": vision_states,
            "image_grids": image_grids,
        }
        prompts = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "labels": labels,
            "prompt_mask": prompt_mask,
        }
        images = self.collect_images(precomputed, sources, prompts)
        is_prompt = images is not None or (input_ids is not None and not continued)
        if is_prompt and not torch.compiler.is_compiling():
            is_bare = not has_source and labels is None and not self.training
            is_generating = cache is not None or continued is not None
            check_image_tokens(
                mask,
                images,
                warn_only=is_bare and not is_generating,
                tokens_per_image=self.tokens_per_image if has_begun(cache) else 0,
            )
        features = gather_features(
            images, self.plan, self.fusion, inputs_embeds, self.tokens_per_image
        )
        settings = {**kwargs, "position_ids": position_ids}
        outputs = run_decoder(
            decoder, inputs_embeds, mask, features, attention_mask, cache, settings
        )
        return outputs, features.input


class SparseCutForConditionalGeneration(PromptGeneration, SparseCutModel, GenerationMixin):
    r"""`SparseCutModel` whose language model has its head: it gives logits and generates.

    Args are those of `SparseCutModel`.
    """

    has_head = True

    @property
    def base_model(self) -> SparseCutModel:
        """The same modules without the head."""
        if not has_part_below_head(self.language_model):
            return self
        modules = {
            "vision_tower": self.vision_tower,
            "language_model": without_head(self.language_model),
            "fusion": self.fusion,
        }
        return share_modules(self, SparseCutModel, modules)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        is_first_iteration: Any = False,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Prepare one step of `generate`: images go with the prompt only. See transformers."""
        kwargs |= {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        cache = past_key_values if cache is None else cache
        inputs = super().prepare_inputs_for_generation(input_ids, **{CACHE: cache}, **kwargs)
        images = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        inputs["continued"] = not is_first_iteration and has_begun(cache)
        # In assisted decoding transformers calls the assistant's prompt a continuation and leaves
        # the images out.
        if images is not None and "mm_encoder_outputs" not in inputs and not inputs["continued"]:
            given = {"pixel_values": images.pixel_values, "image_grids": images.image_grids}
            features = self.encode_for_prompts({"input_ids": input_ids}, **given)
            inputs["mm_encoder_outputs"] = {"image": features}
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        vision_states: dict[int, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, SparseCutImageFeatures] | None = None,
        continued: bool | None = None,
        cache: Cache | None = None,
        image_grids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SparseCutCausalLMOutputWithPast:
        """One pass over a prompt, its continuation, or a training batch.

        Args:
            input_ids: [B, L], with `config.image_token_id` once per image token.
            pixel_values: The images, in reading order over the batch; shapes as in `encode`.
            vision_states: What `encode` returned for the images, instead of pixels.
            mm_encoder_outputs: {"image": get_image_features(...)}, instead of pixels.
            continued: `generate` sets it: placeholders in input_ids were written by the model.
            cache: What transformers 5.24 calls `past_key_values`; every release takes both names.
            image_grids: Of images of any size, the rows and columns of patches, [P, 2].
            prompt_mask: Where prompts are, [B, L], for a plan that needs them, without labels.

        Raises:
            UserError: Image tokens and features do not match. Without labels, cache and images
                it is a warning.
            RuntimeError: A shortcut did not fire exactly once.
        """
        optional = {}
        if accepts(self.language_model, "logits_to_keep", by_name=True):
            optional["logits_to_keep"] = logits_to_keep
        outputs, image_hidden_states = self._run(
            self.language_model,
            input_ids=input_ids,
            pixel_values=pixel_values,
            vision_states=vision_states,
            image_grids=image_grids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            continued=continued,
            labels=labels,
            prompt_mask=prompt_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
            **optional,
            **kwargs,
        )
        logits = mask_placeholder(self.config, outputs.logits)
        loss = self._compute_loss(logits, labels, image_hidden_states is not None, kwargs)
        return SparseCutCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_hidden_states,
            **{CACHE: get_cache(outputs)},
        )

    def _compute_loss(
        self, logits: Tensor, labels: Tensor | None, has_images: bool, settings: dict
    ) -> Tensor | None:
        """The mean loss over labels [B, L], or None without labels.

        `settings` are those of the loss function, such as `num_items_in_batch`.
        """
        if labels is None:
            return None
        targets = ignore_placeholder(self.config, labels=labels, **settings)
        loss = self.loss_function(logits=logits, vocab_size=logits.shape[-1], **targets)
        return self.include_fusion(loss, has_images)


def _has_one_source(*sources: Any) -> bool:
    """Whether images are given; UserError where they are given in several ways."""
    num_sources = sum(source is not None for source in sources)
    if num_sources > 1:
        raise UserError(
            "give one of pixel_values, vision_states and mm_encoder_outputs: they stand for the"
            " same images"
        )
    return num_sources == 1
