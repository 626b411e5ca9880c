"""Why pretrained VLMs of other families cannot be upgraded, and what to do instead."""

from __future__ import annotations

CROSS_ATTENTION = (
    "its layers read images by attention of their own (cross-attention), so no position of the text"
    " shows an image, to which a shortcut could add"
)
RESAMPLED = (
    "learned queries or a pooling by attention make its image tokens, so no token shows certain"
    " patches, whose features a shortcut could add"
)
NO_ENCODER = (
    "it has no vision encoder: its language model reads patches or codes of pixels directly, so there"
    " are no encoder layers to read"
)
ENCODER_DECODER = (
    "it has an encoder and a decoder for text, and shortcuts are for a language model that reads from"
    " left to right"
)
CONVOLUTIONS = (
    "its vision encoder is made of convolutions, and shortcuts of upgraded models read the blocks of a"
    " vision transformer"
)
NOT_FOR_TEXT = "it does not answer in text, token by token"
OTHER_WRAPPER = "it wraps another model for one task; upgrade the model inside it"
AUDIO_TOO = (
    "it reads images, videos and audio into one prompt, and which of its tokens show which patches has"
    " not been worked out and checked"
)
TEXT_ONLY = "its entry is a language model without a vision encoder"
NOT_CHECKED = "which patches lie under each of its image tokens has not been worked out and checked by gradients"
REASONS = {
    "aria": RESAMPLED,
    "blip": CROSS_ATTENTION,
    "blip-2": RESAMPLED,
    "chameleon": NO_ENCODER,
    "diffusion_gemma": NOT_FOR_TEXT,
    "emu3": NO_ENCODER,
    "ernie4_5_vl_moe": (
        "a resampler that also joins frames makes its image tokens, and which patches lie under each"
        " has not been checked"
    ),
    "evolla": "it reads proteins, not images",
    "fast_vlm": CONVOLUTIONS,
    "florence2": ENCODER_DECODER,
    "fuyu": NO_ENCODER,
    "gemma3n": CONVOLUTIONS,
    "git": (
        "its decoder reads image tokens by its own embedding of a whole image, without placeholders in"
        " the text"
    ),
    "got_ocr2": "convolutions join the patches of its encoder (SAM's), and so do those of its language"
    " model's entry; no token shows certain patches",
    "granite4_vision": RESAMPLED,
    "idefics": CROSS_ATTENTION,
    "idefics2": RESAMPLED,
    "instructblip": RESAMPLED,
    "instructblipvideo": RESAMPLED,
    "kosmos-2": RESAMPLED,
    "kosmos-2.5": RESAMPLED,
    "mistral4": TEXT_ONLY,
    "mllama": CROSS_ATTENTION,
    "molmo2": (
        "it pools patches by attention, and its processor chooses them anew for every image, so which"
        " patches lie under a token is known to its call alone"
    ),
    "nemotron_h_omni": AUDIO_TOO,
    "pi0": NOT_FOR_TEXT,
    "pix2struct": ENCODER_DECODER,
    "pp_chart2table": OTHER_WRAPPER,
    "pp_formulanet": ENCODER_DECODER,
    "qwen2_5_omni_thinker": AUDIO_TOO,
    "qwen3_omni_moe_thinker": AUDIO_TOO,
    "shieldgemma2": OTHER_WRAPPER,
    "t5gemma2": ENCODER_DECODER,
    "udop": ENCODER_DECODER,
    "video_llava": "it reads videos by a second encoder, and shortcuts have one to read",
    "vision-encoder-decoder": ENCODER_DECODER,
}
OMNI = ("qwen2_5_omni", "qwen3_omni_moe", "gemma4", "gemma4_unified", "cosmos3_omni", "dots3_note")


def explain_refusal(model_type: str | None) -> str:
    """Return why a model type cannot be upgraded, as the second half of a sentence.

    Types that nobody has looked at get a general reason.
    """
    return REASONS.get(model_type) or (AUDIO_TOO if model_type in OMNI else NOT_CHECKED)
