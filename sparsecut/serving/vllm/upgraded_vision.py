"""The half of an upgraded model that reads images; vLLM has the other half."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ...configuration import SparseCutUpgradeConfig
from ...modeling_upgraded import SparseCutUpgrade
from .decoders import list_layers
from .vision import load_all


class LanguagePlace(nn.Module):
    """Stands where the language model was: the encoder's side asks for its configuration only.

    Args:
        config: The language model's configuration.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config = config


class UpgradedVision(nn.Module):
    """An upgraded model without its language model and head.

    Args:
        config: The model's configuration.
        dtype: Of the weights.
    """

    def __init__(self, config: SparseCutUpgradeConfig, dtype: torch.dtype):
        super().__init__()
        upgrade = SparseCutUpgrade(make_shallow(config))
        self.language_name, self.head_name = find_language(upgrade)
        place = LanguagePlace(config.text_config)
        upgrade.set_submodule(self.language_name, place)
        if self.head_name:
            upgrade.set_submodule(self.head_name, nn.Identity())
        for weight in upgrade.parameters():
            weight.data = weight.data.to(dtype)
        self.upgrade = upgrade
        self.layers = list_layers(config)
        self.width = config.text_config.hidden_size

    def forward(self, num_rows: list[int], **inputs: Any) -> list[Tensor]:
        """Features of the input and of all layers side by side, [N, (1 + layers) * H] per image.

        Args:
            num_rows: Of each image, how many rows of the inputs belong to it.
            **inputs: What the processor returns for the images.
        """
        output = self.upgrade.get_image_features(**inputs, return_dict=True)
        packed = split_images(output.pooler_output, num_rows)
        own = getattr(output, "deepstack_features", None) or ()
        if not own:
            return packed
        own = [split_images(features, num_rows) for features in own]
        return [self._add_own(*images) for images in zip(packed, *own, strict=True)]

    def _add_own(self, packed: Tensor, *own: Tensor) -> Tensor:
        """Put what the base itself adds to its layers, [N, H] each, into an image's pack."""
        image, *ours = packed.split(self.width, dim=-1)
        by_layer = dict.fromkeys(self.layers, torch.zeros_like(image))
        by_layer |= zip(self.upgrade.plan.fused_layers, ours, strict=True)
        for number, features in enumerate(own):
            layer = number + 1  # it follows the layer before
            by_layer[layer] = by_layer[layer] + features
        return torch.cat([image, *by_layer.values()], dim=-1)

    def encode(self, num_rows: list[int], inputs: dict[str, Any]) -> list[Tensor]:
        """Features as `forward` returns them, also of images that cannot be joined.

        Args:
            num_rows: As in `forward`.
            inputs: What the processor returns for the images; where their shapes differ, a list
                with one value for each image.
        """
        device = next(self.parameters()).device
        if isinstance(inputs["pixel_values"], Tensor):
            return self(num_rows, **move(inputs, device))
        packed = []
        for number, rows in enumerate(num_rows):
            one = {name: values[number : number + 1] for name, values in inputs.items()}
            for name, values in one.items():
                if isinstance(values, list):
                    one[name] = torch.stack(values)
            packed += self([rows], **move(one, device))
        return packed

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take weights by name; UserError where some are missing or unknown."""
        load_all(self.upgrade, weights)

    def name_language_weight(self, name: str) -> str | None:
        """A saved weight's name in the decoder with its head; None for weights of other parts."""
        for part, place in (self.language_name, "model"), (self.head_name, "lm_head"):
            if part and name.startswith(f"{part}."):
                return place + name.removeprefix(part)
        return None

    def count_positions(self, input_ids: Tensor, is_image: Tensor, grids: Any) -> tuple:
        """Positions in time, height and width, as the base counts them.

        Args:
            input_ids: A prompt's tokens, [1, L].
            is_image: Which are image tokens, [1, L].
            grids: Of each image, its frames, rows and columns of patches, [images, 3]; or None.

        Returns:
            Positions [3, L], and what is added to the number of a later token.
        """
        count = self.upgrade.base.model.get_rope_index
        given = {
            "input_ids": input_ids,
            "mm_token_type_ids": is_image.int(),
            "image_grid_thw": grids,
            "attention_mask": torch.ones_like(input_ids),
        }
        known = inspect.signature(count).parameters
        positions, delta = count(**{name: x for name, x in given.items() if name in known})
        return positions[:, 0], int(delta[0])


def make_shallow(config: SparseCutUpgradeConfig) -> SparseCutUpgradeConfig:
    """The configuration with a language model that has no layers and hardly a vocabulary."""
    shallow = copy.deepcopy(config)
    text_config = shallow.text_config
    text_config.num_hidden_layers = 0
    text_config.vocab_size = 1
    text_config.pad_token_id = None
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = []
    return shallow


def move(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The inputs on a device: vLLM keeps sizes of images on the CPU."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def find_language(upgrade: SparseCutUpgrade) -> tuple[str, str]:
    """The names of the language model and of its head; no name for a head that is not there."""
    names = {id(module): name for name, module in upgrade.named_modules()}
    head = upgrade.get_output_embeddings()
    return names[id(upgrade.language_backbone())], names.get(id(head), "")


def split_images(features: Any, num_rows: list[int]) -> list[Tensor]:
    """Features of each image, [N, C].

    Args:
        features: A list of [N, C] for each image, or a tensor of all images one after the other,
            in which every row of an image gives as many tokens.
        num_rows: Of each image, how many rows of the encoder's inputs belong to it.
    """
    if not isinstance(features, Tensor) and len(features) == len(num_rows):
        return list(features)
    if not isinstance(features, Tensor):
        features = torch.cat(list(features))
    features = features.flatten(0, -2)
    tokens_per_row = len(features) // sum(num_rows)
    return list(features.split([rows * tokens_per_row for rows in num_rows]))
