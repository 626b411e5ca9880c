"""One vector for each image: the mean embedding of the prompt that it stands in.

Mixers that weigh taps by the prompt read it (`mixers.BlendByPrompt`). It never sees an answer. In
training, the prompt is the text before the record's first trained token. In `generate` it is the
text that `generate` was given. Both are the same for a record with one answer. A forward pass
with neither labels nor `prompt_mask` cannot tell a prompt from an answer, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from .any_size import find_grids
from .hooks import CACHE_NAMES
from .modeling_base import NO_RECORDS
from .placeholders import IGNORED
from .plan import Plan
from .schema import UserError

IMAGE_SOURCES = ("pixel_values", "vision_states", "image_grids")


class PromptSummaries:
    """What a built model does about prompts: it finds image tokens, and sums prompts up."""

    config: Any
    plan: Plan
    tokens_per_image: int
    get_input_embeddings: Any
    get_image_features: Any

    def image_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """Where image tokens are, [B, L]: by id, or by embedding where there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)

    def summarize_prompts(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        vision_states: dict[int, Tensor] | None = None,
        image_grids: Tensor | None = None,
        has_past: bool = False,
    ) -> Tensor:
        """The mean embedding of the prompt of each image, [P, H], images in reading order.

        Image tokens and padding do not count. Where records share a row, the prompt of an image is
        that of its own record; `position_ids` starts anew with each.

        Args:
            input_ids: [B, L], or else `inputs_embeds` [B, L, H].
            attention_mask: [B, L]; zero for padding.
            inputs_embeds: See `input_ids`.
            labels: Where given, a prompt ends before the first label of its record.
            prompt_mask: Where prompts are, [B, L]. By default everywhere.
            position_ids: [B, L], of rows with several records.
            pixel_values: The images, which are counted only, or else `vision_states`.
            vision_states: See `pixel_values`.
            image_grids: Of images of any size, the rows and columns of patches, [P, 2].
            has_past: The ids also hold earlier images, whose pixels are not given.

        Raises:
            UserError: There are not as many image tokens as the images need.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        is_image = self.image_mask(input_ids, inputs_embeds)
        lengths = self._count_image_tokens(is_image, pixel_values, vision_states, image_grids)
        total = int(is_image.sum()) if not torch.compiler.is_compiling() else sum(lengths)
        first = total - sum(lengths) if has_past else 0
        if first < 0 or first + sum(lengths) != total:
            raise UserError(
                f"the prompts hold {total} image tokens, but the images need {sum(lengths)};"
                " prepare prompts with the model's processor, and let no limit cut an image's"
                " tokens off"
            )
        is_text = ~is_image
        for mask in (attention_mask, prompt_mask):
            if mask is not None:
                is_text = is_text & mask[:, -is_text.shape[1] :].bool()
        records = _number_records(is_image, position_ids)
        if labels is not None:
            is_text = is_text & ~_is_after_label(labels != IGNORED, records)
        starts = list(accumulate([first, *lengths]))[: len(lengths)]
        return _average(inputs_embeds.detach(), is_text, records, _find_tokens(is_image, starts))

    def _count_image_tokens(
        self,
        is_image: Tensor,
        pixel_values: Tensor | None,
        vision_states: dict[int, Tensor] | None,
        image_grids: Tensor | None,
    ) -> list[int]:
        """The tokens of each image."""
        grids = find_grids(image_grids, vision_states)
        if grids is not None:
            return [self.plan.image_tokens(rows * columns, rows) for rows, columns in grids]
        images = next(iter(vision_states.values())) if vision_states else pixel_values
        if images is None:
            return [self.tokens_per_image] * (int(is_image.sum()) // self.tokens_per_image)
        return [self.tokens_per_image] * len(images)

    def check_prompts(
        self, prompts: Tensor | None, num_images: int, grids: Any
    ) -> dict[str, Tensor]:
        """What the fusion takes besides images: nothing, or `prompts`, one vector of each image.

        Args:
            prompts: What `get_image_features` was given.
            num_images: The number of images, where they have no grids.
            grids: The grids of images of any size.

        Raises:
            UserError: The plan needs prompts, and these are none, or not of these images.
        """
        if not self.plan.needs_prompt:
            return {}
        number = num_images if grids is None else len(grids)
        if prompts is None or len(prompts) != number:
            given = "none" if prompts is None else str(len(prompts))
            raise UserError(
                f"this model weighs encoder layers by the prompt: {number} images need {number}"
                f" vectors of prompts, but {given} were given; give"
                " prompts=model.summarize_prompts(input_ids, attention_mask), or leave the images"
                " to generate or forward"
            )
        return {"prompts": prompts}

    def read_prompts(self, **inputs: Any) -> dict[str, Tensor]:
        """What `get_image_features` needs besides images: nothing, or `prompts`.

        Args:
            **inputs: As `summarize_prompts` takes them.

        Raises:
            UserError: Nothing says where prompts end.
        """
        if not self.plan.needs_prompt:
            return {}
        if inputs.get("labels") is None and inputs.get("prompt_mask") is None:
            raise UserError(
                "this model weighs encoder layers by the prompt, but neither labels nor prompt_mask"
                " say where prompts end and answers begin; give one of them, or call generate"
            )
        return {"prompts": self.summarize_prompts(**inputs)}

    def encode_for_prompts(self, text: Mapping[str, Any], **images: Any) -> Any:
        """Return `get_image_features` of images for prompts that hold no answer.

        Args:
            text: Their `input_ids`, and `attention_mask` where there is one.
            **images: As `get_image_features` takes them.
        """
        ids = text["input_ids"]
        places = {"attention_mask": text.get("attention_mask"), "prompt_mask": torch.ones_like(ids)}
        prompts = self.read_prompts(input_ids=ids, **places, **images)
        return self.get_image_features(**images, **prompts)

    def collect_images(self, precomputed: Any, images: dict, text: dict) -> Any:
        """Features of a pass's images, made now or as given; None where there are no images.

        Args:
            precomputed: What `get_image_features` returned, if anything.
            images: What it takes, by the names of IMAGE_SOURCES.
            text: What `read_prompts` takes besides.
        """
        features = precomputed
        if features is None and any(images[name] is not None for name in IMAGE_SOURCES[:2]):
            prompts = self.read_prompts(**images, **text)
            features = self.get_image_features(**images, **prompts, **NO_RECORDS)
        if features is not None and not len(features.pooler_output):
            return None  # a batch without images
        return features


class PromptGeneration(GenerationMixin):
    """`generate` for models that need to know the whole prompt before images are encoded."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate; see transformers. Images are encoded first where the plan needs the prompt."""
        model: Any = self
        has_images = any(kwargs.get(name) is not None for name in IMAGE_SOURCES[:2])
        is_encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image") is not None
        if model.plan.needs_prompt and has_images and not is_encoded:
            kwargs = self._encode_images(inputs, kwargs)
        return super().generate(inputs, *args, **kwargs)

    @torch.no_grad()
    def _encode_images(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate` with features, for this prompt, in place of images."""
        model: Any = self
        images = {name: kwargs.get(name) for name in IMAGE_SOURCES}
        ids = kwargs.get("input_ids") if inputs is None else inputs
        has_past = any(kwargs.get(name) is not None for name in CACHE_NAMES)
        prompts = model.summarize_prompts(
            ids,
            self._find_attended(ids, kwargs),
            inputs_embeds=kwargs.get("inputs_embeds"),
            has_past=has_past,
            **images,
        )
        features = model.get_image_features(**images, prompts=prompts)
        rest = {name: value for name, value in kwargs.items() if name not in IMAGE_SOURCES}
        return {**rest, "mm_encoder_outputs": {"image": features}}

    def _find_attended(self, ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """The attention mask, or what transformers takes for it: everything but padding."""
        mask = kwargs.get("attention_mask")
        model: Any = self
        config = kwargs.get("generation_config") or model.generation_config
        pad, ends = config.pad_token_id, config.eos_token_id
        if mask is not None or ids is None or pad is None or pad in (ends, *_as_list(ends)):
            return mask
        return ids != pad


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else []


def _number_records(like: Tensor, position_ids: Tensor | None) -> Tensor:
    """For each position the one where its record begins, [B, L]."""
    places = torch.arange(like.shape[1], device=like.device).expand(like.shape)
    if position_ids is None:
        return torch.zeros_like(places)
    begins = (position_ids == 0).expand(like.shape)
    return torch.where(begins, places, 0).cummax(1).values


def _is_after_label(is_label: Tensor, records: Tensor) -> Tensor:
    """Whether a position, [B, L], is the first label of its record or comes after it."""
    so_far = is_label.long().cumsum(1)
    before_record = (so_far - is_label.long()).gather(1, records)
    return so_far > before_record


def _find_tokens(is_image: Tensor, numbers: list[int]) -> Tensor:
    """Places of image tokens, given by their numbers, in the flattened mask, [len(numbers)]."""
    counted = is_image.flatten().long().cumsum(0)
    wanted = torch.tensor(numbers, device=is_image.device) + 1
    return torch.searchsorted(counted, wanted)


def _average(embeds: Tensor, is_text: Tensor, records: Tensor, places: Tensor) -> Tensor:
    """Means over the text of each image's record, [P, H] in float32; zeros where there is none."""
    length = records.shape[1]
    rows = torch.arange(records.shape[0], device=records.device)[:, None] * length
    owners = (rows + records).flatten()  # the record of every position, by where it begins
    chosen = (owners == owners[places][:, None]) & is_text.flatten()
    weights = chosen.float() / chosen.sum(1, keepdim=True).clamp(min=1)
    return weights @ embeds.flatten(0, 1).float()
