"""Tiny random pretrained VLMs of every family that can be upgraded, and inputs for them.

Their configurations are in base_configs.py. The inputs are what a family's processor would return
for two prompts of different lengths, padded on the left. The images differ in size where a family
allows it.
"""

import pytest
import torch
import transformers as hf
from helpers import newer_base_configs
from helpers.base_configs import CONFIGS as FIRST_CONFIGS
from helpers.base_configs import END, IMAGE, START, VIDEO

CONFIGS = {**FIRST_CONFIGS, **newer_base_configs.CONFIGS}
FAMILY_NAMES = tuple(CONFIGS)
# One family per way from patches to image tokens: one view, tiles, pixel shuffle, merged patches.
# The others run in tests/conformance.
DEFAULT_FAMILIES = ("llava", "llava_next", "idefics3", "qwen2_5_vl")
OTHER_FAMILIES = tuple(name for name in FAMILY_NAMES if name not in DEFAULT_FAMILIES)
VIDEO_FAMILIES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PACKED_FAMILIES = tuple(name for name in FAMILY_NAMES if name.startswith(("qwen", "glm")))
NEWER_PACKED = (
    "cohere_compass",
    "cosmos3_omni",
    "exaone4_5",
    "hyperclovax_vision_v2",
    "minimax_m3_vl",
    "muse_glimmer",
)
PACKED_STILLS = ("cosmos3_edge", "dots3_note", "ernie4_5_vl_moe")  # a patch has one frame
THINKERS = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
TYPED = (  # their inputs have mm_token_type_ids
    *(name for name in PACKED_FAMILIES if name not in THINKERS),
    "paddleocr_vl",
    "cohere_compass",
    "cosmos3_omni",
    "cosmos3_edge",
    "ernie4_5_vl_moe",
    "gemma4",
)
# Families whose image inputs have the form of another's.
INPUTS_LIKE = {
    "lighton_ocr": "mistral3",
    "llava_next_video": "llava_next",
    "lfm3_vl": "qwen2_vl",
    "kimi_k25": "paddleocr_vl",
    "mistral_large4": "mistral3",
    **dict.fromkeys((*PACKED_FAMILIES, *NEWER_PACKED), "qwen2_vl"),
    **dict.fromkeys(PACKED_STILLS, "packed_stills"),
}


def base_config(name: str):
    """Configuration of a tiny model of a family; skips a test of one that this release lacks."""
    try:
        return CONFIGS[name]()
    except AttributeError as error:
        if error.obj is not hf:
            raise
        pytest.skip(f"transformers {hf.__version__} has no {error.name}")


def build_base(name: str):
    """A tiny random model of a family, in evaluation mode, which never generates placeholders."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(base_config(name)).eval().float()
    if not callable(getattr(model.model, "get_image_features", None)):
        pytest.skip(f"transformers {hf.__version__} has {name} without an inner model")
    if name == "gemma3":  # starts at zero, which would hide every image
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return model


def _build_gemma4(pixels) -> list[dict]:
    rows = []
    for height, width in [(4, 6), (4, 4)]:
        number = torch.arange(height * width)
        places = torch.full((1, 24, 2), -1)  # the rest is padding
        places[0, : height * width] = torch.stack([number % width, number // width], dim=-1)
        rows.append({"pixel_values": pixels(1, 24, 48), "image_position_ids": places})
    return rows


def _build_granite_docling(pixels) -> list[dict]:
    padded = torch.cat([pixels(1, 1, 3, 16, 16), torch.zeros(1, 1, 3, 16, 16)], dim=1)
    return [
        {"pixel_values": padded, "pixel_attention_mask": torch.tensor([[True, False]])},
        {"pixel_values": pixels(1, 2, 3, 16, 16), "pixel_attention_mask": torch.ones(1, 2).bool()},
    ]


def _build_hybrid(pixels) -> list[dict]:
    return [
        {"pixel_values": pixels(n, 3, 16, 16), "high_res_pixel_values": pixels(n, 3, 64, 64)}
        for n in (1, 2)
    ]


def _build_inkling2(pixels) -> list[dict]:
    return [
        {
            "pixel_values": pixels(height * width, 8, 8, 3),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }
        for height, width in [(4, 6), (2, 2)]
    ]


PATCH_SHAPES = {
    "qwen2_vl": (96,),
    "packed_stills": (48,),
    "paddleocr_vl": (3, 4, 4),
    "video_llama_3": (48,),
}
OF_THEIR_OWN = {
    "gemma4": _build_gemma4,
    "granite_docling": _build_granite_docling,
    "deepseek_vl_hybrid": _build_hybrid,
    "inkling2": _build_inkling2,
}


def build_images(name: str) -> list[dict]:
    """Encoder inputs of each of two prompts: one image each, or two images in the second prompt."""
    generator = torch.Generator().manual_seed(1)

    def pixels(*shape):
        return torch.randn(*shape, generator=generator)

    kind = INPUTS_LIKE.get(name, name)
    if kind in PATCH_SHAPES:
        patch_shape = PATCH_SHAPES[kind]
        rows = []
        for height, width in [(8, 12), (4, 4)]:
            row = {"pixel_values": pixels(height * width, *patch_shape)}
            row["image_grid_thw"] = torch.tensor([[1, height, width]])
            if kind == "video_llama_3":
                row["image_merge_sizes"] = torch.tensor([1])
            rows.append(row)
        return rows
    if kind == "lfm2_vl":
        rows = []
        for height, width in [(4, 6), (4, 4)]:
            mask = torch.zeros(1, 24, dtype=torch.long)
            mask[:, : height * width] = 1
            row = {"pixel_values": pixels(1, 24, 48), "pixel_attention_mask": mask}
            rows.append({**row, "spatial_shapes": torch.tensor([[height, width]])})
        return rows
    if kind in OF_THEIR_OWN:
        return OF_THEIR_OWN[kind](pixels)
    if kind in ("llava_next", "llava_onevision"):
        most_views = 5
        return [
            {"pixel_values": pixels(1, most_views, 3, 16, 16), "image_sizes": torch.tensor([size])}
            for size in ([30, 20], [12, 32])
        ]
    if kind == "mistral3":
        return [
            {"pixel_values": pixels(1, 3, 32, 32), "image_sizes": torch.tensor([size])}
            for size in ([32, 16], [16, 24])
        ]
    if name in ("idefics3", "smolvlm"):
        padding = torch.zeros(1, 1, 3, 16, 16)  # the second prompt has two views
        first = torch.cat([pixels(1, 1, 3, 16, 16), padding], dim=1)
        return [{"pixel_values": first}, {"pixel_values": pixels(1, 2, 3, 16, 16)}]
    return [{"pixel_values": pixels(1, 3, 16, 16)}, {"pixel_values": pixels(2, 3, 16, 16)}]


def build_inputs(name: str, model, rows: list[dict] | None = None) -> dict:
    """Model inputs of prompts with these images (by default `build_images`), padded on the left."""
    rows = build_images(name) if rows is None else rows
    counts = [count_image_tokens(model, row) for row in rows]
    length = max(counts) + 6
    ids = torch.full((len(rows), length), 5)
    mask = torch.ones(len(rows), length, dtype=torch.long)
    for row, count in enumerate(counts):
        pad = max(counts) - count
        ids[row, :pad] = mask[row, :pad] = 0
        ids[row, pad + 1] = START
        ids[row, pad + 2 : pad + 2 + count] = IMAGE
        ids[row, -2] = 7 + count % 3
    inputs = {"input_ids": ids, "attention_mask": mask}
    for key in rows[0]:
        inputs[key] = torch.cat([row[key] for row in rows])
    if name in TYPED:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if name in ("paligemma", "gemma3"):
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


@torch.no_grad()
def count_image_tokens(model, row: dict) -> int:
    """Number of image tokens that a prompt's images take."""
    features = model.model.get_image_features(**row).pooler_output
    return sum(image.shape[0] if image.dim() > 1 else 1 for image in features)


def build_fine_views(model, inputs: dict) -> dict:
    """Finer views of the images, where an upgraded model reads them."""
    if not model.plan.tiles:
        return {}
    generator = torch.Generator().manual_seed(2)
    pixels = inputs["pixel_values"]
    shape = (len(pixels), model.plan.tiles**2, *pixels.shape[1:])
    return {"fine_pixel_values": torch.randn(shape, generator=generator)}


def add_video(name: str, inputs: dict) -> dict:
    """Add a video to each prompt before its last two tokens: two frames of 4 x 4 patches."""
    generator = torch.Generator().manual_seed(6)
    frame = [START, *[VIDEO] * 4, END]
    video = {
        # each frame is pooled to 2 x 2, and a newline ends the whole
        "llava_onevision": [VIDEO] * 9,
        "qwen3_vl": frame + frame,
    }.get(name, [START, *[VIDEO] * 8, END])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rows = len(ids)
    ids = torch.cat([ids[:, :-2], torch.tensor([video]).expand(rows, -1), ids[:, -2:]], dim=1)
    mask = torch.cat([mask, torch.ones(rows, len(video)).to(mask)], dim=1)
    longer = inputs | {"input_ids": ids, "attention_mask": mask}
    if name == "llava_onevision":
        frames = torch.randn(rows, 2, 3, 16, 16, generator=generator)
        return longer | {"pixel_values_videos": frames}
    return longer | {
        "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long(),
        "pixel_values_videos": torch.randn(rows * 32, 96, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]] * rows),
    }


def randomize_fusion(model):
    """Give the fusion weights that have an effect; returns the model."""
    torch.manual_seed(1)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model
