"""`sparsecut serve --engine vllm`: the command's options become those of vLLM's server."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..schema import UserError
from ..serving.vllm.command import KEY_VARIABLE, VLLMSettings, check_installed, make_command
from .app import read_template_arguments

ENGINES = ("local", "vllm")
# Options that both engines have; all others are our own server's.
SHARED = {
    "model",
    "engine",
    "host",
    "port",
    "name",
    "token",
    "max_tokens",
    "max_pictures",
    "template_arg",
    "dtype",
    "engine_args",
}


def check_options(engine: str, given: Sequence[str]) -> None:
    """Check that an engine is known and has all options that were given.

    Args:
        engine: "local" or "vllm".
        given: Names of the options on the command line.

    Raises:
        UserError: It is neither, or lacks an option.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine is {engine!r}, but must be one of {', '.join(ENGINES)}")
    if engine == "local":
        if "engine_args" in given:
            raise UserError(
                "arguments after -- are for vLLM's server; add --engine vllm, or leave them out"
            )
        return
    lacking = [f"--{name.replace('_', '-')}" for name in given if name not in SHARED]
    if lacking:
        raise UserError(
            f"vLLM's server has no {', '.join(lacking)}; leave that out, use --engine local, or"
            " give an option of vLLM's own after --, such as -- --max-num-seqs 16"
        )


def run_vllm(
    options: Mapping[str, Any], name: str, *, execute: Callable[[str, list[str]], None] = os.execv
) -> None:
    """Check the model, then replace this process by vLLM's server.

    Args:
        options: The command's options by name.
        name: The model's name in requests.
        execute: Runs a program with its arguments.

    Raises:
        UserError: vLLM is not installed, or cannot serve the model exactly.
    """
    check_installed()
    arguments = read_template_arguments(options["template_arg"])
    if arguments:
        _check_arguments(options["model"], arguments)
    settings = VLLMSettings(
        model=options["model"],
        host=options["host"],
        port=options["port"],
        name=name,
        max_tokens=options["max_tokens"],
        max_images=options["max_pictures"],
        dtype=options["dtype"],
        template_arguments=arguments,
        further=tuple(options["engine_args"] or ()),
    )
    command = make_command(settings)
    if options["token"]:
        os.environ[KEY_VARIABLE] = options["token"]
    execute(command[0], command)


def _check_arguments(model: str, arguments: dict[str, Any]) -> None:
    """Raise UserError where the model's chat template does not read an argument."""
    from transformers import AutoProcessor

    from ..chat_templates.arguments import set_arguments

    set_arguments(AutoProcessor.from_pretrained(model), arguments)
