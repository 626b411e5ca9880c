"""The families' own image processors at the sizes of `helpers.bases`; images of awkward sizes."""

import numpy as np
from helpers.base_configs import TILES
from PIL import Image
from transformers import SiglipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.cohere_compass.image_processing_pil_cohere_compass import (
    CohereCompassImageProcessorPil,
)
from transformers.models.cosmos3_edge.image_processing_pil_cosmos3_edge import (
    Cosmos3EdgeImageProcessorPil,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import (
    DeepseekVLImageProcessorPil,
)
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
    PaddleOCRVLImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import (
    VideoLlama3ImageProcessorPil,
)

SQUARE = {"size": {"height": 16, "width": 16}}
EDGE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
SPLIT = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}}
PACKED = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 128, "longest_edge": 1024}}
CROPS = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
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
    "internvl": lambda: GotOcr2ImageProcessorPil(**SQUARE, **CROPS),
    "qwen2_vl": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "qwen2_5_vl": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "qwen3_vl": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "qwen3_vl_moe": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "qwen3_5": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "qwen3_5_moe": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "glm4v": lambda: Glm4vImageProcessorPil(**PACKED),
    "glm46v": lambda: Glm46VImageProcessorPil(**PACKED),
    "glm4v_moe": lambda: Glm4vImageProcessorPil(**PACKED),
    "glm_ocr": lambda: Glm46VImageProcessorPil(**PACKED),
    "lfm3_vl": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "paddleocr_vl": lambda: PaddleOCRVLImageProcessorPil(**PACKED),
    "video_llama_3": lambda: VideoLlama3ImageProcessorPil(**{**PACKED, "merge_size": 1}),
    "aya_vision": lambda: GotOcr2ImageProcessorPil(**SQUARE, **CROPS),
    "ovis2": lambda: Ovis2ImageProcessorPil(**SQUARE, **CROPS),
    "qianfan_ocr": lambda: GotOcr2ImageProcessorPil(**SQUARE, **CROPS),
    "llava_next_video": lambda: LlavaNextImageProcessorPil(**EDGE, **TILES),
    "lighton_ocr": lambda: PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=8),
    "deepseek_vl": lambda: DeepseekVLImageProcessorPil(**SQUARE, min_size=4),
    "janus": lambda: JanusImageProcessorPil(**SQUARE, min_size=4),
    "deepseek_vl_hybrid": lambda: DeepseekVLHybridImageProcessorPil(
        **SQUARE, min_size=4, high_res_size={"height": 64, "width": 64}
    ),
    "gemma4": lambda: Gemma4ImageProcessorPil(
        patch_size=4, pooling_kernel_size=2, max_soft_tokens=70
    ),
    "exaone4_5": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "qwen2_5_omni_thinker": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "hyperclovax_vision_v2": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "qwen3_omni_moe_thinker": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "cohere_compass": lambda: CohereCompassImageProcessorPil(**PACKED),
    "cosmos3_omni": lambda: Qwen2VLImageProcessorPil(**PACKED),
    "cosmos3_edge": lambda: Cosmos3EdgeImageProcessorPil(**PACKED),
    "ernie4_5_vl_moe": lambda: Ernie4_5_VLMoeImageProcessorPil(**PACKED),
    "dots3_note": lambda: Qwen2VLImageProcessorPil(**{**PACKED, "temporal_patch_size": 1}),
    "mistral_large4": lambda: PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=8),
}
# Processors that transformers has for torchvision only are not tried.


def awkward_images():
    """Wide, high, small and nearly square images."""
    rng = np.random.default_rng(0)
    images = []
    for width, height in [(97, 21), (17, 60), (9, 9), (33, 31)]:
        levels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        images.append(Image.fromarray(levels))
    return images
