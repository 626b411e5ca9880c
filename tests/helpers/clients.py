"""A server on a free port with OpenAI's client for it, and what requests are made of."""

import base64
import io
import threading
import time
from contextlib import contextmanager

import pytest
from PIL import Image

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from sparsecut.serving.context import ServerConfig  # noqa: E402
from sparsecut.serving.server import make_app  # noqa: E402


@contextmanager
def served(engine, add=lambda app, engine, settings: None, **settings):
    """A client of a server of this engine on a free port."""
    chosen = ServerConfig(name="tiny", **settings)
    app = make_app(engine, chosen)
    add(app, engine, chosen)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key=settings.get("token") or "none", max_retries=0
        ) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def picture(shade: int) -> Image.Image:
    """A small picture, another one for every shade."""
    image = Image.linear_gradient("L").convert("RGB").resize((20, 24))
    return Image.eval(image, lambda v: (v * 3 + shade) % 256)


def data_url(image: Image.Image, form: str = "PNG") -> str:
    """A picture as a data URL."""
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def turn(text: str, *pictures: Image.Image) -> list[dict]:
    """A user's question about pictures."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


ASK = {"model": "tiny", "temperature": 0, "max_tokens": 6}


def create(client, messages, **more):
    """A greedy answer of at most six tokens, unless more says otherwise."""
    return client.chat.completions.create(messages=messages, **{**ASK, **more})


def post(client, content, **headers):
    """The plain response to a request of these bytes."""
    with openai.DefaultHttpxClient() as web:
        headers = {"Content-Type": "application/json", **headers}
        return web.post(f"{client.base_url}chat/completions", content=content, headers=headers)
