"""A server on a free port with OpenAI's client for it, and what requests are made of."""

import base64
import io
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from sparsecut.prompts import decode_answers, make_greedy_config, prepare_inputs, render_prompt

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from sparsecut.serving.admission import ServerConfig  # noqa: E402
from sparsecut.serving.server import make_app  # noqa: E402

SETTINGS = {"model": "tiny", "temperature": 0, "max_tokens": 6}


@contextmanager
def start_server(engine, *extensions, **settings):
    """OpenAI's client of a server of this engine.

    Args:
        engine: The engine.
        extensions: Functions of (app, engine, config) that add routes.
        settings: Fields of `ServerConfig`.
    """
    config = ServerConfig(name="tiny", **settings)
    app = make_app(engine, config)
    for extend in extensions:
        extend(app, engine, config)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key=config.token or "none",
            max_retries=0,
        ) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def make_image(shade: int) -> Image.Image:
    """A small image, another one for every shade."""
    image = Image.linear_gradient("L").convert("RGB").resize((20, 24))
    return Image.eval(image, lambda value: (value * 3 + shade) % 256)


def encode_image(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def make_data_url(image: Image.Image) -> str:
    """An image as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(encode_image(image)).decode()}"


def make_messages(text: str, *images: Image.Image) -> list[dict]:
    """A user's question about images, as requests have it."""
    parts = [{"type": "image_url", "image_url": {"url": make_data_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def complete(client, messages: list[dict], **settings):
    """The response to a request: greedy, at most six tokens, unless the settings say otherwise."""
    return client.chat.completions.create(messages=messages, **{**SETTINGS, **settings})


def get_text(response) -> str:
    """The first answer of a response."""
    return response.choices[0].message.content


def request(client, path: str, **arguments):
    """The plain response of a path; POST where a body is given, else GET."""
    url = str(client.base_url).removesuffix("v1/") + path
    has_body = "json" in arguments or "content" in arguments
    with openai.DefaultHttpxClient() as web:
        return web.request("POST" if has_body else "GET", url, **arguments)


def post(client, content: str, content_type: str = "application/json"):
    """The plain response to a chat completion request of this text."""
    headers = {"Content-Type": content_type}
    return request(client, "v1/chat/completions", content=content, headers=headers)


@torch.inference_mode()
def answer_alone(model, processor, messages: list[dict], images: list, length: int = 6) -> str:
    """What a model answers by itself, without the engine; contents have placeholders."""
    prompt = render_prompt(processor, messages)
    inputs = prepare_inputs(model, processor, [prompt], [images])
    output = model.generate(**inputs, generation_config=make_greedy_config(model, length))
    return decode_answers(processor, inputs, output)[0]
