"""How often a model answers right: greedy answers to every question of a file, scored and kept
beside their settings.

An interrupted run goes on where it stopped (eval_folder.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from torch.utils.data import DataLoader, Dataset
from transformers import BatchFeature

from .. import __version__
from ..config.recipe import Recipe
from ..config.yaml_io import expand_path
from ..data.dataset import raise_errors
from ..data.examples import IMAGE, Example, read_source
from ..data.feature_cache import views_of
from ..fingerprint import weights_hash
from ..prompts import (
    check_length,
    decode_answers,
    encode_prompts,
    get_chat_template,
    is_fixed,
    make_greedy_config,
    prepare_inputs,
    render_prompt,
)
from ..schema import UserError, nearest
from .output_dir import PREDICTIONS, RESULT, answered, open_run, write_json, write_lines
from .scoring import METRICS, scores


@torch.inference_mode()
def evaluate(
    model,
    processor,
    examples: Sequence[Example],
    *,
    out: str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    metric: str | None = "exact_match",
    resume: bool = True,
    states=None,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Ask the model every example's last question and compare with the last assistant turn; earlier
    turns are context.

    Returns accuracy (share right, with count and 95 % Wilson interval), the same per group and per
    level where examples name them, the mean over levels, decoding settings, prompt template,
    versions and seconds; written to `out` together with the predictions. metric: None keeps the
    answers without judging them. resume: keep the answers that `out` has for the same settings and
    prompts; False starts over. states: kept states of the examples' pictures
    (`states.VisionStates`), read instead of running the encoder. workers: processes that prepare
    pictures while the model answers; worth it where a GPU would wait for them. Raises ValueError
    for a missing picture, a prompt that is too long, or an `out` made with other settings.
    """
    began = time.perf_counter()
    _check(examples, batch_size, max_new_tokens, metric, workers)
    records = [_question(example, processor) for example in examples]
    lengths = _lengths(model, processor, examples, records, max_new_tokens)
    settings = settings_of(model, processor, max_new_tokens, metric)
    if out is not None:
        open_run(Path(out), settings, records, resume)
    todo = [i for i, record in enumerate(records) if record["prediction"] is None]
    todo.sort(
        key=lambda i: -lengths[i]
    )  # equal lengths together, and the longest first: memory fails early or never
    progress(len(records) - len(todo), len(records))
    config = make_greedy_config(model.eval(), max_new_tokens)
    chunks = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    asked = [
        ([records[i]["prompt"] for i in chunk], [examples[i] for i in chunk]) for chunk in chunks
    ]
    done = len(records) - len(todo)
    for chunk, inputs in zip(
        chunks, _prepared(model, processor, asked, states, workers), strict=True
    ):
        _check_lengths(model, processor, inputs, [examples[i] for i in chunk], max_new_tokens)
        answers = decode_answers(
            processor, inputs, model.generate(**inputs, generation_config=config)
        )
        for i, answer in zip(chunk, answers, strict=True):
            records[i] |= answered(records[i], answer, metric)
        if out is not None:
            write_lines(Path(out) / PREDICTIONS, [records[i] for i in chunk], "a")
        done += len(chunk)
        progress(done, len(records))
    result = {
        **(scores(records) if metric else {"num_examples": len(records)}),
        **settings,
        "model": model.config._name_or_path,
        "batch_size": batch_size,
        "example_prompt": records[0]["prompt"],
        "num_kept": len(records) - len(todo),
        "seconds": round(time.perf_counter() - began, 3),
        "versions": versions(),
    }
    if out is not None:
        write_lines(Path(out) / PREDICTIONS, records, "w")
        write_json(Path(out) / RESULT, result)
    return result


def evaluate_recipe(
    recipe: Recipe,
    model,
    processor,
    *,
    resume: bool = False,
    states=None,
    progress=lambda done, total: None,
) -> dict:
    """Ask what a recipe's `evaluate` names, into its output folder's eval/; the result of
    `evaluate`.
    """
    asked = recipe.evaluate
    return evaluate(
        model,
        processor,
        evaluation_examples(recipe),
        out=Path(expand_path(recipe.output)) / "eval",
        batch_size=asked.batch_size,
        max_new_tokens=asked.max_new_tokens,
        resume=resume,
        states=states,
        progress=progress,
    )


def evaluation_examples(recipe: Recipe) -> list[Example]:
    """What a recipe's `evaluate` asks; nothing where it has none."""
    return [
        example
        for source in (recipe.evaluate.data if recipe.evaluate else ())
        for example in read_source(source, [])
    ]


class Batches(Dataset):
    """Model inputs of batches of (prompts, examples), prepared when they are asked for, in whatever
    process.
    """

    def __init__(self, processor, asked: list[tuple[list[str], list[Example]]]):
        self.processor, self.asked = processor, asked

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, number: int) -> dict:
        prompts, examples = self.asked[number]
        try:
            images = [example.pictures() for example in examples]
            return dict(encode_prompts(self.processor, prompts, images))
        except UserError as error:  # a worker process would hand on only its text
            return {"error": error}


def _prepared(model, processor, asked: list[tuple], states, workers: int) -> Iterator[dict]:
    """What `generate` takes of each batch, on the model's device, in order; of kept states their
    features in place of pixels.
    """
    if states is not None and not model.supports_feature_cache:
        raise UserError(
            "states of an upgraded model's encoder cannot be kept; ask it without states"
        )
    if states is not None:
        yield from (_from_states(model, processor, *batch, states) for batch in asked)
        return
    batches = Batches(processor, asked)
    if workers:
        batches = DataLoader(batches, None, num_workers=workers, worker_init_fn=_alone)
    for inputs in raise_errors(batches):
        yield BatchFeature(inputs).to(model.device)


def _alone(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker has a core, not the machine
    torch.set_num_threads(1)


def _from_states(model, processor, prompts: list[str], examples: list[Example], states) -> dict:
    if not any(example.images for example in examples):
        return prepare_inputs(
            model, processor, prompts, [example.pictures() for example in examples]
        )
    inputs = prepare_inputs(model, processor, prompts, None)
    views = views_of(model.plan, model.config.vision_depth)
    kept = [states.read(example, views) for example in examples if example.images]
    together = {tap: torch.cat([one[tap] for one in kept]).to(model.device) for tap in views}
    return {
        **inputs,
        "mm_encoder_outputs": {"image": model.get_image_features(vision_states=together)},
    }


def _check(
    examples, batch_size: int, max_new_tokens: int, metric: str | None, workers: int
) -> None:
    if metric is not None and metric not in METRICS:
        raise UserError(
            f"metric {metric!r} is not known{nearest(metric, METRICS)}; allowed are"
            f" {', '.join(METRICS)}"
        )
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("workers", workers, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} is {value!r}, but must be a whole number of at least {least}")
    if not examples:
        raise UserError("there is nothing to ask: the list of examples is empty; give at least one")
    for example in examples:
        example.check_pictures()


def _question(example: Example, processor) -> dict:
    """The line of predictions.jsonl for an example, its answer still open."""
    *asked, answer = example.messages
    turns = [{**m, "content": m["content"].replace(IMAGE, processor.image_token)} for m in asked]
    names = [
        i if isinstance(i, str) else "sha1:" + hashlib.sha1(i).hexdigest() for i in example.images
    ]
    return {
        "id": example.id,
        "prompt": render_prompt(processor, turns),
        "images": names,
        "prediction": None,
        "reference": answer["content"],
        "correct": None,
        "group": example.group,
        "level": example.level,
    }


def _lengths(model, processor, examples, records, max_new_tokens: int) -> list[int]:
    """Tokens of every prompt, pictures included; ValueError for one that does not fit the language
    model.

    Where only the processor's call knows what a picture takes, one token stands for each, and
    `_check_lengths` looks later.
    """
    texts = processor.tokenizer([record["prompt"] for record in records])["input_ids"]
    more = processor.num_image_tokens - 1 if is_fixed(processor) else 0
    lengths = [len(ids) + len(e.images) * more for ids, e in zip(texts, examples, strict=True)]
    for length, example in zip(lengths, examples, strict=True):
        _check_length(model, length, example, max_new_tokens)
    return lengths


def _check_lengths(model, processor, inputs: dict, examples, max_new_tokens: int) -> None:
    if not is_fixed(processor):
        for length, example in zip(
            inputs["attention_mask"].sum(-1).tolist(), examples, strict=True
        ):
            _check_length(model, length, example, max_new_tokens)


def _check_length(model, length: int, example: Example, max_new_tokens: int) -> None:
    where = f"the prompt of {example.source or example.id}"
    check_length(model, length, max_new_tokens, where, "leave it out or lower max_new_tokens")


def settings_of(model, processor, max_new_tokens: int, metric: str | None) -> dict:
    """Everything but the questions that predictions depend on."""
    decoding = make_greedy_config(model, max_new_tokens).to_diff_dict()
    decoding.pop("transformers_version", None)
    return {
        "metric": metric,
        "decoding": {
            **decoding,
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": max_new_tokens,
        },
        "prompt_template": get_chat_template(processor),
        "views": _views(processor),
        "weights": weights_hash(model),
    }


def _views(processor) -> dict:
    """What becomes of pictures: our settings, or the base's own processor by name and a hash of all
    its settings.
    """
    if is_fixed(processor):
        return {
            name: getattr(processor, name)
            for name in ("image_size", "tiles", "coarse", "num_image_tokens")
        }
    settings = {
        **processor.image_processor.to_dict(),
        "tokens": getattr(processor, "image_seq_length", None),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[
        :16
    ]
    return {
        "processor": type(processor).__name__,
        "settings": digest,
        "tiles": getattr(processor, "sparsecut_tiles", 0),
    }


def versions() -> dict[str, str]:
    """What computed the result."""
    return {
        "sparsecut": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
