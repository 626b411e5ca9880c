"""Tiny models and images for tests of images of any size."""

import numpy as np
import torch
from helpers.tiny import tiny_language, tiny_tokenizer, tiny_vision
from PIL import Image
from transformers import CLIPImageProcessorPil

from sparsecut import build

FINE = {"method": "sparsecut", "tiles": 2}


def draw_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image of noise."""
    levels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def build_tiny(vision=None, plan=FINE, **settings):
    """(model, processor) of tiny parts, CLIP's encoder by default."""
    torch.manual_seed(0)
    vision = vision or tiny_vision()
    parts = {"image_processor": CLIPImageProcessorPil(), "tokenizer": tiny_tokenizer()}
    return build(vision, tiny_language(), plan, **parts, **settings)
