"""The families' own image processors at the sizes of `helpers.bases`, and images of awkward sizes."""

import numpy as np
from helpers.bases import TILES
from PIL import Image
from transformers import SiglipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

SQUARE = {"size": {"height": 16, "width": 16}}
EDGE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
SPLIT = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}}
PACKED = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 128, "longest_edge": 1024}}
IMAGE_PROCESSORS = {
    "llava": lambda: CLIPImageProcessorPil(**EDGE),
    "vipllava": lambda: CLIPImageProcessorPil(**EDGE),
    "paligemma": lambda: SiglipImageProcessorPil(**SQUARE),
    "gemma3": lambda: Gemma3ImageProcessorPil(
        **SQUARE,
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=8,
        pan_and_scan_max_num_crops=3,
        pan_and_scan_min_ratio_to_activate=1.2,
    ),
    "llava_next": lambda: LlavaNextImageProcessorPil(**EDGE, **TILES),
    "llava_onevision": lambda: LlavaOnevisionImageProcessorPil(**SQUARE, **TILES),
    "mistral3": lambda: PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=8),
    "idefics3": lambda: Idefics3ImageProcessorPil(**SPLIT),
    "smolvlm": lambda: SmolVLMImageProcessorPil(**SPLIT),
    "internvl": lambda: GotOcr2ImageProcessorPil(
        **SQUARE, crop_to_patches=True, min_patches=1, max_patches=4
    ),
    "qwen2_vl": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "qwen2_5_vl": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "qwen3_vl": lambda: Qwen2VLImageProcessorPil(**PACKED),
}


def awkward_images():
    """Wide, high, small and nearly square images."""
    rng = np.random.default_rng(0)
    images = []
    for width, height in [(97, 21), (17, 60), (9, 9), (33, 31)]:
        levels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        images.append(Image.fromarray(levels))
    return images
