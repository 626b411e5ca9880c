"""The half of a built model that reads images; vLLM has the other half."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...any_size import list_grids
from ...configuration import SparseCutConfig
from ...encoders import make_encoder
from ...fusion import Fusion
from ...hooks import connect_encoder
from ...modeling import SparseCutModel
from ...schema import UserError


class VisionPart(nn.Module):
    """The encoder and the fusion of a built model.

    Args:
        config: The model's configuration.
    """

    encode = SparseCutModel.encode
    _read = SparseCutModel._read

    def __init__(self, config: SparseCutConfig):
        super().__init__()
        self.config = config
        self.plan = config.get_plan()
        self.grid = config.grid
        self.vision_depth = config.vision_depth
        self.vision_tower = make_encoder(config.vision_config)
        self.fusion = Fusion.from_config(config)
        connect_encoder(self.vision_tower, self.vision_depth, self.grid.blocks)

    def forward(self, pixel_values: Tensor, grids: Tensor | None = None) -> list[Tensor]:
        """Features of all layers side by side, [N', (1 + layers) * H] for each image.

        Args:
            pixel_values: As `SparseCutModel.encode` takes them.
            grids: Of images of any size, the rows and columns of patches, [images, 2].
        """
        if grids is None:
            return list(torch.cat(self.fusion(self.encode(pixel_values)), dim=-1))
        by_layer = self.fusion(self.encode(pixel_values, grids), grids=list_grids(grids))
        return [torch.cat(features, dim=-1) for features in zip(*by_layer, strict=True)]

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take weights by name.

        Raises:
            UserError: Some are missing or unknown.
        """
        load_all(self, weights)


def load_all(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a module all its weights by name; UserError where some are missing or unknown."""
    found = module.load_state_dict(weights, strict=False)
    if found.missing_keys or found.unexpected_keys:
        raise UserError(
            f"the model's weights lack {show_names(found.missing_keys)} and hold"
            f" {show_names(found.unexpected_keys)} besides; save or fetch the model again"
        )


def show_names(names: list[str]) -> str:
    """Some names and how many there are."""
    return f"{len(names)} ({', '.join(sorted(names)[:3])})" if names else "none"
