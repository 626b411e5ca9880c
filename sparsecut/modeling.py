"""The model: a vision encoder, the fusion, and a causal language model that is used exactly as it
is.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from .configuration import SparseCutConfig
from .encoders import encoder_inputs, make_encoder
from .fusion import Fusion
from .hooks import (
    accepts,
    check_language_model,
    check_vision_tower,
    connect_decoder,
    connect_encoder,
    inject,
    read_taps,
    whole_modules,
)
from .modeling_base import (
    SparseCutCausalLMOutputWithPast,
    SparseCutImageFeatures,
    SparseCutPreTrainedModel,
    check_image_features,
    check_image_tokens,
    has_begun,
)
from .modeling_body import SparseCutModel
from .plan import Plan
from .schema import UserError

RECORDS = ("hidden_states", "attentions")  # what an encoder keeps of its blocks when it is asked to
UNRECORDED = {f"output_{name}": False for name in RECORDS}


class SparseCutForConditionalGeneration(SparseCutPreTrainedModel, GenerationMixin):
    r"""Any supported vision encoder and causal language model, joined by a plan of sparse
    shortcuts (arXiv 2602.00505).

    Features of layer 0 replace the placeholders' embeddings; features of a layer above are added to
    the hidden states that enter it, at the placeholders' positions, once per prompt. Ready modules
    can be handed over instead of being made anew.
    """

    config: SparseCutConfig
    config_class = SparseCutConfig
    _can_compile_fullgraph = True

    def __init__(
        self,
        config: SparseCutConfig,
        vision_tower: nn.Module | None = None,
        language_model: nn.Module | None = None,
    ):
        super().__init__(config)
        self.plan: Plan = config.get_plan()
        self.grid = config.grid
        self.vision_tower = (
            vision_tower if vision_tower is not None else make_encoder(config.vision_config)
        )
        self.language_model = (
            language_model
            if language_model is not None
            else AutoModelForCausalLM.from_config(config.text_config)
        )
        check_vision_tower(self.vision_tower, self.grid)
        check_language_model(self.language_model)
        self.fusion = Fusion(
            self.plan,
            vision_depth=config.vision_depth,
            vision_dim=self.grid.width,
            language_dim=config.text_config.get_text_config().hidden_size,
            rows=self.grid.rows,
        )
        connect_encoder(self.vision_tower, config.vision_depth)
        connect_decoder(self.language_model, config.language_depth)
        self.post_init()
        self._no_split_modules = whole_modules(self)

    @property
    def base_model(self) -> SparseCutModel:
        """The same modules without the head."""
        return SparseCutModel(self)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self):
        return self.language_model.get_decoder()

    def encode(self, pixel_values: Tensor) -> dict[int, Tensor]:
        """The encoder's states that the plan reads, of pictures [P, 1 + tiles^2, 3, h, w]: tap ->
        [P, V, N, D].

        Sounds come as spectrograms [P, 1, mels, frames]. V is 1 for taps that are read from the
        coarse view alone; the fine views run no further than the deepest tap read from them. A plan
        without fine views also takes [P, 3, h, w]. Raises ValueError on any other shape.
        """
        view, num_views, depth = self.grid.view, self.plan.num_views, self.config.vision_depth
        if tuple(pixel_values.shape[1:]) == view and num_views == 1:
            pixel_values = pixel_values.unsqueeze(1)
        if tuple(pixel_values.shape[1:]) != (num_views, *view):
            raise UserError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but this model's plan"
                f" (tiles={self.plan.tiles}) and encoder need (pictures, {num_views},"
                f" {', '.join(map(str, view))}), coarse view first; prepare pictures with the"
                " model's own processor"
            )
        pixels = pixel_values.to(self.vision_tower.dtype)
        taps, fine = self.plan.resolved_taps(depth), self.plan.fine_taps(depth)
        if not fine or max(fine) == max(taps):
            states = self._read(pixels if fine else pixels[:, :1], taps)
            return {tap: x if tap in fine else x[:, :1] for tap, x in states.items()}
        coarse, finer = self._read(pixels[:, :1], taps), self._read(pixels[:, 1:], fine)
        return {
            tap: torch.cat([x, finer[tap]], dim=1) if tap in fine else x
            for tap, x in coarse.items()
        }

    def _read(self, pixels: Tensor, taps: tuple[int, ...]) -> dict[int, Tensor]:
        states = read_taps(self.vision_tower, pixels.flatten(0, 1), self.grid, taps)
        return {tap: x.unflatten(0, (-1, pixels.shape[1])) for tap, x in states.items()}

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_states: dict[int, Tensor] | None = None,
        **kwargs,
    ) -> SparseCutImageFeatures:
        """Encode pictures [P, 1 + tiles^2, 3, h, w], coarse view first, and fuse their taps for
        every layer of the plan.

        vision_states: what `encode` returned for them, instead of pixels. output_hidden_states and
        output_attentions (here or in the configuration) add the encoder's own for the coarse views
        of pixels, at the price of another pass through every block. Raises ValueError on another
        shape, or for both or none.
        """
        if (pixel_values is None) == (vision_states is None):
            raise UserError("give either pixel_values or vision_states, and not both")
        given = pixel_values if vision_states is None else next(iter(vision_states.values()))
        if not len(given):
            return SparseCutImageFeatures(pooler_output=[])
        states = self.encode(pixel_values) if vision_states is None else vision_states
        input_features, *layer_features = self.fusion(states)
        whole = {}
        wanted = [
            name
            for name in RECORDS
            if kwargs.get(f"output_{name}", getattr(self.config, f"output_{name}", False))
        ]
        if wanted and pixel_values is not None:
            coarse = (
                pixel_values
                if pixel_values.dim() == 1 + len(self.grid.view)
                else pixel_values[:, 0]
            )
            flags = {f"output_{name}": True for name in wanted}
            inputs = encoder_inputs(self.grid, coarse.to(self.vision_tower.dtype))
            outputs = self.vision_tower(**inputs, return_dict=True, **flags)
            whole = {name: outputs.get(name) for name in wanted}
        return SparseCutImageFeatures(
            last_hidden_state=states[max(states)][:, 0],
            **whole,
            pooler_output=list(input_features),
            deepstack_features=[list(features) for features in layer_features] or None,
            pixel_values=pixel_values,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """What `generate` gives to `forward` at each step: pictures with the prompt only."""
        kwargs |= {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, **kwargs
        )
        images = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        inputs["continued"] = not is_first_iteration and has_begun(past_key_values)
        # In assisted decoding transformers calls the assistant's prompt a continuation and leaves
        # the pictures out.
        if images is not None and "mm_encoder_outputs" not in inputs and not inputs["continued"]:
            inputs["mm_encoder_outputs"] = {"image": self.get_image_features(images.pixel_values)}
        return inputs

    def image_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """Where image tokens stand, [B, L]: by id, or by embedding where only embeddings are
        given.
        """
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)

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
        **kwargs,
    ) -> SparseCutCausalLMOutputWithPast:
        """One pass over a prompt, its continuation, or a training batch.

        input_ids [B, L] with `config.image_token_id` once per image token; pixel_values [P, 1 +
        tiles^2, 3, h, w] for the pictures that are there, in reading order over the batch;
        vision_states (of `encode`) or mm_encoder_outputs ({"image": get_image_features(...)})
        instead of pixels.
        continued: input_ids were generated or guessed, so that placeholders among them stand for no
        picture (`generate` says so, None elsewhere). Raises ValueError where image tokens and
        features do not match (a bare pass without labels, cache and pictures warns), RuntimeError
        where a shortcut did not fire exactly once.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds, and not both")
        images = (mm_encoder_outputs or {}).get("image")
        num_given = sum(pictures is not None for pictures in (pixel_values, vision_states, images))
        if num_given > 1:
            raise UserError(
                "give one of pixel_values, vision_states and mm_encoder_outputs: they are the same"
                " pictures"
            )
        if pixel_values is not None or vision_states is not None:
            images = self.get_image_features(pixel_values, vision_states, **UNRECORDED)
        if images is not None and not len(images.pooler_output):
            images = None  # a batch of no pictures
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        mask = self.image_mask(input_ids, inputs_embeds)
        if not torch.compiler.is_compiling() and (
            images is not None or (input_ids is not None and not continued)
        ):
            bare = (
                not num_given and labels is None and past_key_values is None and continued is None
            )
            num_each = self.config.num_image_tokens if has_begun(past_key_values) else 0
            check_image_tokens(mask, images, bare=bare and not self.training, num_each=num_each)
        check_image_features(images, self.plan, inputs_embeds.shape[-1])
        features, image_hidden_states = {}, None
        if images is not None:
            image_hidden_states = torch.cat(list(images.pooler_output)).to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_hidden_states)
            features = {
                d: torch.cat(list(f))
                for d, f in zip(self.plan.layers, images.deepstack_features or (), strict=True)
            }
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[
                :, -inputs_embeds.shape[1] :
            ]

        arguments = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            **kwargs,
        }
        arguments["output_attentions"] = output_attentions
        arguments = {
            k: v for k, v in arguments.items() if v is not None and accepts(self.language_model, k)
        }
        if accepts(self.language_model, "logits_to_keep", by_name=True):
            arguments["logits_to_keep"] = logits_to_keep

        def run():
            return self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                return_dict=True,
                **arguments,
            )

        gates = {}
        if features:
            num_tokens = self.config.num_image_tokens
            for layer, gate in self.fusion.context.items():
                gates[int(layer)] = partial(gate, num_tokens=num_tokens)
        outputs = inject(run, mask, features, gates)
        logits = outputs.logits
        if self.config.mask_image_token:
            logits = logits.index_fill(
                -1,
                torch.tensor([self.config.image_token_id], device=logits.device),
                torch.finfo(logits.dtype).min,
            )
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
            if images is None and self.training:
                # A text-only batch leaves fusion unused on this rank, but DDP needs a gradient from
                # every rank.
                loss = loss + 0.0 * sum(
                    p.sum() for p in self.fusion.parameters() if p.requires_grad
                )
        return SparseCutCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_hidden_states,
        )
