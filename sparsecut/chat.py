"""A conversation with a model, from Python and line by line in a terminal."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from .audio import AudioSource, Clip
from .chat_templates.answer_stream import AnswerStreamer
from .chat_templates.arguments import check_arguments
from .chat_templates.markers import check_markers
from .chat_templates.thoughts import Answer
from .chat_templates.unknown_words import find_unknown_words, list_words
from .pixels import ImageSource
from .prompts import (
    check_length,
    check_medium,
    find_closing_marks,
    get_medium,
    make_greedy_config,
    open_medium,
    prepare_inputs,
    read_answers,
    render_prompt,
)
from .schema import UserError, nearest

logger = logging.getLogger(__name__)

HELP = """\
/image PATH   show an image with the next question (repeat for several)
/audio PATH   the same for a model that takes audio: WAV, FLAC, MP3 or OGG
/history      print the conversation
/reset        forget the conversation and its images
/help         print these lines
/quit         leave (so do Ctrl-D and Ctrl-C; during an answer Ctrl-C only stops the answer)"""


@dataclass
class _Turn:
    """A question on its way to the model: the conversation with it, all images, and the inputs."""

    messages: list[dict[str, str]]
    images: list[Image.Image | Clip]
    inputs: BatchFeature


class Chat:
    """A conversation that remembers its messages and images.

    Thoughts of a thinking model are neither shown nor part of the next prompt.

    Args:
        model: a model of this package.
        processor: its processor.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the most likely token; a larger one draws at random.
        chat_template_kwargs: arguments of the chat template, such as {"enable_thinking": False}.
        generation: further settings of `generate`.

    Attributes:
        messages: the conversation, [{"role", "content"}], with one placeholder per image.
        images: all images (or clips of sound) of the conversation, in the order of placeholders.
        raw_answers: all that the model has written, thoughts included, one text for each answer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        chat_template_kwargs: dict | None = None,
        **generation: Any,
    ) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}, but must be at least 1")
        if temperature < 0:
            raise UserError(
                f"temperature is {temperature}, but must be at least 0; 0 takes the most likely"
                " token"
            )
        self.model = model
        self.processor = processor
        self.config = make_greedy_config(model, max_new_tokens)
        if temperature:
            self.config.update(do_sample=True, temperature=temperature)
        unknown = self.config.update(**generation)
        if unknown:
            name = next(iter(unknown))
            raise UserError(
                f"generate has no setting {name!r}{nearest(name, self.config.to_dict())}; see"
                " GenerationConfig"
            )
        self.template_arguments = chat_template_kwargs or {}
        check_arguments(processor, self.template_arguments)
        self.messages: list[dict[str, str]] = []
        self.images: list[Image.Image | Clip] = []
        self.raw_answers: list[str] = []

    def reset(self) -> None:
        """Forget all messages and images."""
        self.messages = []
        self.images = []
        self.raw_answers = []

    def ask(self, text: str, *images: ImageSource | AudioSource) -> str:
        """Ask a question and return the answer.

        Args:
            text: the question. It may have one placeholder per image; without any, the images come
                first.
            images: new images: PIL, paths, bytes or URLs; or clips of sound, for a model that takes
                audio. Earlier ones stay in the conversation.

        Raises:
            UserError: The question is empty, an image cannot be read, placeholders and images
                differ in number, the text holds a turn marker of the chat template or half a
                character, or the conversation is too long.
        """
        turn = self._prepare(text, images)
        ids = self.model.generate(**turn.inputs, generation_config=self.config)
        answer = read_answers(self.processor, turn.inputs, ids)[0]
        self._remember(turn, answer)
        return answer.text

    def stream(self, text: str, *images: ImageSource | AudioSource) -> Iterator[str]:
        """Ask a question and iterate over the pieces of the answer.

        Closing the iterator stops the answer. The conversation keeps what was generated until then.
        Arguments and errors are those of `ask`.
        """
        num_beams = self.config.num_beams or 1
        if num_beams > 1:
            raise UserError(
                f"num_beams is {num_beams}, but beam search has its answer only at the end; use"
                " ask, or num_beams=1"
            )
        return self._stream_turn(self._prepare(text, images))

    def _prepare(self, text: str, images: Sequence[ImageSource | AudioSource]) -> _Turn:
        """Check a question and encode it with the conversation before it. Nothing is remembered."""
        placeholder = self.processor.image_token
        noun = "clips" if get_medium(self.processor) == "audio" else "images"
        count = text.count(placeholder)
        if not text.replace(placeholder, "").strip():
            raise UserError("the question is empty; write some text")
        if count not in (0, len(images)):
            raise UserError(
                f"the question has {count} {placeholder} but {len(images)} {noun}; write one"
                f" {placeholder} where each belongs, or none to put all {noun} first"
            )
        opened = [open_medium(self.processor, image) for image in images]
        all_images = [*self.images, *opened]
        question = text if count else f"{placeholder}\n" * len(images) + text
        messages = [*self.messages, {"role": "user", "content": question}]
        check_markers(self.processor, messages)
        prompt = render_prompt(self.processor, messages, self.template_arguments)
        inputs = prepare_inputs(self.model, self.processor, [prompt], [all_images])
        check_length(
            self.model,
            inputs["input_ids"].shape[1],
            self.config.max_new_tokens,
            "the conversation",
            "reset it or lower max_new_tokens",
        )
        words = find_unknown_words(self.processor.tokenizer, text.replace(placeholder, " "))
        if words:
            logger.warning("the model does not know these words: %s", list_words(words))
        return _Turn(messages, all_images, inputs)

    def _stream_turn(self, turn: _Turn) -> Iterator[str]:
        closing = find_closing_marks(self.processor, turn.inputs)[0]
        streamer = AnswerStreamer(self.processor.tokenizer, closing)
        is_stopped = threading.Event()
        errors: list[BaseException] = []

        def should_stop(ids: Any, _: Any, **kwargs: Any) -> Any:
            return torch.full((len(ids),), is_stopped.is_set(), device=ids.device)

        def generate() -> None:
            try:
                self.model.generate(
                    **turn.inputs,
                    generation_config=self.config,
                    streamer=streamer,
                    stopping_criteria=[should_stop],
                )
            except BaseException as error:  # the main thread raises it
                errors.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            for piece in streamer:
                if piece:
                    yield piece
        finally:
            is_stopped.set()
            thread.join()
            if not errors:
                self._remember(turn, streamer.read_answer())
        if errors:
            raise errors[0]

    def _remember(self, turn: _Turn, answer: Answer) -> None:
        self.messages = [*turn.messages, {"role": "assistant", "content": answer.text}]
        self.images = turn.images
        self.raw_answers = [*self.raw_answers, answer.raw]


def run_terminal(
    chat: Chat,
    images: Sequence[ImageSource | AudioSource],
    read: Callable[[], str],
    write: Callable[[str], None],
) -> None:
    """Hold a conversation in a terminal until its end.

    Args:
        chat: the conversation.
        images: images (or clips of sound) for the first question.
        read: returns the next line; EOFError or KeyboardInterrupt ends the conversation. A line is
            a question, or a command with a slash.
        write: prints text.
    """
    waiting = [open_medium(chat.processor, image) for image in images]
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                write(run_command(chat, line, waiting) + "\n")
            elif line:
                _write_answer(chat, line, waiting, write)
        except KeyboardInterrupt:
            write("\n(stopped)\n")
        except UserError as error:
            write(f"error: {error}\n")


def _write_answer(chat: Chat, question: str, waiting: list, write: Callable[[str], None]) -> None:
    with closing(chat.stream(question, *waiting)) as pieces:
        waiting.clear()
        for piece in pieces:
            write(piece)
    write("\n")


def run_command(chat: Chat, line: str, waiting: list) -> str:
    """Run a line with a slash and return its message.

    Args:
        chat: the conversation.
        line: the command and its argument.
        waiting: images or clips for the next question; the command may change them.

    Raises:
        UserError: There is no such command, its file cannot be read, or the model takes none.
    """
    name, _, argument = line.partition(" ")
    if name in ("/image", "/audio"):
        medium = name.removeprefix("/")
        check_medium(chat.processor, medium, f"the command {name}")
        waiting.append(open_medium(chat.processor, argument.strip()))
        noun = "clip" if medium == "audio" else medium
        return f"{len(waiting)} {noun}{'s' * (len(waiting) > 1)} for the next question"
    if name == "/reset":
        had_files = bool(chat.images or waiting)
        chat.reset()
        waiting.clear()
        medium = get_medium(chat.processor)
        gone = f", and its {medium} is gone; /{medium} PATH adds one" if had_files else ""
        return f"the conversation is empty{gone}"
    if name == "/history":
        return _format_history(chat) or "the conversation is empty"
    if name == "/help":
        return HELP
    commands = [row.split()[0] for row in HELP.splitlines()]
    raise UserError(
        f"there is no command {name}{nearest(name, commands)}; the commands are"
        f" {', '.join(commands)}"
    )


def _format_history(chat: Chat) -> str:
    placeholder = chat.processor.image_token
    lines = []
    for message in chat.messages:
        content = message["content"].replace(placeholder, f"[{get_medium(chat.processor)}]")
        lines.append(f"{message['role']}: {content}")
    return "\n".join(lines)
