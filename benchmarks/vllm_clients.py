"""Clients of benchmarks/vllm.py: many at once for throughput, one for the first token's time."""

import asyncio
import base64
import io
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import openai
from PIL import Image

POOL = 8  # images that come again
SECONDS = 600  # of one request at most


@dataclass
class Questions:
    """Questions about images, none like another.

    Attributes:
        num_words: Words of a question.
        vocabulary: Words are drawn from so many.
        side: Pixels of an image's side.
        images: Images that come again, as URLs.
    """

    num_words: int
    vocabulary: int
    side: int
    images: list[str] = field(init=False)

    def __post_init__(self):
        self.numbers = itertools.count()
        self.generator = random.Random(0)
        self.images = [self.draw_image() for _ in range(POOL)]

    def draw_image(self) -> str:
        """An image that was never sent, as a URL: coarse noise, so it compresses as photos do."""
        noise = np.random.default_rng(next(self.numbers)).integers(0, 255, (24, 32, 3), np.uint8)
        image = Image.fromarray(noise).resize((4 * self.side // 3, self.side))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

    def draw_words(self, number: int) -> str:
        """Some random words."""
        return " ".join(f"w{self.generator.randrange(self.vocabulary)}" for _ in range(number))

    def ask(self, url: str, words_before: int = 0) -> list[dict]:
        """Messages with one question about an image; some of its words may come before it."""
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        if words_before:
            parts.insert(0, {"type": "text", "text": self.draw_words(words_before) + " "})
        parts.append({"type": "text", "text": self.draw_words(self.num_words - words_before)})
        return [{"role": "user", "content": parts}]

    def ask_many(self, number: int, *, are_new: bool) -> list[list[dict]]:
        """Questions about images that are all new, or that all were seen.

        Words before an image differ, so what a server keeps of its encoder counts, and not what it
        keeps of a prompt.
        """
        urls: Iterator[str] = itertools.cycle(self.images)
        if are_new:
            urls = iter([self.draw_image() for _ in range(number)])
        return [self.ask(next(urls), words_before=self.num_words // 2) for _ in range(number)]


@dataclass
class Load:
    """What a server did with many questions.

    Attributes:
        seconds: From the first question to the last answer.
        num_requests: Answers.
        num_new_tokens: Tokens of all answers.
        num_prompt_tokens: Tokens of each prompt.
    """

    seconds: float
    num_requests: int
    num_new_tokens: int
    num_prompt_tokens: int


def run_load(server, questions: list[list[dict]], clients: int, new_tokens: int) -> Load:
    """Ask from many clients at once, each of which waits for its answer before it asks again.

    Raises:
        RuntimeError: An answer has fewer tokens than it may have.
    """
    waiting = iter(questions)
    usages = []

    async def run_client(client: openai.AsyncOpenAI) -> None:
        for messages in waiting:
            response = await client.chat.completions.create(
                messages=messages, **make_settings(server, new_tokens)
            )
            usages.append(response.usage)

    async def run_all() -> None:
        async with open_client(server) as client:
            await asyncio.gather(*(run_client(client) for _ in range(clients)))

    start = time.perf_counter()
    asyncio.run(run_all())
    seconds = time.perf_counter() - start
    lengths = {usage.completion_tokens for usage in usages}
    if lengths != {new_tokens}:
        raise RuntimeError(f"{server.name} wrote {sorted(lengths)} tokens instead of {new_tokens}")
    prompts = [usage.prompt_tokens for usage in usages]
    return Load(seconds, len(usages), new_tokens * len(usages), max(prompts))


def time_first_tokens(server, questions: list[list[dict]]) -> list[float]:
    """Seconds until the first token of each answer, asked one after the other."""

    async def time_one(client: openai.AsyncOpenAI, messages: list[dict]) -> float:
        start = time.perf_counter()
        stream = await client.chat.completions.create(
            messages=messages, stream=True, **make_settings(server, 1)
        )
        seconds = 0.0
        async with stream:
            async for event in stream:
                choice = event.choices[0] if event.choices else None
                if choice and not seconds and (choice.delta.content or choice.finish_reason):
                    seconds = time.perf_counter() - start
        return seconds

    async def time_all() -> list[float]:
        async with open_client(server) as client:
            return [await time_one(client, messages) for messages in questions]

    return asyncio.run(time_all())


def open_client(server) -> openai.AsyncOpenAI:
    """A client that tries nothing twice."""
    return openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=SECONDS)


def make_settings(server, new_tokens: int) -> dict:
    """Settings of a request. Our server has no `ignore_eos`, and its models never end early."""
    settings = {"model": server.model, "temperature": 0, "max_tokens": new_tokens}
    if not server.is_ours:
        settings["extra_body"] = {"ignore_eos": True}
    return settings
