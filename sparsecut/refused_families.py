"""Why pretrained VLMs of other families cannot be upgraded, and what to do instead.

The reasons were read off the models' code in transformers 5.23.
"""

from __future__ import annotations

CROSS_ATTENTION = (
    "its layers read images by attention of their own (cross-attention), so no position of the text"
    " shows an image, to which a shortcut could add"
)
RESAMPLED = (
    "learned queries or a pooling by attention make its image tokens, so no token shows certain"
    " patches, whose features a shortcut could add"
)
OVERLAPPING = (
    "overlapping convolutions make its image tokens, so every token mixes the patches of its"
    " neighbours, and none shows patches of its own"
)
NO_ENCODER = (
    "it has no vision encoder with blocks: its language model reads patches or codes of pixels, so"
    " there are no layers to read"
)
ENCODER_DECODER = (
    "it has an encoder and a decoder for text, and shortcuts are for a language model that reads"
    " from left to right"
)
TIMM = (
    "its vision encoder is a model of timm, which is read stage by stage or not at all, and"
    " shortcuts of upgraded models read the blocks of one of transformers' vision transformers"
)
SHRINKING = (
    "its vision encoder merges patches between its layers, so early and late layers have different"
    " patches, and a token has no patches of its own"
)
SEVERAL_STREAMS = (
    "its decoder layers pass on several streams of hidden states for each token"
    " (hyper-connections), and shortcuts add to one"
)
NO_INNER_MODEL = (
    "its images are joined with the text in the model that has the head, and shortcuts are attached"
    " to a model below the head"
)
TWO_ENCODERS = (
    "two vision encoders make its image tokens, one from the states of the other, and shortcuts"
    " read one"
)
NOT_FOR_TEXT = "it does not answer in text, token by token"
WITH_SPEECH = (
    "it speaks too, and shortcuts are for the part that reads images and writes text; load that"
    " part by its class ({}) and upgrade it"
)
TEXT_ONLY = "its entry is a language model without a vision encoder"
NOT_CHECKED = (
    "which patches lie under each of its image tokens has not been worked out and checked by"
    " gradients"
)
REASONS = {
    "aria": RESAMPLED,
    "blip": CROSS_ATTENTION,
    "blip-2": RESAMPLED,
    "chameleon": NO_ENCODER,
    "deepseek_ocr2": RESAMPLED,
    "diffusion_gemma": NOT_FOR_TEXT,
    "emu3": NO_ENCODER,
    "evolla": "it reads proteins, not images",
    "fast_vlm": TIMM,
    "florence2": ENCODER_DECODER,
    "fuyu": NO_ENCODER,
    "gemma3n": TIMM,
    "gemma4_unified": NO_ENCODER,
    "git": (
        "its decoder puts image tokens before the text by itself, without placeholders in the text,"
        " at which a shortcut could add"
    ),
    "glm5_next": SEVERAL_STREAMS,
    "got_ocr2": OVERLAPPING,
    "granite4_vision": RESAMPLED,
    "hunyuan_vl": (
        "in transformers itself its answers in a left-padded batch differ from those of single"
        " prompts, so shortcuts in batches could not be checked"
    ),
    "idefics": CROSS_ATTENTION,
    "idefics2": RESAMPLED,
    "inkling_mm_model": SHRINKING,
    "instructblip": RESAMPLED,
    "instructblipvideo": RESAMPLED,
    "kosmos-2": RESAMPLED,
    "kosmos-2.5": RESAMPLED,
    "llama4": NO_INNER_MODEL,
    "minicpm_ocr": SHRINKING,
    "minicpmv4_6": SHRINKING,
    "minicpmv4_7": SHRINKING,
    "mistral4": TEXT_ONLY,
    "mllama": CROSS_ATTENTION,
    "molmo2": (
        "its processor numbers the patches of a whole batch (image_token_pooling), so records that"
        " are prepared one by one cannot be joined to a batch"
    ),
    "nemotron_h_omni": NO_INNER_MODEL,
    "perception_lm": TIMM,
    "pi0": NOT_FOR_TEXT,
    "pix2struct": ENCODER_DECODER,
    "pp_chart2table": OVERLAPPING,
    "pp_formulanet": ENCODER_DECODER,
    "qwen2_5_omni": WITH_SPEECH.format("Qwen2_5OmniThinkerForConditionalGeneration"),
    "qwen3_omni_moe": WITH_SPEECH.format("Qwen3OmniMoeThinkerForConditionalGeneration"),
    "qwen4_exp": SEVERAL_STREAMS,
    "shieldgemma2": "it judges an image by two logits, yes and no, and writes no answer",
    "step3p7": OVERLAPPING,
    "t5gemma2": ENCODER_DECODER,
    "udop": ENCODER_DECODER,
    "unlimited_ocr": TWO_ENCODERS,
    "video_llava": "it has one encoder for images and another for videos, and shortcuts read one",
    "vision-encoder-decoder": ENCODER_DECODER,
}


def explain_refusal(model_type: str | None) -> str:
    """Return why a model type cannot be upgraded, as the second half of a sentence.

    Types that nobody has looked at get a general reason.
    """
    return REASONS.get(model_type or "", NOT_CHECKED)
