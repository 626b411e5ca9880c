"""Tables of patches under tokens, for pictures of awkward sizes as the families' own image
processors prepare them.
"""

import numpy as np
import pytest
import torch
from helpers import bases
from helpers.bases import randomize_fusion
from helpers.upgrade_checks import READ_BLOCK, find_patches_by_gradient
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

from sparsecut import upgrade
from sparsecut.families import get_family

SQUARE = {"size": {"height": 16, "width": 16}}
EDGE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
SPLIT = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}}
PACKED = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 128, "longest_edge": 1024}}
PROCESSORS = {
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
    "llava_next": lambda: LlavaNextImageProcessorPil(**EDGE, **bases.TILES),
    "llava_onevision": lambda: LlavaOnevisionImageProcessorPil(**SQUARE, **bases.TILES),
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


def pictures():
    """Wide, high, small and nearly square ones."""
    draw = np.random.default_rng(0)
    sizes = [(97, 21), (17, 60), (9, 9), (33, 31)]
    return [
        Image.fromarray(draw.integers(0, 256, (high, wide, 3), dtype=np.uint8))
        for wide, high in sizes
    ]


@pytest.mark.parametrize("name", bases.FAMILY_NAMES)
def test_tables_hold_for_what_the_image_processor_makes(name):
    base = bases.build_base(name)
    made = PROCESSORS[name]()(pictures(), return_tensors="pt")
    found, table = find_patches_by_gradient(base, made, READ_BLOCK.get(name, -1))
    assert table.shape == (len(found), get_family(base).patches_under(base))
    exactly = name != "llava_onevision"  # which interpolates pictures of many tiles
    for reached, row in zip(found, table.tolist(), strict=True):
        listed = {number for number in row if number >= 0}
        assert (
            listed == reached if exactly else (listed <= reached and bool(listed) == bool(reached))
        )
    assert torch.equal(table, table.sort(-1).values), "patches under a token stand row by row"
    assert torch.unique(table).numel() > 40


@pytest.mark.parametrize("name", ["llava", "vipllava", "paligemma", "gemma3"])
def test_a_token_reads_the_fine_views_that_lie_over_its_place(name):
    base = bases.build_base(name)
    model, _ = upgrade(base)
    randomize_fusion(model)
    row = bases.build_images(name)[1]  # two pictures
    fine = bases.build_fine_views(model, row)["fine_pixel_values"].requires_grad_()
    with model.shortcuts_active(fine):
        beside = torch.stack(list(base.get_image_features(**row).pooler_output))[..., 32:]
    side = round(beside.shape[1] ** 0.5)
    for picture in range(2):
        for token in range(side**2):
            (gradient,) = torch.autograd.grad(
                beside[picture, token].square().sum(), fine, retain_graph=True
            )
            half = side // 2
            view = token // side // half * 2 + token % side // half
            assert gradient.flatten(2).abs().sum(-1).nonzero().tolist() == [[picture, view]]
