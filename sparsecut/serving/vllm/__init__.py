"""A plug-in for vLLM, which serves models of this package beside its own.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. So
`vllm serve FOLDER` takes any folder with a whole model, where this package is installed.

    checks      what vLLM serves exactly
    inputs      what vLLM knows of an image: its tokens, its pixels
    decoders    which decoder of vLLM's it is, and which of its layers receive features
    model       a built model: our encoder and fusion, vLLM's own decoder
    upgraded_model   the same for an upgraded model
    vision, upgraded_vision   the halves that read images
    first_token a chat template that writes a prompt's first token
    layers      features are added before decoder layers, from fixed buffers
"""

ARCHITECTURES = {
    "SparseCutForConditionalGeneration": "sparsecut.serving.vllm.model:SparseCutForVLLM",
    "SparseCutUpgrade": "sparsecut.serving.vllm.upgraded_model:UpgradeForVLLM",
}


def register() -> None:
    """Tell vLLM which class serves which architecture; nothing heavy is imported."""
    from vllm import ModelRegistry

    import sparsecut  # noqa: F401  its configurations become known to AutoConfig

    for architecture, path in ARCHITECTURES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, path)
