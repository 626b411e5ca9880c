"""The engine behind the server: one thread that owns the model, a queue with a limit, and batches
of what waits.

Batches are static: requests that arrive while one runs wait for its longest answer, though each answer is told as soon as it is
there. Pictures are encoded one by one, so that their features do not depend on the batch, and are kept by digest.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..modeling_base import SparseCutImageFeatures
from ..prompts import (
    check_length,
    get_max_length,
    is_fixed,
    make_greedy_config,
    prepare_inputs,
    render_prompt,
)
from ..schema import UserError
from .decoding import GenerationRow, PerRowSampler, SamplingParams, TextDelta, joined
from .image_cache import ImageFeatureCache, Picture

MIB = 2**20
KEEPING = (
    "llava",
    "qwen2_5_vl",
)  # bases of which a picture's features are known to be the same alone as in a batch
PIXELS = ("pixel_values", "fine_pixel_values")


class QueueFullError(Exception):
    """The queue is full, or the engine is closed."""


@dataclass(frozen=True)
class GenerationRequest:
    """What is asked: prompt with its pictures in order, how to answer, how often, and which
    shortcuts are off.
    """

    prompt: str
    pictures: tuple[Picture, ...]
    num_tokens: int
    sampling: SamplingParams
    num_answers: int = 1
    off: tuple[int, ...] = ()


@dataclass
class RequestHandle:
    """A question on its way; `on_delta` receives every Piece, then None, or the exception that
    ended it.
    """

    question: GenerationRequest
    on_delta: Callable[[TextDelta | Exception | None], None]
    num_generated: int = 0
    cancelled: bool = False
    ended: bool = False

    def cancel(self) -> None:
        """Nobody reads the answer any more: it is dropped from the queue, or ends at the next
        token; nothing once it has ended.
        """
        self.cancelled = self.cancelled or not self.ended


class Engine:
    """A model that answers many requests at once, from any thread.

    max_batch: answers written together (each of a request's choices is one). max_queue: requests
    that may wait. cache_bytes: features of pictures kept; 0 keeps none. Upgraded models of families
    beyond KEEPING encode every time, because what a base makes of pictures differs by family.
    """

    def __init__(
        self,
        model,
        processor,
        *,
        max_batch: int = 16,
        max_queue: int = 64,
        cache_bytes: int = 256 * MIB,
    ):
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("max_queue", max_queue, 1),
            ("cache_bytes", cache_bytes, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(
                    f"{name} is {value!r}, but must be a whole number of at least {least}"
                )
        if not hasattr(processor, "image_token"):
            raise UserError(
                f"{type(processor).__name__} has no placeholder for pictures; the server answers"
                " about pictures and texts, so give a model whose encoder sees"
            )
        self.model, self.processor = model.eval(), processor
        self.max_batch, self.max_queue = max_batch, max_queue
        self.views = is_fixed(processor)
        self.keeps = self.views or self.model.config.base_config.model_type in KEEPING
        self.kept = ImageFeatureCache(cache_bytes if self.keeps else 0)
        self.counts: Counter = Counter()
        self.num_running = 0
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends]) - {None}
        self.words = threading.Lock()  # a tokenizer changes its padding while it works
        self.waiting: deque[RequestHandle] = deque()
        self.tasks: queue.SimpleQueue = queue.SimpleQueue()
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)
        self.thread.start()

    def ask(
        self,
        messages: list[dict],
        pictures: Sequence[Image.Image | Picture],
        sampling: SamplingParams,
        **more,
    ) -> GenerationRequest:
        """A question from turns with one placeholder per picture; more: num_answers, off.

        Raises ValueError for what the chat template refuses, what is too long, and shortcuts or
        numbers that are not there.
        """
        shown = tuple(p if isinstance(p, Picture) else self.preprocess_image(p) for p in pictures)
        num_answers, off = more.pop("num_answers", 1), tuple(sorted(set(more.pop("off", ()))))
        if not 1 <= num_answers <= self.max_batch:
            raise UserError(
                f"n is {num_answers}, but this server writes 1 to {self.max_batch} answers to one"
                " request; ask for fewer"
            )
        shortcuts = range(len(self.model.plan.shortcuts))
        if unknown := [i for i in off if i not in shortcuts]:
            raise UserError(
                f"there is no shortcut {unknown[0]} to switch off; this plan's are 0 to"
                f" {shortcuts[-1]}"
            )
        with self.words:
            prompt = render_prompt(self.processor, messages)
            num_tokens = self._count(prompt, shown)
        check_length(
            self.model,
            num_tokens,
            sampling.max_new_tokens,
            "the prompt",
            "shorten it or lower max_tokens",
        )
        return GenerationRequest(prompt, shown, num_tokens, sampling, num_answers, off)

    def preprocess_image(self, image: Image.Image) -> Picture:
        """A picture as it waits: its views where these are enough, because photographs would fill
        the memory.
        """
        return Picture.of(image, self.processor if self.views else None)

    def _count(self, prompt: str, shown: Sequence[Picture]) -> int:
        """Tokens of the prompt, pictures included."""
        images = None if self.views else [[p.image for p in shown]]
        return prepare_inputs(self.model, self.processor, [prompt], images)["input_ids"].shape[1]

    def room(self, num_tokens: int = 0) -> int | None:
        """How many tokens fit beside so many; None where the model does not say."""
        limit = get_max_length(self.model)
        return None if limit is None else limit - num_tokens

    def submit(
        self, question: GenerationRequest, on_delta: Callable[[TextDelta | Exception | None], None]
    ) -> RequestHandle:
        """Queue a question; `on_delta` is called from the model's thread and must not block. Raises
        Busy where the queue is full.
        """
        job = RequestHandle(question, on_delta)
        with self.changed:
            if self.closed:
                raise QueueFullError("the server is shutting down; ask another one")
            if len(self.waiting) >= self.max_queue:
                self.counts["refused"] += 1
                raise QueueFullError(
                    f"{len(self.waiting)} requests wait already, which is the limit; try again in a"
                    " moment"
                )
            self.waiting.append(job)
            self.changed.notify()
        return job

    def answer(self, question: GenerationRequest) -> list[TextDelta]:
        """The finished answers to a question, waited for: one Piece per choice with its whole text,
        tokens and reason.
        """
        told: queue.SimpleQueue = queue.SimpleQueue()
        self.submit(question, told.put)
        pieces: list[TextDelta] = []
        while (piece := told.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            pieces.append(piece)
        return joined(pieces, question.num_answers)

    def run(self, function: Callable[[], object]) -> Future:
        """Call a function on the model's thread between two batches; its result, or its exception,
        comes with the Future.
        """
        future: Future = Future()
        with self.changed:
            if self.closed or self.tasks.qsize() >= self.max_queue:
                raise QueueFullError(
                    "the server has too much to do or is shutting down; try again in a moment"
                )
            self.tasks.put((function, future))
            self.changed.notify()
        return future

    def close(self) -> None:
        """End: what waits is refused, what runs ends at its next token."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting or not self.tasks.empty())
                if self.closed:
                    break
                jobs = self._next_batch()
                self.num_running = sum(job.question.num_answers for job in jobs)
            while not self.tasks.empty():
                function, future = self.tasks.get()
                _call(function, future)
            if jobs:
                self._answer(jobs)
            self.num_running = 0
        for job in self.waiting:
            job.on_delta(QueueFullError("the server is shutting down; ask another one"))
        while not self.tasks.empty():
            self.tasks.get()[1].set_exception(
                QueueFullError("the server is shutting down; ask another one")
            )

    def _next_batch(self) -> list[RequestHandle]:
        """The longest waiting request and, in their order, those that fit beside it: the same
        shortcuts off, enough rows.
        """
        jobs, left, rows = [], [], 0
        for job in self.waiting:
            if job.cancelled:
                self.counts["cancelled"] += 1
                continue
            fits = not jobs or jobs[0].question.off == job.question.off
            if fits and rows + job.question.num_answers <= self.max_batch:
                jobs.append(job)
                rows += job.question.num_answers
            else:
                left.append(job)
        self.waiting = deque(left)
        return jobs

    def _answer(self, jobs: list[RequestHandle]) -> None:
        try:
            self._generate(jobs)
            outcome = [
                QueueFullError("the server is shutting down; ask another one")
                if self.closed
                else None
            ] * len(jobs)
        except Exception as error:  # told to those who asked; the next batch may go well
            self.counts["failed"] += len(jobs)
            outcome = [error] * len(jobs)
        for job, end in zip(jobs, outcome, strict=True):
            self.counts["cancelled"] += job.cancelled
            job.ended = True
            job.on_delta(end)

    @torch.inference_mode()
    def _generate(self, jobs: list[RequestHandle]) -> None:
        rows = [(job, i) for job in jobs for i in range(job.question.num_answers)]
        tokenizer, ends = self.processor.tokenizer, self.ends
        answers = [
            GenerationRow(i, job.question.sampling, tokenizer, ends, job.on_delta)
            for job, i in rows
        ]
        chooser = PerRowSampler(answers, lambda row: not (self.closed or rows[row][0].cancelled))
        config = make_greedy_config(
            self.model, max(job.question.sampling.max_new_tokens for job in jobs)
        )
        questions = [job.question for job, _ in rows]
        with self.model.fusion.switched_off(*jobs[0].question.off):
            self.model.generate(
                **self._inputs(questions),
                generation_config=config,
                logits_processor=LogitsProcessorList([chooser.choose]),
                stopping_criteria=StoppingCriteriaList([chooser.ended]),
            )
        self.counts["batches"] += 1
        self.counts["rows"] += len(rows)
        for (job, _), answer in zip(rows, answers, strict=True):
            job.num_generated += len(answer.ids)

    def _inputs(self, questions: list[GenerationRequest]) -> dict:
        """What `generate` takes: the padded prompts, and pixels or the pictures' features."""
        prompts = [q.prompt for q in questions]
        shown = [picture for q in questions for picture in q.pictures]
        images = None if self.views else [[p.image for p in q.pictures] for q in questions]
        with self.words:
            inputs = dict(prepare_inputs(self.model, self.processor, prompts, images))
        if not shown or not self.keeps:
            self.counts["pictures"] += len(shown)
            return inputs
        inputs = {name: value for name, value in inputs.items() if name not in PIXELS}
        features = list(map(partial(self._features, questions[0].off), shown))
        into, *above = (list(layer) for layer in zip(*features, strict=True))
        output = SparseCutImageFeatures(pooler_output=into, deepstack_features=above or None)
        return {**inputs, "mm_encoder_outputs": {"image": output}}

    def _features(self, off: tuple[int, ...], picture: Picture) -> list[torch.Tensor]:
        """Of one picture the features of every layer, from the input up: kept ones, or encoded
        now.
        """
        features = self.kept.get((picture.digest, off))
        self.counts["pictures"] += 1
        if features is None:
            features = [
                f.clone() for f in self._encoded(picture)
            ]  # a view would keep more memory than is counted
            self.kept.put((picture.digest, off), features)
        else:
            self.counts["pictures_kept"] += 1
        return features

    def _encoded(self, picture: Picture) -> list[torch.Tensor]:
        if self.views:
            found = self.model.get_image_features(picture.views.to(self.model.device))
            return [found.pooler_output[0], *(layer[0] for layer in found.deepstack_features or ())]
        with self.words:
            made = prepare_inputs(
                self.model, self.processor, [self.processor.image_token], [[picture.image]]
            )
        seen = {name: value for name, value in made.items() if name in (*PIXELS, "image_grid_thw")}
        return [torch.cat(list(self.model.get_image_features(**seen).pooler_output))]


def _call(function: Callable[[], object], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # told to the caller
        future.set_exception(error)
