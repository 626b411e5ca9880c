"""How often a model answers right: greedy answers to every question of a file, scored and kept beside their settings.

An interrupted run goes on where it stopped. `out` holds settings.json (written first), predictions.jsonl (one line per
question, written as they come and put into the order of the questions at the end) and result.json (written last).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from . import __version__
from .identity import fingerprint
from .plan import nearest
from .prompting import check_length, decode, greedy, inputs_of, is_fixed, render, template_of
from .recipe import Recipe
from .records import IMAGE, Example, read_source
from .scoring import METRICS, scores
from .states import views_of
from .yaml_text import expand_path

SETTINGS, PREDICTIONS, RESULT = "settings.json", "predictions.jsonl", "result.json"


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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Ask the model every example's last question and compare with the last assistant turn; earlier turns are context.

    Returns accuracy (share right, with count and 95 % Wilson interval), the same per group and per level where examples
    name them, the mean over levels, decoding settings, prompt template, versions and seconds; written to `out` together with
    the predictions. metric: None keeps the answers without judging them. resume: keep the answers that `out` has for the same
    settings and prompts; False starts over. states: kept states of the examples' pictures (`states.VisionStates`), read instead of
    running the encoder.
    Raises ValueError for a missing picture, a prompt that is too long, or an `out` made with other settings.
    """
    began = time.perf_counter()
    _check(examples, batch_size, max_new_tokens, metric)
    records = [_question(example, processor) for example in examples]
    lengths = _lengths(model, processor, examples, records, max_new_tokens)
    settings = settings_of(model, processor, max_new_tokens, metric)
    if out is not None:
        open_run(Path(out), settings, records, resume)
    todo = [i for i, record in enumerate(records) if record["prediction"] is None]
    todo.sort(key=lambda i: -lengths[i])  # equal lengths together, and the longest first: memory fails early or never
    progress(len(records) - len(todo), len(records))
    config = greedy(model.eval(), max_new_tokens)
    for start in range(0, len(todo), batch_size):
        chunk = todo[start : start + batch_size]
        inputs = _inputs(model, processor, [records[i]["prompt"] for i in chunk], [examples[i] for i in chunk], states)
        _check_lengths(model, processor, inputs, [examples[i] for i in chunk], max_new_tokens)
        answers = decode(processor, inputs, model.generate(**inputs, generation_config=config))
        for i, answer in zip(chunk, answers, strict=True):
            records[i] |= _answered(records[i], answer, metric)
        if out is not None:
            write_lines(Path(out) / PREDICTIONS, [records[i] for i in chunk], "a")
        progress(len(records) - len(todo) + start + len(chunk), len(records))
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
    recipe: Recipe, model, processor, *, resume: bool = False, states=None, progress=lambda done, total: None
) -> dict:
    """Ask what a recipe's `evaluate` names, into its output folder's eval/; the result of `evaluate`."""
    asked = recipe.evaluate
    return evaluate(
        model,
        processor,
        asked_of(recipe),
        out=Path(expand_path(recipe.output)) / "eval",
        batch_size=asked.batch_size,
        max_new_tokens=asked.max_new_tokens,
        resume=resume,
        states=states,
        progress=progress,
    )


def asked_of(recipe: Recipe) -> list[Example]:
    """What a recipe's `evaluate` asks; nothing where it has none."""
    return [
        example for source in (recipe.evaluate.data if recipe.evaluate else ()) for example in read_source(source, [])
    ]


def _inputs(model, processor, prompts: list[str], examples: list[Example], states) -> dict:
    """What `generate` takes: texts with pixels, or with the features made of kept states."""
    if states is not None and hasattr(model, "family"):
        raise ValueError("states of an upgraded model's encoder cannot be kept; ask it without states")
    if states is None or not any(example.images for example in examples):
        return inputs_of(model, processor, prompts, [example.pictures() for example in examples])
    inputs = inputs_of(model, processor, prompts, None)
    views = views_of(model.plan, model.config.vision_depth)
    kept = [states.read(example, views) for example in examples if example.images]
    together = {tap: torch.cat([one[tap] for one in kept]).to(model.device) for tap in views}
    return {**inputs, "mm_encoder_outputs": {"image": model.get_image_features(vision_states=together)}}


def _check(examples, batch_size: int, max_new_tokens: int, metric: str | None) -> None:
    if metric is not None and metric not in METRICS:
        raise ValueError(f"metric {metric!r} is not known{nearest(metric, METRICS)}; allowed are {', '.join(METRICS)}")
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, but must be a whole number of at least 1")
    if not examples:
        raise ValueError("there is nothing to ask: the list of examples is empty; give at least one")
    for example in examples:
        example.check_pictures()


def _question(example: Example, processor) -> dict:
    """The line of predictions.jsonl for an example, its answer still open."""
    *asked, answer = example.messages
    turns = [{**m, "content": m["content"].replace(IMAGE, processor.image_token)} for m in asked]
    names = [i if isinstance(i, str) else "sha1:" + hashlib.sha1(i).hexdigest() for i in example.images]
    return {
        "id": example.id,
        "prompt": render(processor, turns),
        "images": names,
        "prediction": None,
        "reference": answer["content"],
        "correct": None,
        "group": example.group,
        "level": example.level,
    }


def _answered(record: dict, answer: str, metric: str | None) -> dict:
    return {"prediction": answer, "correct": METRICS[metric](answer, record["reference"]) if metric else None}


def _lengths(model, processor, examples, records, max_new_tokens: int) -> list[int]:
    """Tokens of every prompt, pictures included; ValueError for one that does not fit the language model.

    Where only the processor's call knows what a picture takes, one token stands for each, and `_check_lengths` looks later.
    """
    texts = processor.tokenizer([record["prompt"] for record in records])["input_ids"]
    more = processor.num_image_tokens - 1 if is_fixed(processor) else 0
    lengths = [len(ids) + len(e.images) * more for ids, e in zip(texts, examples, strict=True)]
    for length, example in zip(lengths, examples, strict=True):
        _check_length(model, length, example, max_new_tokens)
    return lengths


def _check_lengths(model, processor, inputs: dict, examples, max_new_tokens: int) -> None:
    if not is_fixed(processor):
        for length, example in zip(inputs["attention_mask"].sum(-1).tolist(), examples, strict=True):
            _check_length(model, length, example, max_new_tokens)


def _check_length(model, length: int, example: Example, max_new_tokens: int) -> None:
    where = f"the prompt of {example.source or example.id}"
    check_length(model, length, max_new_tokens, where, "leave it out or lower max_new_tokens")


def settings_of(model, processor, max_new_tokens: int, metric: str | None) -> dict:
    """Everything but the questions that predictions depend on."""
    decoding = greedy(model, max_new_tokens).to_diff_dict()
    decoding.pop("transformers_version", None)
    return {
        "metric": metric,
        "decoding": {**decoding, "do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens},
        "prompt_template": template_of(processor),
        "views": _views(processor),
        "weights": fingerprint(model),
    }


def _views(processor) -> dict:
    """What becomes of pictures: our settings, or the base's own processor by name and a hash of all its settings."""
    if is_fixed(processor):
        return {name: getattr(processor, name) for name in ("image_size", "tiles", "coarse", "num_image_tokens")}
    settings = {**processor.image_processor.to_dict(), "tokens": getattr(processor, "image_seq_length", None)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
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


def open_run(out: Path, settings: dict, records: list[dict], resume: bool) -> None:
    """Take over the answers that `out` has for these records, or begin there; ValueError where it holds another run."""
    file = out / PREDICTIONS
    if resume and file.is_file():
        _compare(out, settings)
        old = {_key(line): line for line in read_lines(file)}
        unknown = set(old) - {_key(record) for record in records}
        if unknown:
            raise ValueError(
                f"{file} holds {len(unknown)} answers to questions that are not asked now, such as {min(unknown)[0]!r}; "
                "give another output folder, ask the same questions, or start over (--fresh, resume=False)"
            )
        for record in records:
            if _key(record) in old:
                record |= _answered(record, old[_key(record)]["prediction"], settings["metric"])
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULT).unlink(missing_ok=True)
    write_json(out / SETTINGS, settings)
    write_lines(file, [record for record in records if record["prediction"] is not None], "w")


def _compare(out: Path, settings: dict) -> None:
    """Raise ValueError unless the run in `out` had the same settings."""
    file = out / SETTINGS
    then = _flat(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    now = _flat(json.loads(json.dumps(settings)))
    differing = [name for name in {**now, **then} if then.get(name) != now.get(name)]
    if differing:
        told = [f"{n} ({then.get(n)!r} then, {now.get(n)!r} now)" if n != "prompt_template" else n for n in differing]
        raise ValueError(
            f"{out} holds answers made with another {' and another '.join(told)}; give another output folder, use the settings of "
            "then, or start over (--fresh, resume=False)"
        )


def _flat(settings: dict) -> dict:
    pairs = ((n, v if isinstance(v, dict) else {"": v}) for n, v in settings.items())
    return {f"{n}.{k}".rstrip("."): value for n, inner in pairs for k, value in inner.items()}


def _key(record: dict) -> tuple:
    return record["id"], record["prompt"], tuple(record["images"])


def read_lines(file: Path) -> list[dict]:
    """Records of a JSON Lines file; a last line that an interruption cut short is left out."""
    lines = file.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line end is nothing, or half a line
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"{file} line {number} is not JSON; remove it, or start over (--fresh, resume=False)"
            ) from None
    return records


def write_lines(file: Path, records: Sequence[dict], mode: str) -> None:
    """Records as JSON Lines, appended ("a") or in place of the file ("w")."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if mode == "a":
        with file.open("a", encoding="utf-8") as lines:
            lines.write(text)
        return
    # Replaced at once, so that an interruption leaves the old file or the new one, and two processes do not meet.
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def write_json(file: Path, value: dict) -> None:
    """A value as JSON that people can read."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
