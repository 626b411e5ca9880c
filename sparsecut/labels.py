"""From a conversation to token ids and labels: which tokens a model is to learn.

The conversation is rendered and tokenised once, as a whole. Where the answers stand is known by characters: from the
template's own `{% generation %}` marks or, without these, from rendering the conversation up to each answer. Nothing is
ever tokenised in pieces, so a merge across a boundary cannot shift a label.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from .records import IMAGE, Example

IGNORED = -100  # the label of a token that is not learned
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
logger = logging.getLogger(__name__)


def encode(
    example: Example, processor, template: str = "chat", *, max_length: int | None = None
) -> dict[str, list[int]]:
    """Token ids of a conversation, image tokens expanded, and their labels: -100 except in answers and the token that ends them.

    template: "chat" (the processor's chat template) or "plain" (pictures, caption, end token). max_length: longer ones are cut.
    Returns input_ids and labels of equal length. Raises ValueError naming the record where there is nothing left to learn.
    """
    try:
        text, spans = TEMPLATES[template](example, processor)
        return _tokens(text, spans, processor, max_length)
    except ValueError as error:
        raise ValueError(f"{example.source or example.id}: {error}") from None


def chat(example: Example, processor) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and its answers as spans of characters, end-of-turn tokens included."""
    messages = [{**m, "content": m["content"].replace(IMAGE, processor.image_token)} for m in example.messages]
    text, marks = _render(messages, processor)
    spans = marks if MARKED.search(processor.chat_template) else _spans(messages, text, processor)
    wanted = sum(m["role"] == "assistant" for m in messages)
    if len(spans) != wanted:
        raise ValueError(
            f"the chat template marks {len(spans)} answers, but the conversation has {wanted}; put every assistant turn between "
            "{% generation %} and {% endgeneration %} in the template, or remove these marks from it"
        )
    special = processor.tokenizer.all_special_tokens
    return text, [_with_end(text, start, end, special) for start, end in spans]


def plain(example: Example, processor) -> tuple[str, list[tuple[int, int]]]:
    """Stage-1 captions: placeholders, caption, end token; the human words are left out, as LLaVA's pre-training does."""
    answers = [m["content"] for m in example.messages if m["role"] == "assistant"]
    if len(answers) != 1:
        raise ValueError(
            f"template 'plain' takes one caption, but the record has {len(answers)} answers; use template: chat"
        )
    prefix = processor.image_token * len(example.images)
    text = prefix + answers[0].strip() + _end_token(processor.tokenizer)
    return text, [(len(prefix), len(text))]


TEMPLATES = {"chat": chat, "plain": plain}


def _render(messages, processor, add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as one string, and the spans that the template marks as generated."""
    special = processor.tokenizer.special_tokens_map
    turns = tuple(tuple(message.items()) for message in messages)
    frozen = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in special.items())
    return _rendered(turns, processor.chat_template, add_generation_prompt, frozen)


@lru_cache(maxsize=32768)  # a record is rendered to be checked and again to be learned, in a study by every run
def _rendered(turns: tuple, template: str, add_generation_prompt: bool, special: tuple):
    try:
        texts, marks = render_jinja_template(
            conversations=[[dict(turn) for turn in turns]],
            chat_template=template,
            return_assistant_tokens_mask=bool(MARKED.search(template)),
            add_generation_prompt=add_generation_prompt,
            **dict(special),
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from None
    return texts[0], marks[0] if marks else []


def _spans(messages, text: str, processor) -> list[tuple[int, int]]:
    """Each answer: what the template adds between asking for it and having it, without blanks at the end."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:i], processor, add_generation_prompt=True)[0]
        after = text if i + 1 == len(messages) else _render(messages[: i + 1], processor)[0]
        if not (text.startswith(before) and text.startswith(after.rstrip()) and len(before) < len(after)):
            raise ValueError(
                f"the chat template writes turn {i} differently once more turns follow, so the answer cannot be found in the text; "
                "use a template with {% generation %} marks around assistant turns, or split the conversation"
            )
        spans.append((len(before), len(after.rstrip())))
    return spans


def _with_end(text: str, start: int, end: int, special: list[str]) -> tuple[int, int]:
    """The span together with a special token that follows it directly, so that the model learns to stop."""
    if text[start:end].rstrip().endswith(tuple(special)):
        return start, end
    following = max((token for token in special if text.startswith(token, end)), key=len, default="")
    if not following:
        logger.warning_once("the chat template ends answers without a special token: the model will not learn to stop")
    return start, end + len(following)


def _tokens(text: str, spans, processor, max_length: int | None) -> dict[str, list[int]]:
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} does not say which characters a token covers, which finding the answers "
            "needs; load a fast one (AutoTokenizer with use_fast=True)"
        )
    # As the processor does at inference: a template that writes the first token itself gets no second one.
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids, labels, spans = [], [], iter(spans)
    first, last = next(spans)
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        while last <= start and last < len(text):
            first, last = next(spans, (len(text), len(text)))
        copies = processor.num_image_tokens if token == processor.image_token_id else 1
        # Some tokenizers give a blank no width; (0, 0) is a token that does not come from the text.
        learned = (start < last and end > first) if start < end else first <= start < last and end > 0
        ids += [token] * copies
        labels += [token if learned else IGNORED] * copies
    return _cut(ids, labels, processor, max_length)


def _cut(ids: list[int], labels: list[int], processor, max_length: int | None) -> dict[str, list[int]]:
    image = processor.image_token_id
    if max_length is not None and len(ids) > max_length:
        kept = sum(token == image for token in ids[:max_length])
        if kept < ids.count(image):
            raise ValueError(
                f"the record has {len(ids)} tokens and max_length={max_length} would cut off image tokens ({kept} of "
                f"{ids.count(image)} left); raise max_length, shorten the text, or skip such records (on_error: skip)"
            )
        ids, labels = ids[:max_length], labels[:max_length]
    # The first position is never predicted, so its label does not count.
    if all(label == IGNORED for label in labels[1:]):
        raise ValueError(
            f"no token of the {len(ids)} is left to learn: all labels are masked; "
            + ("raise max_length" if max_length is not None else "check the chat template and the answer")
        )
    return {"input_ids": ids, "labels": labels}


def _end_token(tokenizer) -> str:
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no end token (eos_token), so the model could not learn to stop; set one")
    return tokenizer.eos_token
