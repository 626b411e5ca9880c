"""The engine behind the server: a queue with a limit, and one thread that owns the model.

Batches are static: requests that arrive while one runs wait for its longest answer. Every request
ends as soon as its own answers are there.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ..audio import Clip
from ..chat_templates.thoughts import find_open_thought
from ..prompts import check_length
from ..schema import UserError
from .decoding import GenerationRow, SamplingParams, TextDelta
from .image_cache import PreparedImage
from .model_runner import ModelRunner

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 2 * 2**30  # of the images of all requests that wait
SHUTTING_DOWN = "the server is shutting down; send the request to another one"

OnDelta = Callable[[TextDelta | Exception | None], None]


class QueueFullError(Exception):
    """The queue is full, or the engine is closed."""


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request, ready for the queue.

    Attributes:
        prompt: The conversation by the chat template.
        images: Its images, in the order of the placeholders.
        num_tokens: Tokens of the prompt, those of the images included.
        sampling: How to draw the answers.
        num_answers: How many answers to write.
        shortcuts_off: Numbers of the shortcuts that add nothing, ascending.
    """

    prompt: str
    images: tuple[PreparedImage, ...]
    num_tokens: int
    sampling: SamplingParams
    num_answers: int = 1
    shortcuts_off: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of its images."""
        return sum(image.num_bytes for image in self.images)


@dataclass
class RequestHandle:
    """A request in the engine.

    Attributes:
        request: The request.
        on_delta: Receives every `TextDelta`, then None, or the exception that ended the request.
        num_generated: Tokens written, known at the end.
        is_cancelled: Nobody reads the answers any more.
        has_ended: The engine is done with it.
    """

    request: GenerationRequest
    on_delta: OnDelta
    num_generated: int = 0
    is_cancelled: bool = False
    has_ended: bool = False

    def cancel(self) -> None:
        """Drop the request from the queue, or end its answers at the next token.

        Does nothing once it has ended.
        """
        if not self.has_ended:
            self.is_cancelled = True


class Engine:
    """A model that answers many requests at once, from any thread.

    Attributes:
        runner: The model with its processor and feature cache.
        counts: Counts "batches", "rows", "cancelled", "refused" and "failed".
        waiting: Requests in the queue, the oldest first.
        num_running: Answers being written.
        is_closed: No request is taken any more.
    """

    def __init__(
        self,
        model,
        processor,
        *,
        max_batch: int = 16,
        max_queue: int = 64,
        cache_bytes: int = 256 * 2**20,
    ):
        """
        Args:
            model: A SparseCut model, joined or upgraded.
            processor: Its processor.
            max_batch: Answers written together; each answer of a request is one.
            max_queue: Requests that may wait.
            cache_bytes: Bytes of vision features to keep; 0 keeps none. Upgraded models of
                families beyond `CACHEABLE_BASES` encode every image anew.

        Raises:
            UserError: For limits that are no whole numbers or too small, and for models without a
                vision encoder.
        """
        _check_whole_number("max_batch", max_batch, 1)
        _check_whole_number("max_queue", max_queue, 1)
        _check_whole_number("cache_bytes", cache_bytes, 0)
        self.runner = ModelRunner(model, processor, cache_bytes)
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.counts: Counter = Counter()
        self.num_running = 0
        self.waiting: deque[RequestHandle] = deque()
        self.calls: queue.SimpleQueue = queue.SimpleQueue()  # of `run`
        self.changed = threading.Condition()
        self.is_closed = False
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)
        self.thread.start()

    @property
    def model(self):
        """The model."""
        return self.runner.model

    @property
    def processor(self):
        """The model's processor."""
        return self.runner.processor

    @property
    def image_token(self) -> str:
        """The model's placeholder for an image in a text."""
        return self.runner.image_token

    @property
    def medium(self) -> str:
        """What the model takes beside text, "image" or "audio"."""
        return self.runner.medium

    @property
    def reserved_tokens(self) -> frozenset[str]:
        """Special tokens that no text of a request may contain."""
        return self.runner.reader.reserved

    def prepare_image(self, image: Image.Image | Clip) -> PreparedImage:
        """An image as requests hold it."""
        return self.runner.prepare_image(image)

    def prepare(
        self,
        messages: list[dict],
        images: Sequence[PreparedImage],
        sampling: SamplingParams,
        *,
        num_answers: int = 1,
        shortcuts_off: Sequence[int] = (),
        may_shorten: bool = False,
        template_arguments: dict[str, Any] | None = None,
    ) -> GenerationRequest:
        """Check a request against the model and this engine's limits.

        Args:
            messages: The conversation, with one placeholder per image.
            images: From `prepare_image`, in the order of the placeholders.
            sampling: How to draw the answers.
            num_answers: How many answers to write.
            shortcuts_off: Numbers of the shortcuts that add nothing to them.
            may_shorten: Take fewer new tokens where the language model's positions do not allow
                all of them.
            template_arguments: Arguments of the chat template.

        Raises:
            UserError: For a conversation that the chat template refuses or that is too long, too
                many answers, and shortcuts that do not exist.
        """
        self._check_num_answers(num_answers)
        shortcuts_off = tuple(sorted(set(shortcuts_off)))
        self._check_shortcuts(shortcuts_off)
        prompt = self.runner.reader.build_prompt(messages, template_arguments)
        num_tokens = self.runner.reader.count_tokens(prompt, images)
        max_positions = self.runner.max_positions
        if may_shorten and max_positions is not None:
            num_left = max(1, max_positions - num_tokens)
            max_new_tokens = min(sampling.max_new_tokens, num_left)
            sampling = replace(sampling, max_new_tokens=max_new_tokens)
        check_length(
            self.model,
            num_tokens,
            sampling.max_new_tokens,
            "the prompt",
            "shorten it or lower max_tokens",
        )
        return GenerationRequest(
            prompt, tuple(images), num_tokens, sampling, num_answers, shortcuts_off
        )

    def _check_num_answers(self, num_answers: int) -> None:
        if not 1 <= num_answers <= self.max_batch:
            raise UserError(
                f"n is {num_answers}, but this server writes 1 to {self.max_batch} answers to one"
                " request; ask for fewer"
            )

    def _check_shortcuts(self, shortcuts_off: Sequence[int]) -> None:
        last = len(self.model.plan.shortcuts) - 1
        for number in shortcuts_off:
            if not 0 <= number <= last:
                raise UserError(
                    f"shortcuts_off contains {number}, but the plan has no such shortcut;"
                    f" allowed are 0 to {last}"
                )

    def submit(self, request: GenerationRequest, on_delta: OnDelta) -> RequestHandle:
        """Put a request into the queue.

        Args:
            request: From `prepare`.
            on_delta: Receives the answers; called from the model's thread, so it must not block.

        Raises:
            QueueFullError: Where the queue is full or the engine closed.
        """
        handle = RequestHandle(request, on_delta)
        with self.changed:
            if self.is_closed:
                raise QueueFullError(SHUTTING_DOWN)
            if len(self.waiting) >= self.max_queue:
                self.counts["refused"] += 1
                raise QueueFullError(
                    f"{len(self.waiting)} requests wait already, which is the limit;"
                    " try again in a moment"
                )
            num_bytes = sum(other.request.num_bytes for other in self.waiting)
            if self.waiting and num_bytes + request.num_bytes > MAX_WAITING_BYTES:
                self.counts["refused"] += 1
                raise QueueFullError(
                    "the images of the requests that wait fill the memory; try again in a moment"
                )
            self.waiting.append(handle)
            self.changed.notify()
        return handle

    def run(self, function: Callable[[], object]) -> Future:
        """Call a function on the model's thread between two batches.

        Returns:
            A future with the function's result or exception.

        Raises:
            QueueFullError: Where too many functions wait or the engine is closed.
        """
        future: Future = Future()
        with self.changed:
            if self.is_closed or self.calls.qsize() >= self.max_queue:
                raise QueueFullError(
                    "the server has too much to do or is shutting down; try again in a moment"
                )
            self.calls.put((function, future))
            self.changed.notify()
        return future

    def close(self) -> None:
        """Refuse what waits, end what runs at its next token, and end the thread."""
        with self.changed:
            self.is_closed = True
            self.changed.notify()
        self.thread.join()

    # ---- on the model's thread

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(self._has_work)
                if self.is_closed:
                    break
                batch = self._take_batch()
                self.num_running = sum(handle.request.num_answers for handle in batch)
            while not self.calls.empty():
                _call(*self.calls.get())
            if batch:
                self._answer(batch)
            self.num_running = 0
        self._refuse_everything()

    def _has_work(self) -> bool:
        return self.is_closed or bool(self.waiting) or not self.calls.empty()

    def _refuse_everything(self) -> None:
        for handle in self.waiting:
            handle.on_delta(QueueFullError(SHUTTING_DOWN))
        while not self.calls.empty():
            _, future = self.calls.get()
            future.set_exception(QueueFullError(SHUTTING_DOWN))

    def _take_batch(self) -> list[RequestHandle]:
        """The oldest request and, in their order, those that fit beside it.

        They need the same shortcuts, and together no more rows than a batch has.
        """
        batch: list[RequestHandle] = []
        left: list[RequestHandle] = []
        num_rows = 0
        for handle in self.waiting:
            if handle.is_cancelled:
                self.counts["cancelled"] += 1
                continue
            request = handle.request
            is_alike = not batch or batch[0].request.shortcuts_off == request.shortcuts_off
            if is_alike and num_rows + request.num_answers <= self.max_batch:
                batch.append(handle)
                num_rows += request.num_answers
            else:
                left.append(handle)
        self.waiting = deque(left)
        return batch

    def _answer(self, batch: list[RequestHandle]) -> None:
        """Write a batch's answers, and send each request its end."""
        rows = [self._make_rows(handle) for handle in batch]
        self._generate(batch, rows)
        for handle, own_rows in zip(batch, rows, strict=True):
            if not handle.has_ended:
                self._end(handle, own_rows)

    def _end(self, handle: RequestHandle, rows: list[GenerationRow]) -> None:
        """Send a request its end: None where all its answers are whole."""
        failures = [row.failure for row in rows if row.failure is not None]
        end = failures[0] if failures else None
        self.counts["failed"] += bool(failures)
        is_whole = all(row.is_whole for row in rows)
        if self.is_closed and end is None and not is_whole:
            end = QueueFullError(SHUTTING_DOWN)
        self.counts["cancelled"] += handle.is_cancelled
        handle.num_generated = sum(len(row.token_ids) for row in rows)
        handle.has_ended = True
        handle.on_delta(end)

    def _make_rows(self, handle: RequestHandle) -> list[GenerationRow]:
        rows: list[GenerationRow] = []

        def send(delta: TextDelta) -> None:
            handle.on_delta(delta)
            # The other requests of the batch may take long yet.
            if delta.finish_reason is not None and all(row.is_whole for row in rows):
                self._end(handle, rows)

        for index in range(handle.request.num_answers):
            row = GenerationRow(
                index,
                handle.request.sampling,
                self.processor.tokenizer,
                self.runner.end_ids,
                send,
                closing=find_open_thought(handle.request.prompt),
            )
            rows.append(row)
        return rows

    def _generate(self, batch: list[RequestHandle], rows: list[list[GenerationRow]]) -> None:
        """Write the answers of some requests.

        Where the model fails, each half of them is tried again, down to single requests. So only
        those fail at which the model fails alone. Answers continue after what they have sent.
        """
        try:
            self._run_model(batch, rows)
            return
        except Exception as error:  # sent to the client; the other requests may go well
            failure = error
        if len(batch) == 1:
            for row in rows[0]:
                if row.finish_reason is None:
                    row.fail(failure)
            return
        logger.warning(
            "the model failed at %d requests at once (%s); each half of them is tried again",
            len(batch),
            type(failure).__name__,
        )
        middle = len(batch) // 2
        for half in (slice(None, middle), slice(middle, None)):
            self._generate(batch[half], rows[half])

    def _run_model(self, batch: list[RequestHandle], rows: list[list[GenerationRow]]) -> None:
        """Write all answers that have no end yet, in one batch."""
        handles: list[RequestHandle] = []  # of each row
        open_rows: list[GenerationRow] = []
        for handle, own_rows in zip(batch, rows, strict=True):
            for row in own_rows:
                if row.finish_reason is None:
                    row.restart()
                    handles.append(handle)
                    open_rows.append(row)
        if not open_rows:
            return

        def is_wanted(i: int) -> bool:
            return not (self.is_closed or handles[i].is_cancelled)

        self.runner.generate(
            open_rows,
            prompts=[handle.request.prompt for handle in handles],
            images=[handle.request.images for handle in handles],
            shortcuts_off=batch[0].request.shortcuts_off,
            is_wanted=is_wanted,
        )
        self.counts["batches"] += 1
        self.counts["rows"] += len(open_rows)


def _check_whole_number(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}, but must be a whole number of at least {least}")


def _call(function: Callable[[], object], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # the caller receives it
        future.set_exception(error)
