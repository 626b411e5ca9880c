"""Words that a tokenizer does not know: it writes one and the same token for all of them."""

from __future__ import annotations

PROBE = "ꙮ 𒀱 ᚠᛇᚻ qxzjvwq"  # no vocabulary has all of them; byte-level ones write them as bytes
MOST_SHOWN = 5


def get_unknown_id(tokenizer) -> int | None:
    """Return the token that stands for unknown text; None where any text can be written.

    Byte-level tokenizers often name such a token, and never use it.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return None
    return unknown if unknown in tokenizer(PROBE, add_special_tokens=False)["input_ids"] else None


def find_unknown_spans(tokenizer, text: str, unknown: int) -> list[tuple[int, int]]:
    """Return the characters of a text that the tokenizer does not know, as (first, after last).

    Some tokenizers have one token for unknown text and for the end. So special tokens that the text
    itself spells out are left out.

    Args:
        tokenizer: A fast tokenizer.
        text: The text.
        unknown: What `get_unknown_id` returned.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    special = {"", *tokenizer.all_special_tokens}
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [
        (start, end)
        for token, (start, end) in pairs
        if token == unknown and text[start:end].strip() not in special
    ]


def find_unknown_words(tokenizer, text: str) -> list[str]:
    """Return the words of a text that the tokenizer does not know, each once, in order."""
    unknown = get_unknown_id(tokenizer)
    if unknown is None or not getattr(tokenizer, "is_fast", False):
        return []
    words = dict.fromkeys(text.split())
    return [word for word in words if find_unknown_spans(tokenizer, word, unknown)]


def list_words(words: list[str]) -> str:
    """Return the first words in quotes for a message, and how many more there are."""
    shown = ", ".join(repr(word[:40]) for word in words[:MOST_SHOWN])
    more = len(words) - MOST_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
