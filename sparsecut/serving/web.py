"""The server's page: a chat in the browser that shows the plan, how much each shortcut adds, and
answers without some of them.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from PIL import Image

from ..audio import Clip
from ..data.audio_records import encode_wav
from ..data.examples import Example
from ..drawing import list_arrows, summarize
from ..evaluation.heat_maps import KINDS, make_heat_maps
from ..evaluation.shortcut_norms import measure_additions
from ..schema import UserError
from .admission import ServerConfig, ServerContext, read_json
from .conversation import Conversation, build_conversation
from .decoding import SamplingParams
from .engine import Engine, QueueFullError
from .errors import APIError, build_busy_error
from .image_fetching import read_medium
from .protocol import parse_conversation

# Nothing is loaded from elsewhere, and what a model writes could not load or run anything either.
CONTENT_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src 'unsafe-inline';"
    " img-src data: blob:; media-src data:; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)
SCRIPT = re.compile("<script>(.*?)</script>", re.DOTALL)
MEASURES = ("gate", "norm", "hidden_norm", "ratio", "cosine")


@dataclass(frozen=True)
class PageExamples:
    """What the page offers to ask before anything was asked.

    Attributes:
        image: A PNG file.
        questions: Questions about it.
    """

    image: Path
    questions: tuple[str, ...]

    def to_dict(self) -> dict:
        """The image as a data URL, and the questions."""
        data = base64.b64encode(self.image.read_bytes()).decode()
        return {"image": f"data:image/png;base64,{data}", "questions": list(self.questions)}


def read_page() -> str:
    """The page as one HTML file; styles and script are inside."""
    return (files(__package__) / "ui.html").read_text(encoding="utf-8")


def build_content_policy(page: str) -> str:
    """The content security policy of a page, under which its own script alone runs."""
    script = SCRIPT.search(page)
    digest = hashlib.sha256((script[1] if script else "").encode()).digest()
    return CONTENT_POLICY.format(script=f"sha256-{base64.b64encode(digest).decode()}")


def add_page(
    app: FastAPI, engine: Engine, config: ServerConfig, examples: PageExamples | None = None
) -> None:
    """Add the page at /, and what it requests: the plan, and how much each shortcut adds.

    Args:
        app: From `make_app`.
        engine: The engine of this application.
        config: The settings of this application.
        examples: What the page offers to ask; None offers nothing.
    """
    context: ServerContext = app.state.context
    offered = examples.to_dict() if examples is not None else None

    @app.get("/")
    async def page() -> HTMLResponse:
        content = read_page()
        headers = {
            "Content-Security-Policy": build_content_policy(content),
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
        }
        return HTMLResponse(content, headers=headers)

    @app.get("/sparsecut/plan")
    async def plan(request: Request) -> dict:
        context.check_token(request)
        facts = build_plan_facts(engine.model, config)
        return {**facts, "medium": engine.medium, "examples": offered}

    @app.post("/sparsecut/strengths")
    async def strengths(request: Request) -> dict:
        shortcuts = await _run_on_example(context, request, measure_shortcuts)
        return {"shortcuts": shortcuts}

    @app.post("/sparsecut/looks")
    async def looks(request: Request) -> dict:
        return await _run_on_example(context, request, draw_looks)


async def _run_on_example(context: ServerContext, request: Request, measure: Callable) -> Any:
    """Call `measure(engine, example, body)` on the model's thread with a request's conversation."""
    context.check_token(request)
    engine, config = context.engine, context.config
    async with context.receive(request) as upload:
        conversation = await context.run_reader(read_conversation, engine, config, upload.data)
        body = await context.run_reader(read_json, upload.data)
        fetched = await context.fetch_images(conversation.image_urls)
        example = await context.run_reader(build_example, engine, config, conversation, fetched)
        try:
            future = engine.run(lambda: measure(engine, example, body))
            return await asyncio.wrap_future(future)
        except QueueFullError as error:
            raise build_busy_error(str(error)) from None
        except UserError as error:
            raise APIError(400, str(error)) from None


def build_plan_facts(model, config: ServerConfig) -> dict:
    """What the page draws: the depths of both stacks, and the facts of each shortcut."""
    plan = model.plan
    vision_depth = model.config.vision_depth
    shortcuts = []
    for arrow in list_arrows(plan, vision_depth):
        facts = {
            "number": arrow.number,
            "taps": arrow.taps,
            "layer": arrow.layer,
            "mix": arrow.mix,
            "words": arrow.description,
            "is_fine": arrow.reads_fine,
            "can_be_off": arrow.has_weights,
        }
        shortcuts.append(facts)
    return {
        "model": config.name,
        "summary": summarize(plan),
        "vision_depth": vision_depth,
        "language_depth": model.config.language_depth,
        "max_pictures": config.request_limits.max_images,
        "max_tokens": config.request_limits.max_tokens,
        "shortcuts": shortcuts,
    }


def read_conversation(
    engine: Engine, config: ServerConfig, data: bytes | bytearray
) -> Conversation:
    """The conversation of a request's JSON.

    Raises:
        UserError: Where it has no image or cannot be read.
    """
    limits = config.request_limits
    messages = parse_conversation(read_json(data), limits)
    conversation = build_conversation(
        messages, engine.image_token, limits, engine.reserved_tokens, engine.medium
    )
    if not conversation.image_urls:
        raise UserError(
            f"the messages hold no {engine.medium}, and shortcuts add nothing without it; send it"
        )
    return conversation


def build_example(
    engine: Engine, config: ServerConfig, conversation: Conversation, fetched: Mapping[str, bytes]
) -> Example:
    """A conversation as an example, its images as the bytes of PNG files.

    Raises:
        UserError: Where an image cannot be read, or all is too long.
    """
    limits = config.image_limits
    images = [read_medium(engine.medium, url, limits, fetched) for url in conversation.image_urls]
    prepared = [engine.prepare_image(image) for image in images]
    # Refuses what is too long before the model sees it.
    engine.prepare(conversation.messages, prepared, SamplingParams(max_new_tokens=1))
    contents = [_encode(image) for image in images]
    return Example("page", contents, conversation.messages, medium=engine.medium)


def _encode(image: Image.Image | Clip) -> bytes:
    if isinstance(image, Clip):
        return encode_wav(*image)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def draw_looks(engine: Engine, example: Example, body: dict) -> dict:
    """Heat maps of an answer, as numbers that JSON can hold; see `evaluation.heat_maps`.

    Args:
        engine: The engine.
        example: The conversation up to its question.
        body: The request: "answer", a text, and "kind", one of `heat_maps.KINDS`.

    Raises:
        UserError: The answer or the kind is missing or wrong, or nothing can be drawn.
    """
    answer, kind = body.get("answer"), body.get("kind", "gradient")
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"answer is {answer!r}, but must be the text whose maps are wanted")
    if not isinstance(kind, str):
        raise UserError(f"kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    _check_answer(engine, example, answer)
    reply = {"role": "assistant", "content": answer}
    answered = replace(example, messages=[*example.messages, reply])
    made = make_heat_maps(engine.model, engine.processor, answered, kinds=[kind])
    maps = []
    for one in made.maps:
        values = []
        for row in one.values:
            values.append([_drop_infinite(float(value)) for value in row])
        facts = {"shortcut": one.shortcut, "image": one.image, "is_empty": one.is_empty}
        maps.append({**facts, "values": values})
    return {"kind": kind, "maps": maps}


def _check_answer(engine: Engine, example: Example, answer: str) -> None:
    """Raise UserError for an answer with special tokens, or too long beside its question."""
    found = [token for token in (engine.image_token, *engine.reserved_tokens) if token in answer]
    if found:
        raise UserError(f"answer contains {found[0]}, a special token; leave it out")
    num_tokens = len(engine.processor.tokenizer(answer)["input_ids"])
    images = [engine.prepare_image(image) for image in example.load_images()]
    engine.prepare(example.messages, images, SamplingParams(max_new_tokens=num_tokens + 1))


def measure_shortcuts(engine: Engine, example: Example, body: dict | None = None) -> list[dict]:
    """How much every shortcut adds at the example's image tokens, as numbers that JSON can hold.

    See `evaluation.additions.measure_additions`.
    """
    measured = []
    for row in measure_additions(engine.model, engine.processor, [example], None):
        values = {"number": row["number"]}
        for name in MEASURES:
            values[name] = _drop_infinite(row[name])
        measured.append(values)
    return measured


def _drop_infinite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
