"""The command that serves a model, registered on the command line's app when `cli` is imported."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config.places import check_model_files
from ..schema import UserError
from ..serving.naming import get_default_name
from ..shipped_model import SHIPPED_FOLDER
from .app import (
    Device,
    Dtype,
    Number,
    OptionalModel,
    TemplateArguments,
    Text,
    app,
    argument,
    echo,
    load_model,
    option,
    set_template_arguments,
)
from .serve_vllm import check_options, run_vllm

if TYPE_CHECKING:
    import socket

    from fastapi import FastAPI

    from ..serving.admission import ServerConfig
    from ..serving.engine import Engine
    from ..serving.web import PageExamples

TOKEN_VARIABLE = "SPARSECUT_TOKEN"
DEFAULT_TOKENS = 256  # of an answer, where a request sets no limit


@app.command()
def serve(
    context: typer.Context,
    model: OptionalModel = None,
    engine_args: Annotated[
        list[str] | None, argument("With --engine vllm: more options of `vllm serve`.", "[-- ...]")
    ] = None,
    host: Annotated[
        str, option("Address to listen on; 0.0.0.0 is every network interface.")
    ] = "127.0.0.1",
    port: Annotated[int, option("Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        Text, option("The model's name in requests; by default its folder's name, without /final.")
    ] = None,
    token: Annotated[
        Text,
        option(
            "The api_key that clients must send. Prefer the environment variable"
            f" {TOKEN_VARIABLE}, which ps does not show."
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        option(
            "A name by which clients or pages call this server, beside its addresses; may be"
            " repeated. * allows every name."
        ),
    ] = None,
    ui: Annotated[
        bool, option("Also serve a page at / to chat and to switch shortcuts off.", "--ui")
    ] = False,
    max_batch: Annotated[int, option("Maximum number of answers in a batch.", min=1)] = 16,
    queue: Annotated[int, option("Requests that may wait; more are refused with 429.", min=1)] = 64,
    max_per_address: Annotated[
        Number,
        option(
            "Requests under way from one address, this machine's own apart; by default four"
            " fifths of all.",
            min=1,
        ),
    ] = None,
    max_tokens: Annotated[int, option("Maximum number of tokens of an answer.", min=1)] = 1024,
    max_pictures: Annotated[int, option("Maximum number of images in a request.", min=0)] = 8,
    max_pixels: Annotated[int, option("Maximum number of pixels of an image.", min=1)] = 20_000_000,
    max_mib: Annotated[int, option("Maximum size of a request, in MiB.", min=1)] = 32,
    keep_mib: Annotated[
        int, option("MiB of vision features to cache, so that images are not encoded again.", min=0)
    ] = 256,
    remote: Annotated[
        bool, option("Also fetch images from public http(s) addresses.", "--remote")
    ] = False,
    threads: Annotated[Number, option("Threads that compute; by default torch's.", min=1)] = None,
    template_arg: TemplateArguments = None,
    device: Device = None,
    dtype: Dtype = "auto",
    engine: Annotated[
        str, option("What runs the model: local, our own server, or vllm (docs/serving.md).")
    ] = "local",
) -> None:
    """Serve OpenAI-compatible chat completions about texts and images over HTTP.

    Without MODEL it is the small one that ships with the package.
    """
    model = context.params["model"] = model or str(SHIPPED_FOLDER)
    token = token or os.environ.get(TOKEN_VARIABLE) or None
    _check_token(token)
    _check_name(name)
    check_options(engine, _list_given(context))
    if engine == "vllm":
        check_model_files(model)
        _bind(host, port).close()
        run_vllm({**context.params, "token": token}, name or get_default_name(model))
        return
    _check_allowed_hosts(allowed_host or ())
    check_model_files(model)
    _check_serving_is_installed()
    listener = _bind(host, port)  # before the model is loaded, which takes longer
    from ..serving.admission import ServerConfig
    from ..serving.engine import Engine
    from ..serving.image_fetching import MIB, ImageLimits
    from ..serving.protocol import RequestLimits

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    loaded, processor = load_model(model, device, dtype)
    set_template_arguments(processor, template_arg)
    config = ServerConfig(
        name=name or get_default_name(model),
        request_limits=RequestLimits(
            max_tokens=max_tokens,
            default_tokens=min(DEFAULT_TOKENS, max_tokens),
            max_images=max_pictures,
        ),
        image_limits=ImageLimits(max_bytes=max_mib * MIB, max_pixels=max_pixels, remote=remote),
        max_request_bytes=max_mib * MIB,
        max_per_address=max_per_address or max(1, (queue + max_batch) * 4 // 5),
        token=token,
        allowed_hosts=(*(allowed_host or ()), host),
    )
    engine = Engine(
        loaded, processor, max_batch=max_batch, max_queue=queue, cache_bytes=keep_mib * MIB
    )
    web = _make_web_app(engine, config, ui)
    _warn_without_token(token, host)
    _run(web, engine, listener, host, ui)


def _list_given(context: typer.Context) -> list[str]:
    """Names of the options that were typed."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def _check_serving_is_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"serving needs {error.name}; install it with pip install 'sparsecut[serve]'"
        ) from None


def _check_token(token: str | None) -> None:
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError(
            "the token contains whitespace or characters that no HTTP header can carry;"
            " use printable ASCII characters"
        )


def _check_name(name: str | None) -> None:
    if name is not None and not (name.strip() and name.isprintable()):
        raise UserError(f"--name is {name!r}, but must be printable characters without line breaks")


def _check_allowed_hosts(names: Sequence[str]) -> None:
    for name in names:
        if name != "*" and (not name.isascii() or not re.fullmatch(r"[\w.-]+", name)):
            raise UserError(
                f"--allowed-host is {name!r}, but must be a host's name alone, such as"
                " model.example.org, without http:// and port"
            )


def _warn_without_token(token: str | None, host: str) -> None:
    """Say that a server is open to others, where it is."""
    if token is None and not _is_local(host):
        echo(
            f"note: anyone who reaches {host} can send requests;"
            f" set {TOKEN_VARIABLE} or --token to require a token",
            err=True,
        )


def _make_web_app(engine: Engine, config: ServerConfig, ui: bool) -> FastAPI:
    from ..serving.server import make_app

    web = make_app(engine, config)
    if ui:
        from ..serving.web import add_page

        add_page(web, engine, config, _find_examples(engine.processor))
    return web


def _find_examples(processor: Any) -> PageExamples | None:
    """The example of the drawn shapes, where a model knows each of its words; None elsewhere."""
    from ..serving.web import PageExamples
    from ..shapes import EXAMPLE_IMAGE, EXAMPLE_QUESTIONS

    words = {word for question in EXAMPLE_QUESTIONS for word in question.split()}
    if not words <= set(processor.tokenizer.get_vocab()):
        return None
    return PageExamples(EXAMPLE_IMAGE, EXAMPLE_QUESTIONS)


def _run(web: FastAPI, engine: Engine, listener: socket.socket, host: str, ui: bool) -> None:
    """Serve requests until the process gets a signal to end."""
    from ..serving.connections import EndingServer

    listener.listen()  # clients may connect as soon as the next line is printed
    shown_host = f"[{host}]" if ":" in host else host
    url = f"http://{shown_host}:{listener.getsockname()[1]}"
    config = web.state.context.config
    page = f", its page is {url}/" if ui else ""
    echo(f"{config.name} answers at {url}/v1{page}")
    try:
        EndingServer(web, engine.close).run(sockets=[listener])
    finally:
        engine.close()


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address.

    Raises:
        UserError: Where the address cannot be bound.
    """
    import socket

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror or error});"
            " give another --port or --host"
        ) from None
    return listener


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
