"""Answers under way: how each row of a batch chooses its next token, when it ends, and what of it
can be told already.

Every row has its own temperature, random state, stop strings and length, so that requests of any settings share a batch, and
what one of them draws does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# what a tokenizer writes for the first bytes of a character whose others are to come
UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn and where it ends; temperature 0 takes the likeliest token.
    top_logprobs: None for none at all.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TextDelta:
    """Some more of an answer's text, the tokens it is made of where these are asked for, and at the
    end the reason.
    """

    index: int
    text: str
    tokens: tuple[dict, ...] = ()
    finish_reason: str | None = None


class GenerationRow:
    """One answer being written; `on_delta` receives its text in pieces, the last one with a
    finish_reason.

    Outer blanks are left out, as evaluation and chat do, so that the pieces together are what those
    would show.
    """

    def __init__(
        self,
        index: int,
        sampling: SamplingParams,
        tokenizer,
        ends: set[int],
        on_delta: Callable[[TextDelta], None],
    ):
        self.index, self.sampling, self.tokenizer, self.ends, self.on_delta = (
            index,
            sampling,
            tokenizer,
            ends,
            on_delta,
        )
        self.ids: list[int] = []
        self.text, self.sent = "", 0
        self.tokens: list[
            tuple[int, dict]
        ] = []  # not told yet, each with the place in the text where it begins
        self.finish_reason: str | None = None
        self.chance = torch.Generator()
        if sampling.seed is None:
            self.chance.seed()
        else:
            self.chance.manual_seed((sampling.seed + index) % 2**63)

    def choose(self, scores: Tensor) -> int:
        """The next token by its scores [V], which is taken into the answer."""
        s = self.sampling
        token = int(scores.argmax()) if s.temperature == 0 else self._draw(scores.float().cpu())
        if token not in self.ends and s.top_logprobs is not None:
            self.tokens.append(
                (len(self.text), self._told(token, torch.log_softmax(scores.float(), -1).cpu()))
            )
        self._take(token)
        return token

    def _draw(self, scores: Tensor) -> int:
        shares = torch.softmax(scores / self.sampling.temperature, -1)
        if self.sampling.top_p < 1:
            ordered, places = shares.sort(descending=True, stable=True)
            before = (
                ordered.cumsum(-1) - ordered
            )  # a token stays while those before it have not reached top_p
            shares = torch.zeros_like(shares).scatter_(
                0, places, ordered.masked_fill(before >= self.sampling.top_p, 0)
            )
        return int(torch.multinomial(shares, 1, generator=self.chance))

    def _told(self, token: int, logprobs: Tensor) -> dict:
        best = (
            logprobs.topk(min(self.sampling.top_logprobs, len(logprobs)))
            if self.sampling.top_logprobs
            else None
        )
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
        return {
            **self._named(token, logprobs[token].item()),
            "top_logprobs": [self._named(other, value) for other, value in top],
        }

    def _named(self, token: int, value: float) -> dict:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": max(value, -9999.0), "bytes": list(text.encode())}

    def _take(self, token: int) -> None:
        self.ids.append(token)
        full = len(self.ids) >= self.sampling.max_new_tokens
        reason = "stop" if token in self.ends else "length" if full else None
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        cuts = [place for s in self.sampling.stop if (place := self.text.find(s)) >= 0]
        if cuts:
            self.text, reason = self.text[: min(cuts)], "stop"
        if reason is not None:
            self._finish(reason)
            return
        ready = self._ready()
        if ready > self.sent:
            piece = self.text[self.sent : ready]
            self.sent = ready
            self.on_delta(TextDelta(self.index, piece, self._tokens_before(ready)))

    def _ready(self) -> int:
        """How much of the text is sure: not outer blanks, half a character, or what may become a
        stop string.
        """
        text = self.text.rstrip(UNFINISHED).rstrip()
        held = [
            n for s in self.sampling.stop for n in range(1, len(s)) if self.text.endswith(s[:n])
        ]
        return min(len(text), len(self.text) - max(held, default=0))

    def _tokens_before(self, end: int) -> tuple[dict, ...]:
        told = tuple(entry for start, entry in self.tokens if start < end)
        self.tokens = [(start, entry) for start, entry in self.tokens if start >= end]
        return told

    def _finish(self, reason: str) -> None:
        cut = reason == "stop" and (not self.ids or self.ids[-1] not in self.ends)
        tokens = self._tokens_before(len(self.text) if cut else len(self.text) + 1)
        self.text, self.finish_reason = self.text.rstrip(), reason
        self.on_delta(TextDelta(self.index, self.text[self.sent :], tokens, reason))

    def abandon(self) -> None:
        """End it where it is: nobody reads it any more."""
        self.finish_reason = self.finish_reason or "abandoned"


class PerRowSampler:
    """For `generate`: as a logits processor it lets every row choose its token, as a stopping
    criterion it ends rows.

    is_wanted(row) says whether somebody still reads that row.
    """

    def __init__(self, answers: list[GenerationRow], is_wanted: Callable[[int], bool]):
        self.answers, self.is_wanted = answers, is_wanted

    def choose(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] under which the likeliest token of every row is the one that it has
        chosen.
        """
        forced = torch.full_like(scores, torch.finfo(scores.dtype).min)
        for row, answer in enumerate(self.answers):
            token = 0 if answer.finish_reason else answer.choose(scores[row])
            forced[row, token] = 0
        return forced

    def ended(self, ids: Tensor, scores, **kwargs) -> Tensor:
        """Which rows have ended, [B]."""
        for row, answer in enumerate(self.answers):
            if not answer.finish_reason and not self.is_wanted(row):
                answer.abandon()
        return torch.tensor(
            [answer.finish_reason is not None for answer in self.answers], device=ids.device
        )


def joined(pieces: Sequence[TextDelta], num_answers: int) -> list[TextDelta]:
    """One Piece per choice, in order, of all its pieces."""
    of = [[piece for piece in pieces if piece.index == i] for i in range(num_answers)]
    return [
        TextDelta(
            i,
            "".join(p.text for p in one),
            tuple(t for p in one for t in p.tokens),
            one[-1].finish_reason,
        )
        for i, one in enumerate(of)
        if one
    ]
