"""A plug-in for vLLM, which serves models of this package beside its own.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. So
`vllm serve FOLDER` takes any folder that `build` or `train` wrote, where this package is installed.

    checks      what vLLM serves exactly
    inputs      what vLLM knows of an image: its tokens, its pixels
    model       the model: our encoder and fusion, vLLM's own decoder
    first_token a chat template that writes a prompt's first token
    layers      features are added before decoder layers, from fixed buffers
"""

# An upgraded model is registered to be refused in a sentence.
ARCHITECTURES = dict.fromkeys(
    ("SparseCutForConditionalGeneration", "SparseCutUpgrade"),
    "sparsecut.serving.vllm.model:SparseCutForVLLM",
)


def register() -> None:
    """Tell vLLM which class serves which architecture; nothing heavy is imported."""
    from vllm import ModelRegistry

    import sparsecut  # noqa: F401  its configurations become known to AutoConfig

    for architecture, path in ARCHITECTURES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, path)
