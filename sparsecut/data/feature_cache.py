"""Vision features of a frozen encoder on disk: every image is encoded once.

A folder holds index.json (which encoder, taps, views and images) and for every tap two files:
tap-NN.f16, float16, [images, V, N, D], and tap-NN.crc32, a checksum of every view. Images of any
size have an N of their own, and index.json their rows and columns. Files are memory-mapped, so
several processes share them. Half precision rounds a feature by at most 1 part in
2,048. `cached_features` reads the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..any_size import Grids, list_grids, read_patches
from ..config.folder_lock import lock_folder
from ..config.paths import check_writable_folder
from ..encoders import PatchGrid
from ..fingerprint import weights_hash, weights_sum
from ..prompts import get_medium
from ..schema import UserError, write_text_file
from ..waits import Step, show_step
from .cached_features import (
    INDEX,
    TO_START_OVER,
    ImagePlace,
    VisionFeatureCache,
    get_file,
    get_image_keys,
    read_index,
)
from .encoding import GRIDS
from .examples import Example
from .file_facts import NUM_STAMPS, Facts, describe_image, read_stamp
from .prepared_batches import prepare_batches

OWN_FILE = re.compile(r"tap-\d+\.(f16|crc32)|index\.json(\.\d+\.part)?")


def get_tap_views(plan, vision_depth: int) -> dict[int, int]:
    """Return the taps that a plan reads, each with its number of views: the coarse one, or all."""
    fine = plan.fine_taps(vision_depth)
    return {tap: plan.num_views if tap in fine else 1 for tap in plan.resolved_taps(vision_depth)}


def build_feature_cache(
    folder: str | Path,
    model,
    processor,
    examples: Sequence[Example],
    views: dict[int, int] | None = None,
    *,
    batch_size: int = 32,
    workers: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> VisionFeatureCache:
    """Encode all images of the examples into a folder, unless it holds them, and open it.

    A cache that lacks something, or is damaged, is made anew. Only its own files are removed.

    Args:
        folder: The cache's folder.
        model: A built model.
        processor: Its processor, or one with more tiles.
        examples: Their images are encoded.
        views: Tap -> number of views; by default what the model's plan reads.
        batch_size: Images that are encoded together.
        workers: Processes that prepare images, useful where a GPU would wait for them.
        log: Called with one line about what is written.

    Raises:
        UserError: The folder holds something else, or another process writes it; the processor
            makes too few views; the disk is too small; or a feature does not fit half precision.
    """
    folder = Path(folder)
    views = views or get_tap_views(model.plan, model.config.vision_depth)
    _check_views(views, processor)
    images = _list_images(examples)
    encoder = hash_encoder(model, processor)
    check_writable_folder(folder)
    _check_ours(folder)
    cache = _open_if_whole(folder, encoder, images, views, log)
    if cache is not None:
        return cache
    with lock_folder(folder):
        # Another process may have written it just now.
        cache = _open_if_whole(folder, encoder, images, views, lambda line: None)
        if cache is not None:
            return cache
        _check_ours(folder)
        _remove_own_files(folder)
        folder.mkdir(parents=True, exist_ok=True)
        num_values = _count_patches(model, processor, images) * model.config.grid.width
        _check_room(folder, len(images), num_values, views, log)
        facts = _describe_images(images)  # before they are read: a later change is noticed
        places = list(images.values())
        with show_step("caching vision features of images", len(places)) as step:
            batches = [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
            inputs = prepare_batches(partial(_prepare_images, processor), batches, workers)
            grids = _write_features(folder, model, inputs, views, step)
        own_grids = {"grids": grids} if processor.is_any_size else {}
        index = _make_index(model.config.grid, encoder, views, images, facts, own_grids)
        # The index is written last: a folder that has one is complete.
        write_text_file(folder / INDEX, json.dumps(index))
    return VisionFeatureCache(folder)


def _make_index(
    grid: PatchGrid,
    encoder: tuple[str, str],
    views: dict[int, int],
    images: Mapping[str, ImagePlace],
    facts: list[Facts | None],
    own_grids: dict,
) -> dict:
    """What index.json says. `own_grids` are those of images of any size, under their key."""
    return {
        "encoder": encoder[0],
        "encoder_sum": encoder[1],
        "num_patches": grid.num_patches,
        **own_grids,
        "width": grid.width,
        "taps": views,
        "pictures": list(images),
        "facts": facts,
    }


def _check_views(views: dict[int, int], processor: Any) -> None:
    """Raise UserError where a tap needs more views than the processor makes."""
    if max(views.values()) > processor.num_views:
        raise UserError(
            f"features of {max(views.values())} views are wanted, but the processor makes"
            f" {processor.num_views} of an image; pass the processor of a plan with as many tiles"
        )


def _open_if_whole(
    folder: Path,
    encoder: tuple[str, str],
    images: Mapping[str, ImagePlace],
    views: dict[int, int],
    log: Callable[[str], None],
) -> VisionFeatureCache | None:
    """The cache of a folder that has all that is needed; None where it must be made."""
    if read_index(folder) is None:
        return None
    try:
        cache = VisionFeatureCache(folder)
        obstacle = cache.find_obstacle(encoder, images, views)
    except UserError as error:
        obstacle = str(error).partition(";")[0]
    if obstacle is not None:
        log(f"the vision features in {folder} are made again: {obstacle}")
        return None
    if not cache.has_checks:
        log(
            f"{folder} was written by a version that kept no checksums, so neither its features nor"
            f" its images can be checked; to be sure, {TO_START_OVER}"
        )
    _update_places(cache, images)
    return cache


def _update_places(cache: VisionFeatureCache, images: Mapping[str, ImagePlace]) -> None:
    """Write down new places and times of images whose contents are the same."""
    if not cache.has_checks:
        return
    index = read_index(cache.folder)
    changed = False
    for key, place in images.items():
        row = cache.find_row(key, place)
        is_free = cache.keys[row] == key or cache.keys[row] not in images
        if cache.facts[row] is None or not is_free:
            continue
        stamp = read_stamp(_find_file(place))
        if cache.keys[row] != key or cache.facts[row][:NUM_STAMPS] != stamp:
            index["pictures"][row] = key
            index["facts"][row] = [*stamp, cache.facts[row][-1]]
            changed = True
    if changed:
        with suppress(OSError):  # a folder that is only read works too, a little slower
            write_text_file(cache.folder / INDEX, json.dumps(index))


def _find_file(place: ImagePlace) -> Path:
    example, number = place
    return example.store.find_file(example.images[number])


def _check_ours(folder: Path) -> None:
    """Raise UserError where a folder holds something, but no vision features."""
    if not folder.is_dir() or read_index(folder) is not None:
        return
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    foreign = sorted(name for name in names if not OWN_FILE.fullmatch(name))
    if names == {INDEX}:
        foreign = [INDEX]
    if foreign:
        raise UserError(
            f"feature_cache is {folder}, which holds other files ({', '.join(foreign[:3])}) and no"
            " vision features; give a new or empty folder"
        )


def _remove_own_files(folder: Path) -> None:
    if not folder.is_dir():
        return
    # The index goes first: what an interruption leaves is then known to be incomplete.
    (folder / INDEX).unlink(missing_ok=True)
    for path in folder.iterdir():
        if OWN_FILE.fullmatch(path.name) and path.is_file():
            path.unlink()


def _describe_images(images: Mapping[str, ImagePlace]) -> list[Facts | None]:
    """The facts of every image; None for one that its key describes."""
    facts = []
    for example, number in images.values():
        name = example.images[number]
        has_file = isinstance(name, str)
        facts.append(describe_image(example.store, name) if has_file else None)
    return facts


def _list_images(examples: Sequence[Example]) -> dict[str, ImagePlace]:
    """Key of an image -> an example that has it, and its number there."""
    images = {}
    for example in examples:
        for number, key in enumerate(get_image_keys(example)):
            images[key] = example, number
    return images


def _count_patches(model: Any, processor: Any, images: Mapping[str, ImagePlace]) -> int:
    """Coarse patches of all images. Of images of any size, the files' sizes are read."""
    if not processor.is_any_size:
        return len(images) * model.config.grid.num_patches
    sizes: dict[int, list[tuple[int, int]]] = {}  # of an example's images
    num_patches = 0
    for example, number in images.values():
        if id(example) not in sizes:
            sizes[id(example)] = example.read_sizes()
        rows, columns = processor.choose_grid(*sizes[id(example)][number])
        num_patches += rows * columns
    return num_patches


def _check_room(
    folder: Path,
    num_images: int,
    num_values: int,
    views: dict[int, int],
    log: Callable[[str], None],
) -> None:
    """Log the size of the cache; raise UserError where the disk has less room.

    `num_values` are those of one view of every image.
    """
    num_bytes = 2 * num_values * sum(views.values())
    log(
        f"caching vision features of {num_images:,} images and {len(views)} taps:"
        f" {num_bytes / 2**20:,.0f} MiB in {folder}"
    )
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise UserError(
            f"the vision features need {num_bytes:,} bytes, but {folder} has {free:,} free; choose"
            " another disk, or train without feature_cache"
        )


@torch.inference_mode()
def _write_features(
    folder: Path,
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    views: dict[int, int],
    step: Step,
) -> list[list[int]]:
    """Write the features of all images, and their checksums.

    Args:
        folder: The cache's folder.
        model: The model.
        batches: What the model reads of the images, as `_prepare_images` returns it.
        views: Tap -> number of views.
        step: Shown meanwhile.

    Returns:
        Rows and columns of every image, where images are of any size.
    """
    files = {tap: get_file(folder, tap).open("wb") for tap in views}
    checksums: dict[int, list[int]] = {tap: [] for tap in views}
    grids = []
    for inputs in batches:
        grids += inputs[GRIDS].tolist() if GRIDS in inputs else []
        encoded = _encode_images(model, inputs, views)
        for tap, features in encoded.items():
            for values in features:
                _check_finite(values, tap)
                checksums[tap] += [zlib.crc32(view) for view in values.numpy()]
                files[tap].write(values.numpy().tobytes())
        step.advance(len(next(iter(encoded.values()))))
    for tap, file in files.items():
        _flush_to_disk(file)
        _write_checksums(get_file(folder, tap).with_suffix(".crc32"), checksums[tap])
    return grids


def _check_finite(values: Tensor, tap: int) -> None:
    """Raise UserError where features of a tap have overflown in half precision."""
    if not values.isfinite().all():
        raise UserError(
            f"vision features of tap {tap} are too large for half precision; train without"
            " feature_cache"
        )


def _write_checksums(path: Path, checksums: list[int]) -> None:
    with path.open("wb") as file:
        file.write(np.array(checksums, "<u4").tobytes())
        _flush_to_disk(file)


def _prepare_images(processor: Any, places: Sequence[ImagePlace]) -> dict[str, Tensor]:
    """What the encoder reads of some images; RecordError for a broken one."""
    images = [example.load_image(number, processor) for example, number in places]
    return processor.prepare_images(images)


def _flush_to_disk(file) -> None:
    """Have a file on disk, before an index says that it is whole, and close it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _encode_images(
    model: Any, inputs: dict[str, Tensor], views: dict[int, int]
) -> dict[int, list[Tensor]]:
    """Return tap -> float16 [V, N, D] of every image, on the CPU."""
    tower = model.vision_tower
    pixels = inputs["pixel_values"].to(tower.device, tower.dtype)
    grids = list_grids(inputs[GRIDS]) if GRIDS in inputs else None
    coarse = _read_views(model, pixels[:, :1], views, grids)
    fine_taps = [tap for tap, num_views in views.items() if num_views > 1]
    fine = _read_views(model, pixels[:, 1:], fine_taps, grids) if fine_taps else {}
    features = {}
    for tap, num_views in views.items():
        images = coarse[tap]
        if num_views > 1:
            images = _join_views(images, fine[tap], num_views)
        features[tap] = [image.to("cpu", torch.float16).contiguous() for image in images]
    return features


def _join_views(coarse: list[Tensor], fine: list[Tensor], num_views: int) -> list[Tensor]:
    """Of every image the coarse view and the first fine ones, [V, N, D]."""
    pairs = zip(coarse, fine, strict=True)
    return [torch.cat([first, others[: num_views - 1]]) for first, others in pairs]


def _read_views(
    model: Any, pixels: Tensor, taps: Iterable[int], grids: Grids | None
) -> dict[int, list[Tensor]]:
    """Return tap -> states [V, N, D] of every image, of some of its views."""
    from ..hooks import read_taps

    tower, grid = model.vision_tower, model.config.grid
    if grids is None:
        states = read_taps(tower, pixels.flatten(0, 1), grid, taps)
        return {tap: list(x.unflatten(0, (len(pixels), -1))) for tap, x in states.items()}
    sizes = [rows * columns for rows, columns in grids]
    states = read_patches(tower, grid, grids, pixels, list(taps))
    images = {}
    for tap, values in states.items():
        images[tap] = [patches.transpose(0, 1) for patches in values.split(sizes)]
    return images


def hash_encoder(model, processor) -> tuple[str, str]:
    """Return what identifies an encoder: two hashes.

    The first covers samples of its weights, and all that happens to its images before it. The
    second changes with any of its weights.
    """
    settings = _list_settings(processor)
    text = f"{weights_hash(model.vision_tower)} {json.dumps(settings)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16], weights_sum(model.vision_tower)


def _list_settings(processor) -> list:
    """What is done to an image, or a clip, before the encoder reads it."""
    if get_medium(processor) == "audio":
        return [processor.feature_extractor.to_dict()]
    image_processor = processor.image_processor
    limits = ("min_pixels", "max_pixels", "patch_size", "merge_size")
    return [
        image_processor.do_rescale,
        image_processor.rescale_factor,
        image_processor.do_normalize,
        image_processor.image_mean,
        image_processor.image_std,
        processor.image_size,
        processor.coarse,
        *([getattr(processor, name) for name in limits] if processor.is_any_size else []),
    ]


def check_encoder(cache, model, processor) -> None:
    """Raise UserError where another encoder made cached features; those in memory are the model's.

    Args:
        cache: A `VisionFeatureCache`, or what is read like one.
        model: The model that will read the features.
        processor: Its processor.
    """
    is_on_disk = isinstance(cache, VisionFeatureCache)
    if is_on_disk and not cache.is_of(hash_encoder(model, processor)):
        raise UserError(
            f"the vision features in {cache.folder} were made by another encoder, or from images"
            f" prepared in another way; {TO_START_OVER}, or give another folder"
        )
