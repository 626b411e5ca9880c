"""Answers under way: how each row of a batch draws its next token, when it ends, and which part of
its text can be sent already.

Every row has its own temperature, random state, stop strings and length. So requests of any
settings share a batch, and what one of them draws does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chat_templates.thoughts import has_thought, may_begin_thought, read_answer

# What a tokenizer writes for the first bytes of a character whose other bytes are still missing.
INCOMPLETE_CHARACTER = "\ufffd"
MIN_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI writes this number
# Smaller ones would make infinite scores, and they draw the likeliest token all the same.
MIN_TEMPERATURE = 1e-6
MIN_TOP_P = 1e-6


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn and where it ends.

    Attributes:
        max_new_tokens: Tokens of the answer at most.
        temperature: 0 takes the likeliest token.
        top_p: Draw from the likeliest tokens that together reach this probability.
        seed: Seed of the random draws; None takes another one each time.
        stop: The answer ends before any of these texts.
        top_logprobs: How many other likely tokens are reported at each position; None reports no
            log-probabilities at all.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TextDelta:
    """Some more text of an answer.

    Attributes:
        index: Which of the request's answers it belongs to.
        text: The new text.
        tokens: The tokens of it with their log-probabilities, where the request wants these.
        finish_reason: In the last delta why the answer ended: "stop" or "length".
    """

    index: int
    text: str
    tokens: tuple[dict, ...] = ()
    finish_reason: str | None = None


class GenerationRow:
    """One answer being written: one row of a batch.

    Whitespace around the answer and thoughts before it are left out, as evaluation and chat do.

    Attributes:
        token_ids: Tokens drawn so far.
        text: Their text.
        finish_reason: Why the answer ended; None while it is being written.
        failure: The exception that ended the answer, if one did.
    """

    def __init__(
        self,
        index: int,
        sampling: SamplingParams,
        tokenizer,
        end_ids: set[int],
        on_delta: Callable[[TextDelta], None],
        *,
        closing: str | None = None,
    ):
        """
        Args:
            index: Which of the request's answers this is; it is added to the seed.
            sampling: How to draw.
            tokenizer: The model's tokenizer.
            end_ids: Tokens that end an answer.
            on_delta: Receives the text in pieces; the last one has a finish_reason.
            closing: What ends the thought that the prompt has opened; None where it has not.
        """
        self.closing = closing
        self.is_thoughtful = True if closing else None  # None until it is known
        self.index = index
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.on_delta = on_delta
        self.token_ids: list[int] = []
        self.text = ""
        self.num_forced = 0  # tokens given to the present run of `generate`
        self.num_sent = 0  # characters
        # Log-probabilities that are not sent yet, each with the place where its text begins.
        self.unsent_tokens: list[tuple[int, dict]] = []
        self.finish_reason: str | None = None
        self.failure: Exception | None = None
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((sampling.seed + index) % 2**63)

    @property
    def is_whole(self) -> bool:
        """Whether all of the answer is written and sent."""
        return self.finish_reason in ("stop", "length")

    def choose(self, scores: Tensor) -> int:
        """Draw the next token and append it to the answer.

        After a restart, the tokens drawn before come first, once more.

        Args:
            scores: Scores of all tokens, [V].
        """
        self.num_forced += 1
        if self.num_forced <= len(self.token_ids):
            return self.token_ids[self.num_forced - 1]
        token = self._draw(scores)
        if token not in self.end_ids and self.sampling.top_logprobs is not None:
            logprobs = torch.log_softmax(scores.float(), -1).cpu()
            self.unsent_tokens.append((len(self.text), self._describe_token(token, logprobs)))
        self._append(token)
        return token

    def _draw(self, scores: Tensor) -> int:
        if not torch.isfinite(scores.max()):
            raise ArithmeticError("the model gave scores that are not finite")
        if self.sampling.temperature == 0:
            return int(scores.argmax())
        scores = scores.float().cpu()
        temperature = max(self.sampling.temperature, MIN_TEMPERATURE)
        probabilities = torch.softmax(scores / temperature, -1)
        if self.sampling.top_p < 1:
            probabilities = self._keep_top_p(probabilities)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def _keep_top_p(self, probabilities: Tensor) -> Tensor:
        """A token stays while those before it have not reached top_p."""
        ordered, indices = probabilities.sort(descending=True, stable=True)
        sum_before = ordered.cumsum(-1) - ordered
        top_p = max(self.sampling.top_p, MIN_TOP_P)
        ordered = ordered.masked_fill(sum_before >= top_p, 0)
        return torch.zeros_like(probabilities).scatter_(0, indices, ordered)

    def _describe_token(self, token: int, logprobs: Tensor) -> dict:
        """The token and the likeliest other ones, as OpenAI's clients read them."""
        entry = self._format_logprob(token, logprobs[token].item())
        entry["top_logprobs"] = []
        if self.sampling.top_logprobs:
            best = logprobs.topk(min(self.sampling.top_logprobs, len(logprobs)))
            for other, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                entry["top_logprobs"].append(self._format_logprob(other, value))
        return entry

    def _format_logprob(self, token: int, logprob: float) -> dict:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(text.encode())}

    def _append(self, token: int) -> None:
        self.token_ids.append(token)
        reason = None
        if token in self.end_ids:
            reason = "stop"
        elif len(self.token_ids) >= self.sampling.max_new_tokens:
            reason = "length"
        self.text = self._read_text(is_last=reason is not None)
        places = [self.text.find(stop) for stop in self.sampling.stop]
        places = [place for place in places if place >= 0]
        if places:
            self.text = self.text[: min(places)]
            reason = "stop"
        if reason is None:
            self._send_ready_text()
        else:
            self._finish(reason)

    def _read_text(self, is_last: bool) -> str:
        """The text so far; "" while it is, or may be, a thought."""
        if self.is_thoughtful is None:
            begin = self.tokenizer.decode(self.token_ids)
            if has_thought(begin):
                self.is_thoughtful = True
            elif is_last or not may_begin_thought(begin):
                self.is_thoughtful = False
            else:
                return ""
        if not self.is_thoughtful:
            return self.tokenizer.decode(self.token_ids, skip_special_tokens=True).lstrip()
        text = read_answer(self.tokenizer, self.token_ids, self.closing).text
        if not is_last and may_begin_thought(text):
            text = ""
        if not text:
            self.unsent_tokens = []  # log-probabilities are of the answer alone
        return text

    def _send_ready_text(self) -> None:
        end = self._find_ready_end()
        if end > self.num_sent:
            text = self.text[self.num_sent : end]
            self.num_sent = end
            self.on_delta(TextDelta(self.index, text, self._take_tokens_before(end)))

    def _find_ready_end(self) -> int:
        """How many characters are sure: no outer whitespace, no half character, nothing that may
        become a stop string.
        """
        ready = self.text.rstrip(INCOMPLETE_CHARACTER)
        num_held_back = 0
        for stop in self.sampling.stop:
            for length in range(1, len(stop)):
                if self.text.endswith(stop[:length]):
                    num_held_back = max(num_held_back, length)
        ready = ready[: len(self.text) - num_held_back]
        return len(ready.rstrip())  # what is held back may be dropped, and then this is the end

    def _take_tokens_before(self, end: int) -> tuple[dict, ...]:
        """The unsent tokens whose text begins before a place; they count as sent."""
        taken = tuple(entry for start, entry in self.unsent_tokens if start < end)
        self.unsent_tokens = [(start, entry) for start, entry in self.unsent_tokens if start >= end]
        return taken

    def _finish(self, reason: str) -> None:
        is_cut = reason == "stop" and self.token_ids[-1] not in self.end_ids
        end = len(self.text)
        if not is_cut:
            end += 1  # also tokens without text after the last character
        tokens = self._take_tokens_before(end)
        self.text = self.text.rstrip()
        self.finish_reason = reason
        rest = self.text[self.num_sent :]
        self.on_delta(TextDelta(self.index, rest, tokens, reason))

    def abandon(self) -> None:
        """End the answer where it is, because nobody reads it any more."""
        if self.finish_reason is None:
            self.finish_reason = "abandoned"

    def fail(self, error: Exception) -> None:
        """End the answer by an exception."""
        self.failure = error
        self.finish_reason = "failed"

    def restart(self) -> None:
        """Prepare for another run of `generate`, which continues after what is written."""
        self.num_forced = 0


class PerRowSampler:
    """Lets every row of a batch draw its own tokens inside `generate`.

    `choose` is a logits processor, `find_ended` a stopping criterion.
    """

    def __init__(self, rows: list[GenerationRow], is_wanted: Callable[[int], bool]):
        """
        Args:
            rows: The rows of the batch.
            is_wanted: Whether somebody still reads the row of this number.
        """
        self.rows = rows
        self.is_wanted = is_wanted

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] under which the likeliest token of every row is the one it has drawn."""
        forced = torch.full_like(scores, torch.finfo(scores.dtype).min)
        for i, row in enumerate(self.rows):
            forced[i, self._choose(row, scores[i])] = 0
        return forced

    def _choose(self, row: GenerationRow, scores: Tensor) -> int:
        """A row's next token; a failure ends this row alone."""
        if row.finish_reason is not None:
            return 0
        try:
            return row.choose(scores)
        except Exception as error:  # sent to the row's client
            row.fail(error)
            return 0

    def find_ended(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        """Which rows have ended, booleans [B]."""
        for i, row in enumerate(self.rows):
            if not self.is_wanted(i):
                row.abandon()
        ended = [row.finish_reason is not None for row in self.rows]
        return torch.tensor(ended, device=input_ids.device)


def join_deltas(deltas: Sequence[TextDelta], num_answers: int) -> list[TextDelta]:
    """One delta per answer, in order, with its whole text and all its tokens."""
    answers = []
    for index in range(num_answers):
        parts = [delta for delta in deltas if delta.index == index]
        if not parts:
            continue
        text = "".join(part.text for part in parts)
        tokens = tuple(token for part in parts for token in part.tokens)
        answers.append(TextDelta(index, text, tokens, parts[-1].finish_reason))
    return answers
