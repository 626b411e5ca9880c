"""An answer shown while it is written, without the thoughts before it."""

from __future__ import annotations

from transformers import TextIteratorStreamer

from .thoughts import INCOMPLETE_CHARACTER, Answer, has_thought, may_begin_thought, read_answer


class AnswerStreamer(TextIteratorStreamer):
    """Streams the text of an answer from `generate`, without the thoughts before it."""

    def __init__(self, tokenizer, closing: str | None = None):
        """
        Args:
            tokenizer: The model's tokenizer.
            closing: What `find_open_thought` found in the prompt.
        """
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.closing = closing
        self.token_ids: list[int] = []
        self.held: list | None = []  # tokens that may begin a thought; None once that is known
        self.has_thought = closing is not None
        self.shown = ""  # of an answer after a thought
        self.is_prompt = True

    def put(self, value) -> None:
        """Take the next token, or first of all the prompt."""
        if self.is_prompt:
            self.is_prompt = False
            super().put(value)
            return
        self.token_ids += value.flatten().tolist()
        if self.has_thought:
            self._show_growth()
        elif self.held is None:
            super().put(value)
        else:
            self.held.append(value)
            self._decide()

    def _decide(self) -> None:
        """Tell an answer from the beginning of a thought, if the text is long enough."""
        text = self.tokenizer.decode(self.token_ids)
        if has_thought(text):
            self.has_thought = True
            self._show_growth()
        elif not may_begin_thought(text):
            self._release()

    def _release(self) -> None:
        for value in self.held or []:
            super().put(value)
        self.held = None

    def _show_growth(self) -> None:
        text = self.read_answer().text
        is_sure = not may_begin_thought(text) and not text.endswith(INCOMPLETE_CHARACTER)
        if is_sure and len(text) > len(self.shown):
            self.on_finalized_text(text[len(self.shown) :])
            self.shown = text

    def end(self) -> None:
        """Stream the rest."""
        if self.has_thought:
            self.on_finalized_text(self.read_answer().text[len(self.shown) :])
        else:
            self._release()
        super().end()

    def read_answer(self) -> Answer:
        """Return all that was streamed, and the thoughts before it."""
        return read_answer(self.tokenizer, self.token_ids, self.closing)
