"""Evaluate a model: greedy answers to every question of a data file, judged and written down.

An interrupted evaluation resumes where it stopped (`output_dir`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..chat_templates.arguments import copy_with_arguments, set_arguments
from ..chat_templates.markers import check_markers
from ..chat_templates.thoughts import Answer
from ..config.folder_lock import lock_folder
from ..config.recipe import Recipe
from ..config.yaml_io import expand_path
from ..data.encoding import count_image_tokens
from ..data.examples import Example, read_source
from ..fingerprint import weights_hash, weights_sum
from ..prompts import (
    check_length,
    check_medium,
    get_chat_template,
    get_medium,
    get_tokens_per_image,
    make_greedy_config,
    read_answers,
    render_prompt,
)
from ..schema import UserError, nearest
from ..waits import show_step
from .answered_images import get_view_settings
from .exact_match import METRICS, compute_scores
from .judging import judge, warn_of_unfinished
from .output_dir import OutputDir, get_command, get_versions, open_output_dir
from .question_batches import PromptBatch, prepare_all_inputs, split_batches


class EvaluationResult(dict):
    """What result.json holds, and the records that it was computed from.

    Attributes:
        records: The lines of predictions.jsonl, one for each example, in order.
    """

    def __init__(self, result: dict, records: list[dict]) -> None:
        super().__init__(result)
        self.records = records


@torch.inference_mode()
def evaluate(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    *,
    out: str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    metric: str | None = "exact_match",
    resume: bool = True,
    feature_cache: Any = None,
    workers: int = 0,
    chat_template_kwargs: dict | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Ask the model the last question of every example, and compare with the last assistant turn.

    Earlier turns are context. Answers are greedy.

    Args:
        model: A SparseCut model, joined or upgraded.
        processor: Its processor.
        examples: The questions, with their images.
        out: Folder for settings.json, predictions.jsonl and result.json; None writes nothing.
        batch_size: Questions that are answered at once.
        max_new_tokens: The longest answer, in tokens.
        metric: A key of `exact_match.METRICS`; None keeps the answers unjudged.
        resume: Whether to keep the answers that `out` has for the same questions and settings.
        feature_cache: A `VisionFeatureCache` of the images, read in place of running the encoder.
        workers: Processes that prepare images, useful where a GPU would wait for them.
        chat_template_kwargs: Arguments of the chat template, such as {"enable_thinking": False}.
        progress: Called with the number of answered questions and the number of all.

    Returns:
        What result.json holds: `accuracy` (0 to 1, with counts and `intervals.estimate_interval`),
        the same by `groups` and `levels`, their mean, settings, versions, seconds. It has
        `records`.

    Raises:
        UserError: An image is missing or broken, a prompt is too long, an argument is not allowed,
            `out` holds answers made with other settings, about images that have changed since, or
            to other questions, or another process writes there.
    """
    start_time = time.perf_counter()
    _check_arguments(batch_size, max_new_tokens, metric, workers)
    _check_examples(examples)
    processor = copy_with_arguments(processor, chat_template_kwargs)
    records = [_build_record(example, processor) for example in examples]
    lengths = _measure_prompts(model, processor, examples, records, max_new_tokens)
    settings = get_settings(model, processor, max_new_tokens, metric)
    with _open_output(out, settings, records, examples, resume) as output:
        num_resumed = _count_answered(records)
        batches = split_batches(records, examples, lengths, batch_size)
        inputs = prepare_all_inputs(model, processor, batches, feature_cache, workers)
        answers = _generate_answers(model, processor, batches, inputs, max_new_tokens)
        _collect_answers(records, batches, answers, metric, output, progress)
        scores = compute_scores(records) if metric else {"num_examples": len(records)}
        facts = _describe_run(model, processor, records, batch_size, num_resumed, start_time)
        result = {**scores, **settings, **facts}
        if output is not None:
            output.finish(records, examples, result)
    return EvaluationResult(result, records)


def evaluate_recipe(
    recipe: Recipe,
    model: Any,
    processor: Any,
    *,
    resume: bool = False,
    feature_cache: Any = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluationResult:
    """Evaluate on the data of a recipe's `evaluate`, into eval/ of its output folder.

    The recipe's arguments of the chat template become the processor's defaults.
    """
    set_arguments(processor, recipe.chat_template_kwargs)
    return evaluate(
        model,
        processor,
        evaluation_examples(recipe),
        out=Path(expand_path(recipe.output)) / "eval",
        batch_size=recipe.evaluate.batch_size,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        resume=resume,
        feature_cache=feature_cache,
        progress=progress,
    )


def evaluation_examples(recipe: Recipe) -> list[Example]:
    """The examples of a recipe's `evaluate`; none where it has no such part."""
    examples = []
    if recipe.evaluate:
        for source in recipe.evaluate.data:
            examples += read_source(source, [])
    return examples


@contextmanager
def _open_output(
    out: str | Path | None,
    settings: dict,
    records: list[dict],
    examples: Sequence[Example],
    resume: bool,
) -> Iterator[OutputDir | None]:
    """Lock and prepare the output folder; None where nothing is written."""
    if out is None:
        yield None
        return
    with lock_folder(out):
        yield open_output_dir(Path(out), settings, records, examples, resume)


def _count_answered(records: Sequence[dict]) -> int:
    return sum(record["prediction"] is not None for record in records)


def _describe_run(
    model: Any,
    processor: Any,
    records: Sequence[dict],
    batch_size: int,
    num_resumed: int,
    start_time: float,
) -> dict:
    """What result.json says of how answers came about, beside their settings."""
    return {
        "model": model.config._name_or_path,
        "medium": get_medium(processor),
        "batch_size": batch_size,
        "example_prompt": records[0]["prompt"],
        "num_kept": num_resumed,
        "seconds": round(time.perf_counter() - start_time, 3),
        "versions": get_versions(),
        "command": get_command(),
    }


def _check_arguments(
    batch_size: int, max_new_tokens: int, metric: str | None, workers: int
) -> None:
    """Raise UserError for an argument of `evaluate` that is not allowed."""
    if metric is not None and metric not in METRICS:
        allowed = ", ".join(METRICS)
        raise UserError(
            f"metric is {metric!r}{nearest(metric, METRICS)}, but allowed are {allowed}"
        )
    smallest = (
        ("batch_size", batch_size, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("workers", workers, 0),
    )
    for name, value, least in smallest:
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} is {value!r}, but must be a whole number of at least {least}")


def _check_examples(examples: Sequence[Example]) -> None:
    """Raise UserError where there is no example, or an image is missing."""
    if not examples:
        raise UserError(
            "there is nothing to evaluate: the list of examples is empty; give at least one"
        )
    for example in examples:
        example.check_images()


def _measure_prompts(
    model: Any, processor: Any, examples: Any, records: Any, max_new_tokens: int
) -> list[int]:
    """The tokens of every prompt, image tokens included; UserError for one that is too long.

    Where only the processor's call knows an image's tokens, each image counts as one token, and
    `_check_batch_lengths` checks the true length later.
    """
    prompts = [record["prompt"] for record in records]
    token_ids = processor.tokenizer(prompts)["input_ids"]
    lengths = []
    for ids, example in zip(token_ids, examples, strict=True):
        length = len(ids) + sum(count_image_tokens(processor, example)) - len(example.images)
        _check_prompt_length(model, length, example, max_new_tokens)
        lengths.append(length)
    return lengths


def _check_batch_lengths(
    model: Any, processor: Any, inputs: dict, examples: Any, max_new_tokens: int
) -> None:
    if get_tokens_per_image(processor) is not None:
        return  # checked before
    lengths = inputs["attention_mask"].sum(-1).tolist()
    for length, example in zip(lengths, examples, strict=True):
        _check_prompt_length(model, length, example, max_new_tokens)


def _check_prompt_length(model: Any, length: int, example: Example, max_new_tokens: int) -> None:
    name = f"the prompt of {example.place}"
    check_length(model, length, max_new_tokens, name, "leave it out or lower max_new_tokens")


def _build_record(example: Example, processor: Any) -> dict:
    """The line of predictions.jsonl for an example, not answered yet."""
    names = []
    for image in example.images:
        is_name = isinstance(image, str)
        names.append(image if is_name else "sha1:" + hashlib.sha1(image).hexdigest())
    return {
        "id": example.id,
        "prompt": render_question(example, processor),
        "images": names,
        "prediction": None,
        "reference": example.messages[-1]["content"],
        "correct": None,
        "group": example.group,
        "level": example.level,
    }


def render_question(example: Example, processor: Any) -> str:
    """The prompt that asks for the last answer of an example, whether or not it is there."""
    if example.images:
        check_medium(processor, example.medium, f"{example.place} is a record that")
    messages = example.get_messages(processor.image_token)
    if messages[-1]["role"] == "assistant":
        messages.pop()
    check_markers(processor, messages, ends_only=True, place=example.place)
    return render_prompt(processor, messages)


def get_settings(model: Any, processor: Any, max_new_tokens: int, metric: str | None) -> dict:
    """Everything but the questions that answers depend on."""
    decoding = make_greedy_config(model, max_new_tokens).to_diff_dict()
    decoding.pop("transformers_version", None)
    decoding |= {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
    return {
        "metric": metric,
        "decoding": decoding,
        "prompt_template": get_chat_template(processor),
        "views": get_view_settings(processor),
        "weights": weights_hash(model),
        "weights_sum": weights_sum(model),
        "plan": model.plan.to_dict(),
    }


def _generate_answers(
    model: Any,
    processor: Any,
    batches: list[PromptBatch],
    all_inputs: Iterator[dict],
    max_new_tokens: int,
) -> Iterator[list[Answer]]:
    """Generate the answers of every batch, in order."""
    config = make_greedy_config(model.eval(), max_new_tokens)
    for batch, inputs in zip(batches, all_inputs, strict=True):
        _check_batch_lengths(model, processor, inputs, batch.examples, max_new_tokens)
        token_ids = model.generate(**inputs, generation_config=config)
        yield read_answers(processor, inputs, token_ids)


def _collect_answers(
    records: list[dict],
    batches: list[PromptBatch],
    answers: Iterator[list[Answer]],
    metric: str | None,
    output: OutputDir | None,
    progress: Callable[[int, int], None],
) -> None:
    """Judge the answers as they come, and write them into the records and the output folder.

    Progress is shown at the start and after every batch.
    """
    num_done = _count_answered(records)
    num_unfinished = 0
    with show_step("answering questions", len(records)) as step:
        step(num_done, len(records))
        progress(num_done, len(records))
        for batch, batch_answers in zip(batches, answers, strict=True):
            batch_records = [records[i] for i in batch.indices]
            for record, answer in zip(batch_records, batch_answers, strict=True):
                record.update(judge(record, answer, metric))
                num_unfinished += answer.is_thinking
            if output is not None:
                output.append(batch_records, batch.examples)
            num_done += len(batch_records)
            step(num_done, len(records))
            progress(num_done, len(records))
        warn_of_unfinished(num_unfinished)
