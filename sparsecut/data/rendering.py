"""The text of a conversation, and which of its characters are targets.

A conversation is rendered once, as a whole. The answers are found by their characters: from the
chat template's own `{% generation %}` marks or, without these, from rendering the conversation up
to each answer. Text is never tokenized in pieces. So a merge across a boundary shifts no label.
"""

from __future__ import annotations

import json
import logging
import re
from functools import partial
from typing import NamedTuple

from ..chat_templates.arguments import find_agreeing_arguments
from ..chat_templates.markers import check_markers
from ..chat_templates.rendering import (
    apply_template,
    freeze_special_tokens,
    get_chat_template,
    get_tokens_per_image,
)
from ..chat_templates.thoughts import (
    MARKS,
    drop_tokens,
    find_open_thought,
    has_thought,
    read_written,
    strip_thoughts,
)
from ..prompts import check_medium, get_prefix, takes_suffix
from ..schema import UserError
from .alike_conversations import find_alike
from .examples import Example

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "answerprobe"
MOST_RENDERED = 32_768  # conversations that are kept, some 50 MB
RENDERED: dict[tuple, Rendered] = {}
logger = logging.getLogger(__name__)

Span = tuple[int, int]


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: The text, with one placeholder for each image.
        spans: The characters that are targets, as (first, one after the last), in order.
    """

    text: str
    spans: list[Span]


def render_example(example: Example, processor, template: str, *, add_end_token: bool) -> Rendered:
    """Render an example for training.

    Args:
        example: The conversation.
        processor: Its chat template, placeholder and tokenizer are used.
        template: "chat" for the chat template, "plain" for images, caption and end token.
        add_end_token: Write an end token after the last answer where the chat template has none.

    Raises:
        UserError: The conversation cannot be rendered.
    """
    check_fast_tokenizer(processor.tokenizer)
    if example.images:
        check_medium(processor, example.medium, "the record")
    if template == "plain":
        return _render_plain(example, processor)
    if takes_suffix(processor):
        return _render_suffix(example, processor)
    return _render_once(example, processor, add_end_token)


def _render_once(example: Example, processor, add_end_token: bool) -> Rendered:
    """`_render_chat`, or what it gave for the same conversation and template before.

    A record is rendered when it is checked and when it is encoded, in a study once per run.
    """
    messages = example.get_messages(processor.image_token)
    check_markers(processor, messages, ends_only=True)
    key = (
        tuple(tuple(message.items()) for message in messages),
        get_chat_template(processor),
        freeze_special_tokens(processor.tokenizer),
        tuple(processor.tokenizer.all_special_tokens),
        processor.image_token,
        get_tokens_per_image(processor) is None,
        add_end_token,
    )
    if key not in RENDERED:
        rendered = _render_chat(messages, processor, add_end_token=add_end_token)
        if len(RENDERED) >= MOST_RENDERED:
            RENDERED.clear()
        RENDERED[key] = rendered
    return RENDERED[key]


def check_fast_tokenizer(tokenizer) -> None:
    """Raise UserError where the tokenizer cannot tell which characters a token covers."""
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} does not say which characters a token"
            " covers, which finding the answers needs; load a fast one (AutoTokenizer with"
            " use_fast=True)"
        )


def _render_plain(example: Example, processor) -> Rendered:
    """Stage-1 captions, as in LLaVA's pre-training: the human's words are left out."""
    answers = [m["content"] for m in example.messages if m["role"] == "assistant"]
    if len(answers) != 1:
        raise UserError(
            f"template 'plain' takes one caption, but the record has {len(answers)} answers; use"
            " template: chat"
        )
    end_token = processor.tokenizer.eos_token
    if end_token is None:
        raise UserError(
            "the tokenizer has no end token (eos_token), so the model could not learn to stop;"
            " set one"
        )
    prefix = processor.image_token * len(example.images)
    text = prefix + answers[0].strip() + end_token
    return Rendered(text, [(len(prefix), len(text))])


def _render_suffix(example: Example, processor) -> Rendered:
    """A question and its answer; the processor joins them and adds the end token itself."""
    *question, answer = example.get_messages(processor.image_token)
    prefix = get_prefix(processor, question)
    text = prefix + answer["content"].strip()
    return Rendered(text, [(len(prefix), len(text))])


def _render_chat(messages: list[dict], processor, *, add_end_token: bool) -> Rendered:
    special = tuple(processor.tokenizer.all_special_tokens)
    find = partial(_find_spans, processor=processor)
    text, spans = find_alike(messages, processor, find) or find(messages)
    _check_answers(text, spans, messages)
    _check_last_answer(text, spans[-1], messages, processor)
    if add_end_token:
        spans = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
        text = _add_end_token(text, spans[-1][1], processor.tokenizer.eos_token, special)
    spans = [_include_end_token(span, text, special) for span in spans]
    if not text[: spans[-1][1]].rstrip().endswith(special):
        logger.warning_once(
            "the chat template ends answers without a special token: the model will not learn to"
            " stop"
        )
    return Rendered(text, spans)


def _find_spans(messages: list[dict], processor) -> tuple[str, list[Span]]:
    """The text of a conversation, and each answer as the model must write it."""
    has_marks = GENERATION_MARK.search(get_chat_template(processor) or "") is not None
    text, spans = apply_template(processor, messages, marks=has_marks)
    if has_marks and len(spans) <= len(_list_answers(messages)):
        _check_marks(spans, messages)
        return text, _extend_to_prompts(spans, text, messages, processor)
    # Some templates mark the parts of an answer, such as its end, one by one.
    return text, _find_answers(text, messages, processor)


def _check_marks(spans: list[Span], messages: list[dict]) -> None:
    num_answers = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != num_answers:
        raise UserError(
            f"the chat template marks {len(spans)} answers, but the conversation has"
            f" {num_answers}; put every assistant turn between {{% generation %}} and"
            " {% endgeneration %} in the template, or remove these marks from it"
        )


def _list_answers(messages: list[dict]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _extend_to_prompts(spans: list[Span], text: str, messages: list[dict], processor) -> list[Span]:
    """Begin marked spans where the prompt ends.

    The model must also write what a template puts between the prompt and its mark, such as
    whitespace or an empty thought. It need not write what the prompt holds already.
    """
    extended = []
    answers = _list_answers(messages)
    for i, (start, end) in zip(answers, spans, strict=True):
        is_last = i == answers[-1]  # `_check_last_answer` asks for that prompt again
        prompt, _ = apply_template(
            processor, messages[:i], add_generation_prompt=True, cached=is_last
        )
        fits = text.startswith(prompt)
        if is_last and _is_other_thought(prompt, text, fits):
            raise _build_prompt_error(prompt, text, messages, processor)
        if fits and len(prompt) < end:
            start = len(prompt)
        extended.append((start, end))
    return extended


def _find_answers(text: str, messages: list[dict], processor) -> list[Span]:
    """Each answer: what follows its prompt, without whitespace at the end."""
    spans = []
    answers = _list_answers(messages)
    for i in answers:
        before, _ = apply_template(processor, messages[:i], add_generation_prompt=True)
        after = text
        if i != answers[-1]:
            after, _ = apply_template(processor, messages[: i + 1])
        fits = text.startswith(before) and text.startswith(after.rstrip())
        fits = fits and len(after) > len(before)
        if i == answers[-1] and (not fits or _is_other_thought(before, text, fits)):
            raise _build_prompt_error(before, text, messages, processor)
        if fits:
            spans.append((len(before), len(after.rstrip())))
        else:
            spans.append(_find_earlier_answer(text, messages, i, before, processor))
    return spans


def _find_earlier_answer(
    text: str, messages: list[dict], number: int, prompt: str, processor
) -> Span:
    """An answer that the template writes in another way once more turns follow.

    Many templates drop the thought of an earlier answer, or end it by another token. The place of
    the answer is that of a probe which stands for it.
    """
    probed = [dict(message) for message in messages]
    probed[number]["content"] = PROBE
    with_probe, _ = apply_template(processor, probed)
    before, _, after = with_probe.partition(PROBE)
    start, end = len(before), len(text) - len(after)
    answer = strip_thoughts(messages[number]["content"])
    fits = text.startswith(before) and text.endswith(after) and start < end
    if with_probe.count(PROBE) != 1 or not fits or text[start:end].strip() != answer:
        raise UserError(
            f"the chat template writes turn {number} differently once more turns follow, so the"
            " answer cannot be found in the text; use a template with {% generation %} marks"
            " around assistant turns, or split the conversation"
        )
    if text.startswith(prompt) and len(prompt) < start:
        between = text[len(prompt) : start]
        start = len(prompt) if between.isspace() or has_thought(between) else start
    return start, start + len(text[start:end].rstrip())


def _check_answers(text: str, spans: list[Span], messages: list[dict]) -> None:
    """Raise UserError where the template has changed what an answer says.

    It may change whitespace, and drop thoughts of answers before the last one.
    """
    answers = _list_answers(messages)
    for i, (start, end) in zip(answers, spans, strict=True):
        content = messages[i]["content"]
        written = "".join(text[start:end].split())
        unopened = _drop_opened_mark(content, text[:start])
        if "".join(unopened.split()) in written:
            continue
        is_kept = "".join(strip_thoughts(content).split()) in written
        if is_kept and i != answers[-1]:
            logger.warning_once(
                "the chat template drops the thoughts of all answers but the last one of a"
                " conversation: the model does not learn these"
            )
            continue
        what = "the thought of the answer" if is_kept else "the answer"
        raise UserError(
            f"the chat template leaves out or changes {what} in turn {i}, so it would not be"
            " learned as it stands; change the record, or set another processor.chat_template"
        )


def _drop_opened_mark(answer: str, prompt: str) -> str:
    """An answer without the mark that begins its thought where the prompt ends with that mark."""
    answer = answer.lstrip()
    for begin, _ in MARKS:
        if answer.startswith(begin) and prompt.rstrip().endswith(begin):
            return answer.removeprefix(begin)
    return answer


def _check_last_answer(text: str, span: Span, messages: list[dict], processor) -> None:
    """Raise UserError where a model that has learned the last answer would not be right with it.

    What the template writes around an answer, and the prompt does not hold, becomes part of it.
    """
    prompt, _ = apply_template(processor, messages[:-1], add_generation_prompt=True)
    start, end = span
    start = len(prompt) if text.startswith(prompt) else start
    special = processor.tokenizer.all_special_tokens
    written = read_written(text[start:end], special, find_open_thought(prompt)).text
    answer = strip_thoughts(messages[-1]["content"])
    if "".join(written.split()) == "".join(drop_tokens(answer, special).split()):
        return
    raise UserError(
        f"the chat template writes the last answer as {text[start:end][:80]!r} after a prompt that"
        f" ends with {prompt[-40:]!r}, so a trained model would answer {written[:80]!r} where"
        f" {answer[:80]!r} is right; set a processor.chat_template that writes all that stands"
        " before an answer with add_generation_prompt, and ends answers by a special token"
    )


def _is_other_thought(prompt: str, text: str, fits: bool) -> bool:
    """Whether a prompt opens or holds a thought that the text of the conversation has not.

    Args:
        prompt: The text that asks for the last answer.
        text: The text of the whole conversation.
        fits: Whether the text begins with the prompt.
    """
    closing = find_open_thought(prompt)
    if fits:
        return closing is not None and closing not in text[len(prompt) :]
    pairs = zip(prompt, text, strict=False)
    num_common = next((i for i, (one, other) in enumerate(pairs) if one != other), len(text))
    marks = [mark for pair in MARKS for mark in pair]
    # A mark may begin before the difference, as </think> does where the text has <think>.
    is_mark = any(prompt.find(mark, max(0, num_common - len(mark) + 1)) >= 0 for mark in marks)
    return closing is not None or is_mark


def _build_prompt_error(prompt: str, text: str, messages: list[dict], processor) -> UserError:
    """The error for a template whose prompt is not how it writes the answer."""
    line = prompt.rstrip().rsplit("\n", 1)[-1][-60:]
    problem = (
        f"the chat template ends the prompt for the last answer with {line!r}, but does not write"
        " the answer of a record in that way, so training would not be what inference asks for"
    )
    arguments = find_agreeing_arguments(processor, messages)
    if arguments:
        name, value = arguments[0]
        return UserError(
            f"{problem}; give the template's argument {name}: {json.dumps(value)}"
            " (chat_template_kwargs), with which both agree"
        )
    return UserError(
        f"{problem}; set a processor.chat_template whose prompt is the beginning of the record's"
        " text"
    )


def _add_end_token(text: str, end: int, end_token: str | None, special: tuple[str, ...]) -> str:
    """Add an end token after the last answer, which ends at `end`, where there is none.

    Some templates of base models, such as LLaVA-1.5's, have none there. Training without it would
    teach the model not to stop.
    """
    has_more_text = text[end:].strip() != ""
    if end_token is None or has_more_text or text[:end].endswith(special):
        return text
    return text[:end] + end_token


def _include_end_token(span: Span, text: str, special: tuple[str, ...]) -> Span:
    """The span with a special token that follows it directly: the model learns to stop."""
    start, end = span
    if text[start:end].rstrip().endswith(special):
        return span
    following = [token for token in special if text.startswith(token, end)]
    return start, end + max((len(token) for token in following), default=0)
