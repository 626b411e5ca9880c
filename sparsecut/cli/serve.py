"""The command that serves a model, registered on the command line's app when `cli` is imported."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated

import typer

from ..schema import UserError
from .app import Device, Dtype, Number, SavedModel, Text, app, load_model, option

TOKEN = "SPARSECUT_TOKEN"


@app.command()
def serve(
    model: SavedModel,
    host: Annotated[str, option("Address to listen at; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, option("Port to listen at; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        Text,
        option(
            "What the model is called in requests; by default its folder's name, without /final."
        ),
    ] = None,
    token: Annotated[
        Text,
        option(f"What clients must give as api_key; better in {TOKEN}, where ps does not show it."),
    ] = None,
    ui: Annotated[
        bool, option("Also a page at / to chat in the browser and to switch shortcuts off.", "--ui")
    ] = False,
    max_batch: Annotated[int, option("Answers written together.", min=1)] = 16,
    queue: Annotated[int, option("Requests that may wait; more are refused with 429.", min=1)] = 64,
    max_tokens: Annotated[int, option("Longest answer that a request may ask for.", min=1)] = 1024,
    max_pictures: Annotated[int, option("Pictures in one request.", min=0)] = 8,
    max_pixels: Annotated[int, option("Pixels of one picture.", min=1)] = 20_000_000,
    max_mib: Annotated[int, option("MiB of one request.", min=1)] = 32,
    keep_mib: Annotated[
        int, option("MiB of pictures' features kept, so that they are not encoded again.", min=0)
    ] = 256,
    remote: Annotated[
        bool, option("Also fetch pictures from public http(s) addresses.", "--remote")
    ] = False,
    threads: Annotated[Number, option("Threads that compute; by default torch's.", min=1)] = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Answer OpenAI-compatible chat completions about texts and pictures over HTTP."""
    try:
        import uvicorn

        from ..serving.server import ServerConfig, make_app
    except ImportError as error:
        raise UserError(
            f"serving needs {error.name}; install it with pip install 'sparsecut[serve]'"
        ) from None
    from ..serving.engine import Engine
    from ..serving.image_fetching import MIB, ImageLimits
    from ..serving.protocol import RequestLimits

    token = token or os.environ.get(TOKEN) or None
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError(
            "the token holds blanks or letters that no HTTP header can carry; use printable ASCII"
            " letters"
        )
    if name is not None and not (name.strip() and name.isprintable()):
        raise UserError(
            f"the name {name!r} is empty or holds line breaks; give one of printable letters"
        )
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    listening = _listen(host, port)  # before the model is loaded, which takes longer
    loaded, processor = load_model(model, device, dtype)
    settings = ServerConfig(
        name=name or _name_of(Path(model)),
        bounds=RequestLimits(
            max_tokens=max_tokens, default_tokens=min(256, max_tokens), max_pictures=max_pictures
        ),
        pictures=ImageLimits(max_bytes=max_mib * MIB, max_pixels=max_pixels, remote=remote),
        max_request_bytes=max_mib * MIB,
        token=token,
    )
    engine = Engine(
        loaded, processor, max_batch=max_batch, max_queue=queue, cache_bytes=keep_mib * MIB
    )
    web = make_app(engine, settings)
    if ui:
        from ..serving.web import add_page

        add_page(web, engine, settings)
    listening.listen()  # so that who reads the next line can connect
    place = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    typer.echo(f"{settings.name} answers at {place}/v1" + (f", its page is {place}/" if ui else ""))
    if token is None and not _is_local(host):
        typer.echo(
            f"note: anyone who reaches {host} can ask; give --token, or {TOKEN}, to let in those"
            " who know it",
            err=True,
        )
    try:
        uvicorn.Server(uvicorn.Config(web, log_level="warning", timeout_graceful_shutdown=5)).run(
            sockets=[listening]
        )
    finally:
        engine.close()


def _name_of(folder: Path) -> str:
    folder = folder.resolve() if folder.is_dir() else folder
    return folder.parent.name if folder.name == "final" else folder.name


def _listen(host: str, port: int):
    """A socket that listens; ValueError where the address cannot be had."""
    import socket

    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UserError(
            f"{host}:{port} cannot be listened at ({error.strerror or error}); give another --port"
            " or --host"
        ) from None
    return listening


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
