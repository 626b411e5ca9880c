"""What the runs of a study read, so that a study does not go on after any of it has changed.

inputs.json in a study's folder holds the facts (`data.file_facts`) of every file of records and of
every image, and hashes of the two backbones. Names of files inside the folder are relative to it,
so that it may be moved.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..config.recipe import Recipe, Source
from ..data.examples import Example
from ..data.file_facts import Facts, describe_file, describe_image, hold_same_contents
from ..data.locating import find_record_files
from ..fingerprint import weights_hash, weights_sum
from ..prompts import get_chat_template
from ..schema import UserError, read_json_file, write_text_file

INPUTS = "inputs.json"
BEGUN = (  # under runs/BUDGET/VARIANT/SEED or rates/VARIANT/RATE/SEED
    *("r*/*/*/*/*/versions.json", "r*/*/*/*/*/checkpoint-*/*.json", "r*/*/*/*/facts.json"),
)


def check_inputs(
    out: Path,
    recipes: Sequence[Recipe],
    examples: Sequence[Example],
    model,
    processor,
    log: Callable[[str], None],
) -> None:
    """Check that a study goes on with the inputs it began with, and note those of a new one.

    Args:
        out: The study's folder.
        recipes: A recipe of every budget.
        examples: All records of the recipes.
        model: A model with the study's backbones.
        processor: Its processor.
        log: Takes a line where nothing is known of a study of an old version.

    Raises:
        UserError: A file, an image or a backbone has changed since runs of the study began.
    """
    file = out / INPUTS
    before = read_json_file(file) if file.is_file() else {}
    now = {
        "files": _describe_files(out, recipes, before.get("files", {})),
        "images": _describe_images(out, examples, before.get("images", {})),
        "backbones": hash_backbones(model, processor),
    }
    if any(next(out.glob(pattern), None) for pattern in BEGUN):
        if not before:
            log(
                f"{out} was begun by a version that did not note what runs read, so it is not known"
                " whether data or models have changed since"
            )
        changed = find_changed(before, now)
        if changed:
            raise UserError(
                f"{changed[0]} has changed since runs of the study in {out} were trained"
                f" ({len(changed)} changes), and new runs would be compared with those; put the old"
                " one back, choose another folder (output=...), or remove this one"
            )
        now = _merge(before, now)
    if now != before:
        write_text_file(file, json.dumps(now, indent=1))


def find_changed(before: dict, now: dict) -> list[str]:
    """Name what has changed; what is read now for the first time has not."""
    changed = []
    for kind in ("files", "images"):
        stored = before.get(kind, {})
        for name, facts in now[kind].items():
            if name in stored and not hold_same_contents(facts, stored[name]):
                changed.append(name)
    for name, value in before.get("backbones", {}).items():
        if now["backbones"].get(name, value) != value:
            changed.append(f"the {name.replace('_', ' ')}")
    return changed


def _merge(before: dict, now: dict) -> dict:
    """What is known: other variants and budgets may have read more than those of now."""
    return {kind: {**before.get(kind, {}), **values} for kind, values in now.items()}


def hash_backbones(model, processor) -> dict[str, str]:
    """Return hashes of a built model's encoder, language model, tokenizer and chat template."""
    tokenizer = json.dumps(sorted(processor.tokenizer.get_vocab().items()))
    return {
        "encoder": _hash_weights(model.vision_tower),
        "language_model": _hash_weights(model.language_model),
        "tokenizer": _hash_text(tokenizer),
        "chat_template": _hash_text(get_chat_template(processor) or ""),
    }


def _hash_weights(module) -> str:
    return f"{weights_hash(module)} {weights_sum(module)}"


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def list_sources(recipe: Recipe) -> Iterator[Source]:
    """Yield all sources of a recipe: those of its stages, then those of its evaluation."""
    for stage in recipe.stages:
        yield from stage.data
    if recipe.evaluate:
        yield from recipe.evaluate.data


def _describe_files(out: Path, recipes: Sequence[Recipe], known: dict) -> dict[str, Facts]:
    facts = {}
    for recipe in recipes:
        for source in list_sources(recipe):
            for part in find_record_files(source):
                for file in part.list_stored():
                    name = _get_name(out, file)
                    facts[name] = describe_file(file, known.get(name))
    return facts


def _describe_images(out: Path, examples: Sequence[Example], known: dict) -> dict[str, Facts]:
    facts = {}
    for example in examples:
        for image in example.images:
            if not isinstance(image, str):
                continue  # it lies in a file of records
            name = _get_name(out, Path(example.store.path, image))
            if name not in facts:
                facts[name] = describe_image(example.store, image, known.get(name))
    return facts


def _get_name(out: Path, path: Path) -> str:
    """A file's path, relative to the study's folder where it lies inside."""
    path = Path(os.path.abspath(path))
    folder = Path(os.path.abspath(out))
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
