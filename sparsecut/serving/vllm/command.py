"""The command that starts vLLM's server for a model, with the defaults of `sparsecut serve`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from ...schema import UserError

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM reads the clients' key from it
# No host has this name, so images come as data URLs, as with our own server.
NO_HOST = "none.invalid"


@dataclass(frozen=True)
class VLLMSettings:
    """What vLLM's server is started with.

    Attributes:
        model: The model's folder or hub name.
        host: Address to listen on.
        port: Port to listen on.
        name: The model's name in requests.
        max_tokens: Maximum number of tokens of an answer.
        max_images: Maximum number of images in a request.
        dtype: Of the weights; "auto" as saved.
        template_arguments: Arguments of the chat template for all requests.
        further: Further arguments of `vllm serve`, as they are.
    """

    model: str
    host: str
    port: int
    name: str
    max_tokens: int
    max_images: int
    dtype: str = "auto"
    template_arguments: dict[str, Any] = field(default_factory=dict)
    further: tuple[str, ...] = ()


def check_installed() -> None:
    """Raise UserError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise UserError(
            "--engine vllm needs vLLM; install it with pip install 'sparsecut[vllm]', or leave"
            " --engine out"
        )


def make_command(settings: VLLMSettings) -> list[str]:
    """Check a model and make the command line of its server.

    Args:
        settings: What the server is started with.

    Returns:
        A program and its arguments. The clients' key is not among them, as `ps` shows these.

    Raises:
        UserError: vLLM cannot serve the model exactly.
    """
    from transformers import AutoConfig, AutoProcessor

    import sparsecut  # noqa: F401  its configurations become known to AutoConfig

    # with torch, which help does not need
    from .checks import check_adapters, check_servable, check_whole
    from .first_token import make_chat_template

    check_whole(settings.model)
    config = AutoConfig.from_pretrained(settings.model)
    check_servable(config)
    check_adapters(settings.model, "--enable-lora" in settings.further)
    dtype = settings.dtype
    if dtype == "auto":  # vLLM's own "auto" halves weights of float32
        dtype = str(config.dtype or "auto").removeprefix("torch.")
    arguments = {
        "host": settings.host,
        "port": settings.port,
        "served-model-name": settings.name,
        "dtype": dtype,
        # OpenAI's defaults for sampling, not the model's.
        "generation-config": "vllm",
        "override-generation-config": json.dumps({"max_new_tokens": settings.max_tokens}),
        "limit-mm-per-prompt": json.dumps({"image": settings.max_images}),
        "allowed-media-domains": NO_HOST,
    }
    template = make_chat_template(AutoProcessor.from_pretrained(settings.model))
    if template:
        arguments["chat-template"] = template
    if settings.template_arguments:
        arguments["default-chat-template-kwargs"] = json.dumps(settings.template_arguments)
    # What `vllm serve` runs; that command itself needs a distribution of the very name vllm.
    program = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", program, "--model", settings.model]
    for name, value in arguments.items():
        if not any(given.split("=")[0] == f"--{name}" for given in settings.further):
            command += [f"--{name}", str(value)]
    return [*command, *settings.further]
