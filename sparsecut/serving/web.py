"""The server's page: a chat in the browser that shows the plan, how much each shortcut adds, and
answers without some.
"""

from __future__ import annotations

import asyncio
import io
import math
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from ..data.examples import Example
from ..drawing import summary
from ..evaluation.ablation import measure_additions
from ..schema import UserError
from .context import APIError, ServerConfig, ServerContext, busy
from .decoding import SamplingParams
from .engine import Engine, QueueFullError
from .image_fetching import picture_of
from .protocol import read_messages

# Nothing is loaded from elsewhere, and what a model writes could not load anything either.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    " blob:; connect-src 'self'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


def page() -> str:
    """The page as HTML, whole: styles and script are inside."""
    return (files(__package__) / "ui.html").read_text(encoding="utf-8")


def add_page(app: FastAPI, engine: Engine, settings: ServerConfig) -> None:
    """Give the application its page at / and what the page asks beside chat: the plan, and how much
    its shortcuts add.
    """
    desk: ServerContext = app.state.desk

    @app.get("/")
    async def start() -> HTMLResponse:
        return HTMLResponse(page(), headers=HEADERS)

    @app.get("/sparsecut/plan")
    async def plan(request: Request) -> dict:
        desk.check_token(request)
        return plan_facts(engine.model, settings)

    @app.post("/sparsecut/strengths")
    async def strengths(request: Request) -> dict:
        desk.check_token(request)
        async with desk.admit():
            body = await desk.read(request)
            try:
                async with desk.readers:
                    example = await asyncio.to_thread(_example, engine, settings, body)
                found = await asyncio.wrap_future(engine.run(lambda: measured(engine, example)))
            except QueueFullError as error:
                raise busy(str(error)) from None
            except ValueError as error:
                raise APIError(400, str(error)) from None
        return {"shortcuts": found}


def plan_facts(model, settings: ServerConfig) -> dict:
    """What the page draws: depths, and of each shortcut its taps (absolute), layer and mixer in
    words.
    """
    plan, depth = model.plan, model.config.vision_depth
    return {
        "model": settings.name,
        "summary": summary(plan),
        "vision_depth": depth,
        "language_depth": model.config.language_depth,
        "max_pictures": settings.bounds.max_pictures,
        "max_tokens": settings.bounds.max_tokens,
        "shortcuts": [
            {
                "number": i,
                "taps": sorted({tap % (depth + 1) for tap in s.flat_taps}),
                "layer": s.layer,
                "mix": s.mix,
                "words": s.mixer.description,
                "is_fine": bool(plan.tiles) and not s.is_coarse,
                "can_be_off": s.mix != "base",
            }
            for i, s in enumerate(plan.shortcuts)
        ],
    }


def _example(engine: Engine, settings: ServerConfig, body: object) -> Example:
    """The conversation of a request, its pictures as files' bytes; ValueError where it has none."""
    messages = body.get("messages") if isinstance(body, dict) else None
    turns, urls = read_messages(messages, engine.processor.image_token, settings.bounds)
    if not urls:
        raise UserError(
            "the turns hold no picture, and shortcuts add nothing without one; send a picture"
        )
    pictures = [picture_of(url, settings.pictures) for url in urls]
    engine.ask(
        turns, pictures, SamplingParams(1)
    )  # what is too long is refused before the model sees it
    contents = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        contents.append(file.getvalue())
    return Example("page", contents, turns)


def measured(engine: Engine, example: Example) -> list[dict]:
    """How much every shortcut adds at the example's image tokens (`explain.measure_additions`),
    numbers that JSON can hold.
    """
    found = measure_additions(engine.model, engine.processor, [example], None)
    sizes = ("gate", "norm", "hidden_norm", "ratio", "cosine")
    return [
        {"number": one["number"], **{name: _finite(one[name]) for name in sizes}} for one in found
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
