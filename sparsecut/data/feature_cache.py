"""Vision features of a frozen encoder on disk: every image is encoded once.

A folder holds index.json (which encoder, taps, views and images) and one file per tap, float16,
[images, V, N, D]. Files are memory-mapped, so several processes share them. Half precision rounds a
feature by at most 1 part in 2,048.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..fingerprint import weights_hash
from ..schema import UserError, read_json_file
from .examples import Example

INDEX = "index.json"


class VisionFeatureCache:
    """The vision features that a folder holds.

    Attributes:
        folder: The folder.
        encoder: A hash of the encoder and of how it gets its images.
        rows: Key of an image -> its row in every file.
        views: Tap -> number of views.
        maps: Tap -> memory-mapped array [images, V, N, D].
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = read_json_file(self.folder / INDEX)
        self.encoder = index["encoder"]
        self.rows = {key: row for row, key in enumerate(index["pictures"])}
        self.views = {int(tap): num_views for tap, num_views in index["taps"].items()}
        self.shape = index["num_patches"], index["width"]
        self.maps = {tap: self._map_file(tap) for tap in self.views}

    def _map_file(self, tap: int) -> np.memmap:
        shape = len(self.rows), self.views[tap], *self.shape
        return np.memmap(_get_file(self.folder, tap), np.float16, "r", shape=shape)

    def __reduce__(self):
        # Other processes map the files again instead of being sent their contents.
        return VisionFeatureCache, (self.folder,)

    def read(self, example: Example, views: dict[int, int]) -> dict[int, Tensor]:
        """Return tap -> float16 [images of the example, V, N, D].

        Args:
            example: An example whose images are all in the cache.
            views: Tap -> number of views to read.
        """
        rows = [self.rows[key] for key in get_image_keys(example)]
        return {tap: torch.from_numpy(self.maps[tap][rows, :num]) for tap, num in views.items()}

    def make_blank(self, views: dict[int, int]) -> dict[int, Tensor]:
        """Return features of an image that shows nothing: tap -> zeros [1, V, N, D]."""
        features = {}
        for tap, num_views in views.items():
            features[tap] = torch.zeros(1, num_views, *self.shape, dtype=torch.float16)
        return features

    def covers(self, encoder: str, keys: Collection[str], views: dict[int, int]) -> bool:
        """Return whether the cache holds these images, taps and views, made by that encoder.

        Fine views of another grid are other views.
        """
        if self.encoder != encoder:
            return False
        for tap, num_views in views.items():
            if tap not in self.views or num_views not in (1, self.views[tap]):
                return False
        return all(key in self.rows for key in keys)


def get_tap_views(plan, vision_depth: int) -> dict[int, int]:
    """Return the taps that a plan reads, each with its number of views: the coarse one, or all."""
    fine = plan.fine_taps(vision_depth)
    return {tap: plan.num_views if tap in fine else 1 for tap in plan.resolved_taps(vision_depth)}


def get_image_keys(example: Example) -> list[str]:
    """Return a key for each of an example's images that no other image has."""
    folder = os.path.abspath(example.store.path) if example.store is not None else ""
    keys = []
    for image in example.images:
        if isinstance(image, str):
            keys.append(f"{folder}/{image}")
        else:
            keys.append("sha1:" + hashlib.sha1(image).hexdigest())
    return keys


def build_feature_cache(
    folder: str | Path,
    model,
    processor,
    examples: Sequence[Example],
    views: dict[int, int] | None = None,
    *,
    batch_size: int = 32,
    log: Callable[[str], None] = lambda line: None,
) -> VisionFeatureCache:
    """Encode all images of the examples into a folder, unless it holds them, and open it.

    A folder that lacks something is made anew.

    Args:
        folder: The cache's folder.
        model: A built model.
        processor: Its processor, or one with more tiles.
        examples: Their images are encoded.
        views: Tap -> number of views; by default what the model's plan reads.
        batch_size: Images that are encoded together.
        log: Called with one line about what is written.

    Raises:
        UserError: The processor makes too few views, the disk is too small, or a feature does not
            fit half precision.
    """
    folder = Path(folder)
    views = views or get_tap_views(model.plan, model.config.vision_depth)
    if max(views.values()) > processor.num_views:
        raise UserError(
            f"features of {max(views.values())} views are wanted, but the processor makes"
            f" {processor.num_views} of an image; pass the processor of a plan with as many tiles"
        )
    images = _list_images(examples)
    encoder = _hash_encoder(model, processor)
    if (folder / INDEX).is_file():
        cache = VisionFeatureCache(folder)
        if cache.covers(encoder, images, views):
            return cache
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _check_room(folder, model.config.grid, len(images), views, log)
    _write_features(folder, model, processor, list(images.values()), views, batch_size)
    index = {
        "encoder": encoder,
        "num_patches": model.config.grid.num_patches,
        "width": model.config.grid.width,
        "taps": views,
        "pictures": list(images),
    }
    # The index is written last: a folder that has one is complete.
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return VisionFeatureCache(folder)


def _list_images(examples: Sequence[Example]) -> dict[str, tuple[Example, int]]:
    """Key of an image -> an example that has it, and its number there."""
    images = {}
    for example in examples:
        for number, key in enumerate(get_image_keys(example)):
            images[key] = example, number
    return images


def _check_room(
    folder: Path, grid, num_images: int, views: dict[int, int], log: Callable[[str], None]
) -> None:
    """Log the size of the cache; raise UserError where the disk has less room."""
    num_bytes = 2 * num_images * sum(views.values()) * grid.num_patches * grid.width
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
    model,
    processor,
    images: list[tuple[Example, int]],
    views: dict[int, int],
    batch_size: int,
) -> None:
    files = {tap: _get_file(folder, tap).open("wb") for tap in views}
    for start in range(0, len(images), batch_size):
        batch = [
            example.load_images()[number] for example, number in images[start : start + batch_size]
        ]
        for tap, features in _encode_images(model, processor, batch, views).items():
            if not features.isfinite().all():
                raise UserError(
                    f"vision features of tap {tap} are too large for half precision; train without"
                    " feature_cache"
                )
            features.numpy().tofile(files[tap])
    for file in files.values():
        file.close()


def _encode_images(
    model, processor, images: list[Image.Image], views: dict[int, int]
) -> dict[int, Tensor]:
    """Return tap -> float16 [images, V, N, D] on the CPU."""
    from ..hooks import read_taps

    tower, grid = model.vision_tower, model.config.grid
    pixels = processor.pixels(images).to(tower.device, tower.dtype)
    coarse = read_taps(tower, pixels[:, 0], grid, views)
    fine_taps = [tap for tap, num_views in views.items() if num_views > 1]
    fine = {}
    if fine_taps:
        fine = read_taps(tower, pixels[:, 1:].flatten(0, 1), grid, fine_taps)
    features = {}
    for tap, num_views in views.items():
        parts = [coarse[tap][:, None]]
        if num_views > 1:
            parts.append(fine[tap].unflatten(0, (len(images), -1))[:, : num_views - 1])
        features[tap] = torch.cat(parts, dim=1).to("cpu", torch.float16)
    return features


def _hash_encoder(model, processor) -> str:
    """A hash of the encoder's weights and of all that happens to its images before it."""
    image_processor = processor.image_processor
    settings = [
        image_processor.do_rescale,
        image_processor.rescale_factor,
        image_processor.do_normalize,
        image_processor.image_mean,
        image_processor.image_std,
        processor.image_size,
        processor.coarse,
    ]
    text = f"{weights_hash(model.vision_tower)} {json.dumps(settings)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _get_file(folder: Path, tap: int) -> Path:
    return folder / f"tap-{tap:02}.f16"
