"""Tiny models and images for tests of images of any size."""

import json
from pathlib import Path

import numpy as np
import torch
from helpers.tiny import tiny_model
from PIL import Image
from transformers import Siglip2VisionConfig

from sparsecut.encoders import make_encoder

FINE = {"method": "sparsecut", "tiles": 2}
LIMITS = {"coarse": "native", "min_pixels": 256, "max_pixels": 1920}
SIZES = [(10, 40), (60, 16), (16, 16), (7, 90)]  # height and width in pixels


def draw_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image of noise."""
    levels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def build_tiny(vision=None, plan=FINE, **settings):
    """(model, processor) of tiny parts, CLIP's encoder by default."""
    return tiny_model(plan, vision=vision, **settings)


def make_naflex():
    """A NaFlex encoder of patches of 8 x 8 pixels, which reads images whole."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = Siglip2VisionConfig(num_hidden_layers=3, num_patches=16, patch_size=8, **sizes)
    return make_encoder(config).eval()


def write_sized_records(folder: Path, name: str = "sized.json") -> Path:
    """Write eight records of images of four sizes; one has two images and one has none."""
    records = []
    for i in range(8):
        height, width = SIZES[i % len(SIZES)]
        draw_image(height, width, i).save(folder / f"sized-{i}.png")
        images = [] if i == 3 else [f"sized-{i}.png"]
        if i == 6:
            images.append("sized-1.png")
        question = {"from": "human", "value": "<image> " * len(images) + "what is it"}
        answer = {"from": "gpt", "value": ["a cat", "a red dog"][i % 2]}
        records.append({"id": str(i), "image": images, "conversations": [question, answer]})
    (folder / name).write_text(json.dumps(records))
    return folder / name
