"""What a run was made from, so that it is not continued with something else.

inputs.json in a run's folder holds digests: of the records of every source, of their images, of the
model's weights before training, and of what makes tokens and pixels. None depends on where files
lie.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..adapters import get_adapters
from ..config.recipe import Source
from ..data.examples import Example
from ..data.file_facts import read_stamp
from ..data.images import ImageStore
from ..data.locating import find_record_files, find_revision
from ..fingerprint import weights_sum
from ..prompts import get_chat_template, get_medium
from ..schema import UserError, read_json_file, write_text_file
from .checkpoints import digest_file
from .reading import SourceExamples
from .run_dir import INPUTS

NUM_IMAGES = 5000  # of a source, whose contents are digested; of the others, sizes and times are
NUM_STREAM_SAMPLES = 16  # places of a stream's file that are read
IMAGE_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "patch_size",
    "merge_size",
    "min_pixels",
    "max_pixels",
)
logger = logging.getLogger(__name__)


def describe_sources(sources: Iterable[SourceExamples]) -> list[dict]:
    """Return the facts of a stage's sources, in order."""
    facts = []
    for entry in sources:
        is_stream = entry.source.streaming
        described = (
            _describe_stream(entry.source) if is_stream else describe_examples(entry.examples)
        )
        revision = find_revision(entry.source)
        facts.append(described if revision is None else {**described, "revision": revision})
    return facts


def describe_examples(examples: list[Example]) -> dict:
    """Return the facts of records and their images."""
    digest = hashlib.sha256()
    for example in examples:
        names = [_get_image_key(image) for image in example.images]
        line = json.dumps([example.id, example.messages, names], ensure_ascii=True)
        digest.update(line.encode())
    return {
        "number": len(examples),
        "records": digest.hexdigest(),
        **_describe_images(examples),
    }


def _get_image_key(image: str | bytes) -> str:
    return image if isinstance(image, str) else hashlib.sha256(image).hexdigest()


def _describe_images(examples: list[Example]) -> dict:
    """Sizes, times and, of many or all, contents of the images that have names."""
    places = {}
    for example in examples:
        for image in example.images:
            # What is missing is told by the check of all records, or left out there.
            if isinstance(image, str) and image in example.store:
                places[example.store.find_file(image), image] = example.store
    sizes, times = hashlib.sha256(), hashlib.sha256()
    stamps: dict[Path, list[int]] = {}
    for file, name in places:
        if file not in stamps:  # an archive has many
            stamps[file] = read_stamp(file)
        size, written, _ = stamps[file]
        sizes.update(f"{name} {size} ".encode())
        times.update(f"{written} ".encode())
    return {
        "num_images": len(places),
        "sizes": sizes.hexdigest(),
        "times": times.hexdigest(),
        "contents": _digest_images(places),
    }


def _digest_images(places: dict[tuple[Path, str], ImageStore]) -> dict[str, str]:
    """Digests of images, or of a fixed random choice where they are many, by name."""
    chosen = list(places)
    if len(chosen) > NUM_IMAGES:
        chosen = random.Random(0).sample(chosen, NUM_IMAGES)
    contents = {}
    for file, name in chosen:
        with contextlib.suppress(OSError):  # as above
            data = places[file, name].read_bytes(name)
            contents[name] = hashlib.sha256(data).hexdigest()[:16]
    return contents


def _describe_stream(source: Source) -> dict:
    """Facts of the files of a stream: their names and sizes, and some of their bytes."""
    facts = {}
    if find_revision(source) is not None:
        return {"files": {}}  # the commit tells all of them
    for part in find_record_files(source):
        for file in part.list_stored():
            name = file.relative_to(part.folder).as_posix()
            facts[name] = digest_file(file, NUM_STREAM_SAMPLES)
    return {"files": facts}


def describe_model(model, processor) -> dict:
    """Return hashes of a model before training, without its new weights, and of its processor."""
    tokenizer = processor.tokenizer
    if get_medium(processor) == "audio":
        settings = processor.feature_extractor.to_dict()
    else:
        image_processor = processor.image_processor
        settings = {name: getattr(image_processor, name, None) for name in IMAGE_SETTINGS}
    return {
        **describe_weights(model),
        "tokenizer": _hash_value(sorted(tokenizer.get_vocab().items())),
        "chat template": _hash_value(get_chat_template(processor)),
        "image processor": _hash_value(settings),
    }


def describe_weights(model) -> dict:
    """Return a hash of the weights that a model takes over from others, and their dtype.

    Embeddings are left out: building adds rows to them, which another machine may round
    differently.
    """
    parts = [model.base] if model.is_upgrade else [model.vision_tower, model.language_model]
    for parameter in model.parameters():
        if parameter.is_meta or getattr(parameter, "ds_id", None) is not None:
            return {}  # they are elsewhere, or in pieces on several processes
    if get_adapters(model):
        return {}
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    without = [module.weight for module in embeddings if module is not None]
    dtype = str(next(parts[-1].parameters()).dtype)
    return {"weights": [dtype, *(weights_sum(part, without) for part in parts)]}


def _hash_value(value) -> str:
    text = json.dumps(value, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_inputs(output: Path, facts: dict) -> None:
    """Write what a run is made from."""
    write_text_file(output / INPUTS, json.dumps(facts, indent=1) + "\n")


def check_unchanged(output: Path, facts: dict) -> None:
    """Check that a run is continued with what it was made from.

    Args:
        output: The run's folder. One of an older version holds no facts.
        facts: Those of now: {"sources": {user: facts of its sources}, "model": facts}.

    Raises:
        UserError: Something has changed; the message says what.
    """
    file = output / INPUTS
    if not file.is_file():
        return
    before = read_json_file(file)
    changed = [*_compare_sources(before, facts), *_compare_model(before, facts)]
    if changed:
        raise UserError(
            f"{changed[0]} changed since the run in {output} began, and the rest of the run would"
            " learn something else than its first part; put the old state back, or start over with"
            f" --overwrite or another output; to go on all the same, remove {file}"
        )


def _compare_sources(before: dict, facts: dict) -> Iterator[str]:
    for user, sources in facts["sources"].items():
        old_sources = _get_dict(before, "sources").get(user, [])
        for number, (old, new) in enumerate(zip(old_sources, sources, strict=False)):
            place = f"{user}, data {number}:"
            for change in _compare_facts(old, new, place):
                yield f"{place} {change}"


def _compare_facts(old: dict, new: dict, place: str) -> Iterator[str]:
    """What has changed in a source, most telling first."""
    revisions = old.get("revision"), new.get("revision")
    if None not in revisions and revisions[0] != revisions[1]:
        yield (
            f"the data set's commit was {revisions[0]} (`revision` of the source would name it), is"
            f" {revisions[1]}, and has"
        )
    if old.get("number", new.get("number")) != new.get("number"):
        yield f"there were {old['number']} records and are {new['number']}; they have"
    elif old.get("records") != new.get("records"):
        yield "questions, answers or image names of records have"
    old_files = _get_dict(old, "files")
    for name in sorted({*old_files, *_get_dict(new, "files")}):
        if old_files.get(name) != new.get("files", {}).get(name):
            yield f"the file {name} has"
    old_contents = _get_dict(old, "contents")
    for name, digest in new.get("contents", {}).items():
        if old_contents.get(name, digest) != digest:
            yield f"the image {name} has"
    if old.get("sizes") != new.get("sizes"):
        yield "sizes of images have"
    elif old.get("times") != new.get("times") and new["num_images"] > len(new["contents"]):
        logger.warning(
            "%s images have other times than when the run began; of %s images, %s were compared and"
            " are the same",
            place,
            f"{new['num_images']:,}",
            f"{len(new['contents']):,}",
        )


def _compare_model(before: dict, facts: dict) -> Iterator[str]:
    old = _get_dict(before, "model")
    for name, value in facts["model"].items():
        known = old.get(name, value)
        if name == "weights" and known[:1] != value[:1]:
            continue  # of another dtype, so they cannot be compared
        if known != value:
            yield f"the model's {name} {'have' if name == 'weights' else 'has'}"


def _get_dict(values: dict, name: str) -> dict:
    value = values.get(name)
    return value if isinstance(value, dict) else {}
