"""Turn markers in texts: special tokens with which a text would end its own turn."""

from __future__ import annotations

from functools import lru_cache

from ..schema import UserError
from .rendering import TURN_PROBE, apply_template, get_chat_template

ROLES = ("user", "assistant", "user", "assistant")


def get_special_tokens(tokenizer) -> tuple[str, ...]:
    """Return the texts that a tokenizer reads as special tokens."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def check_markers(
    processor, messages: list[dict], *, ends_only: bool = False, place: str = ""
) -> None:
    """Raise UserError where a text of a user or system holds a turn marker of the chat template.

    The tokenizer reads a marker in a text as a marker. So the text would end its turn, and what
    follows would be read as another's.

    Args:
        processor: its template and tokenizer are used.
        messages: the conversation.
        ends_only: refuse only what ends a turn. Records may speak of the other markers.
        place: where the conversation stands, for the message.
    """
    begin = f"{place}: " if place else ""
    markers = find_markers(processor, ends_only=ends_only)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            continue
        for marker in markers:
            if marker in message["content"]:
                raise UserError(
                    f"{begin}turn {number} holds {marker}, which the model's chat template writes"
                    " between turns, so the model would see other turns; leave it out, or write it"
                    " in another way"
                )


def find_markers(processor, *, ends_only: bool = False) -> tuple[str, ...]:
    """Return the special tokens that a processor's chat template writes between turns.

    Args:
        processor: its template and tokenizer are used.
        ends_only: only those that come first after a turn.
    """
    template = get_chat_template(processor)
    if template is None:
        return ()
    messages = []
    for number, role in enumerate(ROLES):
        messages.append({"role": role, "content": TURN_PROBE.format(number)})
    try:
        text, _ = apply_template(processor, messages)
    except UserError:
        return ()
    return _split_markers(text, get_special_tokens(processor.tokenizer), ends_only)


@lru_cache(maxsize=64)
def _split_markers(text: str, special: tuple[str, ...], ends_only: bool) -> tuple[str, ...]:
    """The special tokens between the turns of a text: the first after each turn, or all."""
    markers = set()
    for number in range(len(ROLES) - 1):
        turn = TURN_PROBE.format(number)
        next_turn = TURN_PROBE.format(number + 1)
        gap = text[text.find(turn) + len(turn) : text.find(next_turn)]
        in_gap = [token for token in special if token in gap]
        in_gap.sort(key=lambda token: (gap.find(token), -len(token), token))
        markers.update(in_gap[:1] if ends_only else in_gap)
    return tuple(sorted(markers))
