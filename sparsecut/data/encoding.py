"""From a conversation to token ids and labels: which tokens a model is to learn.

The conversation is rendered and tokenised once, as a whole. Where the answers stand is known by characters: from the
template's own `{% generation %}` marks or, without these, from rendering the conversation up to each answer. Nothing is
ever tokenised in pieces, so a merge across a boundary cannot shift a label.
"""

from __future__ import annotations

import logging
import re

from ..prompts import (
    adds_special_tokens,
    apply_template,
    get_chat_template,
    get_prefix,
    is_fixed,
    takes_suffix,
)
from ..schema import UserError
from .errors import RecordError
from .examples import IMAGE, Example

IGNORED = -100  # the label of a token that is not learned
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
TOO_LONG = (
    "the record has {length} tokens, but the language model takes {limit}; set the stage's"
    " max_length to cut such records, or skip them (on_error: skip)"
)
logger = logging.getLogger(__name__)


def encode(
    example: Example, processor, template: str = "chat", *, max_length: int | None = None
) -> dict[str, list[int]]:
    """Token ids of a conversation, image tokens expanded, and their labels: -100 except in answers
    and the token that ends them.

    template: "chat" (the processor's chat template) or "plain" (pictures, caption, end token).
    max_length: longer ones are cut. Returns input_ids and labels of equal length; for processors of
    ours, which need no picture for that (a base's own: base_labels.py). Raises ValueError naming
    the record where there is nothing left to learn.
    """
    try:
        text, spans = TEMPLATES[template](example, processor)
        return _tokens(text, spans, processor, max_length)
    except UserError as error:
        raise RecordError(example.place, str(error)) from None


def written(
    example: Example, processor, template: str = "chat"
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, a placeholder for each picture, and what of it is learned, as
    spans of characters.

    Raises ValueError naming the record where it cannot be written.
    """
    try:
        _check_fast(processor.tokenizer)
        if template == "plain" and not is_fixed(processor):
            raise UserError(
                "template 'plain' leaves out the prompt format, which a model that is finished"
                " needs; use template: chat"
            )
        return (suffixed if takes_suffix(processor) else TEMPLATES[template])(example, processor)
    except UserError as error:
        raise RecordError(example.place, str(error)) from None


def chat(example: Example, processor) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and its answers as spans of characters, end-of-turn tokens
    included.
    """
    messages = [
        {**m, "content": m["content"].replace(IMAGE, processor.image_token)}
        for m in example.messages
    ]
    marked = bool(MARKED.search(get_chat_template(processor) or ""))
    text, spans = apply_template(processor, messages, marks=marked)
    spans = spans if marked else _spans(messages, text, processor)
    wanted = sum(m["role"] == "assistant" for m in messages)
    if len(spans) != wanted:
        raise UserError(
            f"the chat template marks {len(spans)} answers, but the conversation has {wanted}; put"
            " every assistant turn between {% generation %} and {% endgeneration %} in the"
            " template, or remove these marks from it"
        )
    special = processor.tokenizer.all_special_tokens
    if marked:
        spans = _from_prompts(messages, text, spans, processor)
    if not is_fixed(processor):
        spans = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
        text, spans = _ended(text, spans, processor.tokenizer.eos_token, special)
    ended = [_with_end(text, start, end, special) for start, end in spans]
    if not text[: ended[-1][1]].rstrip().endswith(tuple(special)):
        logger.warning_once(
            "the chat template ends answers without a special token: the model will not learn to"
            " stop"
        )
    return text, ended


def suffixed(example: Example, processor) -> tuple[str, list[tuple[int, int]]]:
    """A question and its answer, which the processor joins by itself; it also adds the end
    token.
    """
    *asked, answer = [
        {**m, "content": m["content"].replace(IMAGE, processor.image_token)}
        for m in example.messages
    ]
    prefix = get_prefix(processor, asked)
    return prefix + answer["content"].strip(), [
        (len(prefix), len(prefix) + len(answer["content"].strip()))
    ]


def plain(example: Example, processor) -> tuple[str, list[tuple[int, int]]]:
    """Stage-1 captions: placeholders, caption, end token; the human words are left out, as LLaVA's
    pre-training does.
    """
    answers = [m["content"] for m in example.messages if m["role"] == "assistant"]
    if len(answers) != 1:
        raise UserError(
            f"template 'plain' takes one caption, but the record has {len(answers)} answers; use"
            " template: chat"
        )
    prefix = processor.image_token * len(example.images)
    text = prefix + answers[0].strip() + _end_token(processor.tokenizer)
    return text, [(len(prefix), len(text))]


TEMPLATES = {"chat": chat, "plain": plain}


def _spans(messages, text: str, processor) -> list[tuple[int, int]]:
    """Each answer: what the template adds between asking for it and having it, without blanks at
    the end.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = apply_template(processor, messages[:i], add_generation_prompt=True)[0]
        after = text if i + 1 == len(messages) else apply_template(processor, messages[: i + 1])[0]
        if not (
            text.startswith(before) and text.startswith(after.rstrip()) and len(before) < len(after)
        ):
            raise UserError(
                f"the chat template writes turn {i} differently once more turns follow, so the"
                " answer cannot be found in the text; use a template with {% generation %} marks"
                " around assistant turns, or split the conversation"
            )
        spans.append((len(before), len(after.rstrip())))
    return spans


def _from_prompts(messages, text: str, spans, processor) -> list[tuple[int, int]]:
    """Marked spans, begun where the prompt ends: blanks that a template writes before its mark are
    the model's to say, too.
    """
    begun, answers = [], [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for i, (start, end) in zip(answers, spans, strict=True):
        before = apply_template(processor, messages[:i], add_generation_prompt=True)[0]
        fits = text.startswith(before) and text[len(before) : start].isspace()
        begun.append((len(before) if fits else start, end))
    return begun


def _ended(
    text: str, spans, end: str | None, special: list[str]
) -> tuple[str, list[tuple[int, int]]]:
    """The text with an end token after the last answer where a base's template (LLaVA-1.5's, for
    one) has none there.

    Without it a model that stops by itself would be taught not to; what stands before it is
    untouched.
    """
    stop = spans[-1][1]
    if end is None or text[stop:].strip() or text[:stop].endswith(tuple(special)):
        return text, spans
    return text[:stop] + end, spans


def _with_end(text: str, start: int, end: int, special: list[str]) -> tuple[int, int]:
    """The span together with a special token that follows it directly, so that the model learns to
    stop.
    """
    if text[start:end].rstrip().endswith(tuple(special)):
        return start, end
    following = max(
        (token for token in special if text.startswith(token, end)), key=len, default=""
    )
    return start, end + len(following)


def _tokens(text: str, spans, processor, max_length: int | None) -> dict[str, list[int]]:
    tokenizer = processor.tokenizer
    _check_fast(tokenizer)
    encoded = tokenizer(
        text, add_special_tokens=adds_special_tokens(processor, text), return_offsets_mapping=True
    )
    ids, labels, spans = [], [], iter(spans)
    first, last = next(spans)
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        while last <= start and last < len(text):
            first, last = next(spans, (len(text), len(text)))
        copies = processor.num_image_tokens if token == processor.image_token_id else 1
        # Some tokenizers give a blank no width; (0, 0) is a token that does not come from the text.
        learned = (
            (start < last and end > first) if start < end else first <= start < last and end > 0
        )
        ids += [token] * copies
        labels += [token if learned else IGNORED] * copies
    return _cut(ids, labels, processor, max_length)


def _cut(
    ids: list[int], labels: list[int], processor, max_length: int | None
) -> dict[str, list[int]]:
    check_length(ids, processor, max_length, None)
    ids, labels = ids[:max_length], labels[:max_length]
    check_learned(labels, len(ids), max_length)
    return {"input_ids": ids, "labels": labels}


def check_length(
    ids: list[int],
    processor,
    max_length: int | None,
    limit: int | None,
    max_images: int | None = None,
) -> None:
    """Raise ValueError where a cut would split a picture, a record is longer than the model takes,
    or has more image tokens than that.
    """
    image = [processor.image_token_id] if is_fixed(processor) else processor.image_token_ids
    if max_images is not None and (num := sum(token in image for token in ids)) > max_images:
        raise UserError(
            f"the record has {num} image tokens, but max_image_tokens={max_images}; raise it, or"
            " skip such records (on_error: skip)"
        )
    if limit is not None and min(len(ids), max_length or len(ids)) > limit:
        raise UserError(TOO_LONG.format(length=len(ids), limit=limit))
    if max_length is not None and len(ids) > max_length:
        kept, total = (sum(token in image for token in some) for some in (ids[:max_length], ids))
        if kept < total:
            raise UserError(
                f"the record has {len(ids)} tokens and max_length={max_length} would cut off image"
                f" tokens ({kept} of {total} left); raise max_length, shorten the text, or skip"
                " such records (on_error: skip)"
            )


def check_learned(labels: list[int], length: int, max_length: int | None) -> None:
    """Raise ValueError where all labels of a record are masked."""
    # The first position is never predicted, so its label does not count.
    if all(label == IGNORED for label in labels[1:]):
        raise UserError(
            f"no token of the {length} is left to learn: all labels are masked; "
            + (
                "raise max_length"
                if max_length is not None
                else "check the chat template and the answer"
            )
        )


def _check_fast(tokenizer) -> None:
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} does not say which characters a token"
            " covers, which finding the answers needs; load a fast one (AutoTokenizer with"
            " use_fast=True)"
        )


def _end_token(tokenizer) -> str:
    if tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has no end token (eos_token), so the model could not learn to stop;"
            " set one"
        )
    return tokenizer.eos_token
