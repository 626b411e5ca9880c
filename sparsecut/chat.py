"""A conversation with a model: from Python, and line by line in a terminal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image
from transformers import TextIteratorStreamer

from .imaging import upright
from .prompts import check_length, decode_answers, make_greedy_config, prepare_inputs, render_prompt
from .schema import UserError, nearest

Picture = Image.Image | str | Path

HELP = """\
/image PATH   show a picture with the next question (again for several)
/history      what was said so far
/reset        forget it, pictures too
/help         these lines
/quit         leave (Ctrl-D and Ctrl-C too; during an answer Ctrl-C only stops the answer)"""


class Chat:
    """A conversation that remembers its turns and pictures.

    max_new_tokens: longest answer. temperature: 0 takes the likeliest token, more draws at random.
    Other keywords are those of `generate`. messages: the turns so far, [{"role", "content"}] with
    one placeholder per picture of `pictures`.
    """

    def __init__(
        self, model, processor, *, max_new_tokens: int = 256, temperature: float = 0.0, **generation
    ):
        if max_new_tokens < 1 or temperature < 0:
            raise UserError(
                f"max_new_tokens is {max_new_tokens} and temperature {temperature}, but they must"
                " be at least 1 and 0; temperature 0 is without chance"
            )
        self.model, self.processor = model, processor
        self.config = make_greedy_config(model, max_new_tokens)
        if temperature:
            self.config.update(do_sample=True, temperature=temperature)
        if unknown := self.config.update(**generation):
            name = next(iter(unknown))
            raise UserError(
                f"generate has no setting {name!r}{nearest(name, self.config.to_dict())}; see"
                " GenerationConfig"
            )
        self.reset()

    def reset(self) -> None:
        """Forget all turns and pictures."""
        self.messages: list[dict[str, str]] = []
        self.pictures: list[Image.Image] = []

    def ask(self, text: str, *pictures: Picture) -> str:
        """The answer to a question about these pictures (files or PIL) and all that was said
        before.
        """
        messages, shown, inputs = self._prepare(text, pictures)
        ids = self.model.generate(**inputs, generation_config=self.config)
        answer = decode_answers(self.processor, inputs, ids)[0]
        self._remember(messages, shown, answer)
        return answer

    def stream(self, text: str, *pictures: Picture) -> Iterator[str]:
        """As `ask`, but in pieces as they come; closing the iterator stops the answer, which is
        remembered as far as it got.
        """
        if self.config.num_beams and self.config.num_beams > 1:
            raise UserError(
                f"an answer of {self.config.num_beams} beams is known only at its end; use ask, or"
                " num_beams=1"
            )
        return self._pieces(*self._prepare(text, pictures))

    def _prepare(self, text: str, pictures: Sequence[Picture]):
        """The turns with the new one, all pictures, and the model's inputs; nothing is remembered
        yet.
        """
        token, count = self.processor.image_token, text.count(self.processor.image_token)
        if not text.replace(token, "").strip():
            raise UserError("the question is empty; write some text")
        if count not in (0, len(pictures)):
            raise UserError(
                f"the question has {count} {token} but {len(pictures)} pictures were given; write"
                f" one {token} where each picture stands, or none, and the pictures come first"
            )
        shown = [*self.pictures, *map(open_picture, pictures)]
        question = text if count else f"{token}\n" * len(pictures) + text
        messages = [*self.messages, {"role": "user", "content": question}]
        inputs = prepare_inputs(
            self.model, self.processor, [render_prompt(self.processor, messages)], [shown]
        )
        length = inputs["input_ids"].shape[1]
        check_length(
            self.model,
            length,
            self.config.max_new_tokens,
            "the conversation",
            "reset it or lower max_new_tokens",
        )
        return messages, shown, inputs

    def _pieces(self, messages, shown, inputs) -> Iterator[str]:
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        stopped, failures, answer = threading.Event(), [], ""

        def stop(ids, _, **kwargs):
            return torch.full((len(ids),), stopped.is_set(), device=ids.device)

        def work():
            try:
                settings = {
                    "generation_config": self.config,
                    "streamer": streamer,
                    "stopping_criteria": [stop],
                }
                self.model.generate(**inputs, **settings)
            except BaseException as error:
                failures.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            for piece in streamer:
                answer += piece
                if piece:
                    yield piece
        finally:
            stopped.set()
            thread.join()
            if not failures:
                self._remember(messages, shown, answer.strip())
        if failures:
            raise failures[0]

    def _remember(self, messages, shown, answer: str) -> None:
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.pictures = shown


def open_picture(picture: Picture) -> Image.Image:
    """A picture as it is, or from a file; ValueError where that is missing or no picture."""
    if isinstance(picture, Image.Image):
        return picture
    path = Path(picture).expanduser()
    if not path.is_file():
        raise UserError(f"there is no picture {picture}; give the path of an image file")
    try:
        return upright(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{picture} is not a picture that can be read ({error}); give a PNG or JPEG file"
        ) from None


def converse(
    chat: Chat, pictures: Sequence[Picture], read: Callable[[], str], write: Callable[[str], None]
) -> None:
    """Questions from `read` (EOFError ends it), answers to `write`, commands with a slash;
    `pictures` go with the first one.
    """
    waiting: list[Picture] = [open_picture(picture) for picture in pictures]
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if line == "/quit":
                return
            if line.startswith("/"):
                write(command(chat, line, waiting) + "\n")
            elif line:
                with closing(chat.stream(line, *waiting)) as pieces:
                    waiting = []
                    for piece in pieces:
                        write(piece)
                write("\n")
        except KeyboardInterrupt:
            write("\n(stopped)\n")
        except ValueError as error:
            write(f"error: {error}\n")


def command(chat: Chat, line: str, waiting: list[Picture]) -> str:
    """What a line with a slash does, and the words about it; `waiting` are the pictures for the
    next question.
    """
    name, _, argument = line.partition(" ")
    if name == "/image":
        waiting.append(open_picture(argument.strip()))
        return f"{len(waiting)} picture{'s' * (len(waiting) > 1)} for the next question"
    if name == "/reset":
        chat.reset()
        waiting.clear()
        return "forgotten"
    if name == "/history":
        turns = [
            f"{m['role']}: {m['content'].replace(chat.processor.image_token, '[picture]')}"
            for m in chat.messages
        ]
        return "\n".join(turns) or "nothing was said yet"
    if name == "/help":
        return HELP
    commands = [row.split()[0] for row in HELP.splitlines()]
    raise UserError(
        f"{name} is not a command{nearest(name, commands)}; there are {', '.join(commands)}"
    )
