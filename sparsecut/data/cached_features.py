"""Reading the vision features that a folder holds (`feature_cache` writes them).

Nothing is read in silence that is not what it was. Every view is checked against its checksum, and
every image against what it held when it was encoded, where a process reads them first.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..schema import UserError, read_json_file
from .examples import Example
from .file_facts import describe_image, hold_same_contents

INDEX = "index.json"
INDEX_KEYS = ("encoder", "num_patches", "width", "taps", "pictures")
TO_START_OVER = "remove that folder, and the features are made again"

ImagePlace = tuple[Example, int]  # an example that has an image, and its number there


class VisionFeatureCache:
    """The vision features that a folder holds.

    Attributes:
        folder: The folder.
        encoder: A hash of the encoder and of how it gets its images.
        encoder_sum: A hash that changes with any of its weights; None in folders of old versions.
        keys: The image of every row, as `get_image_keys` names it.
        facts: Of every row, what its image held (`file_facts`); None where the key says it, or in
            folders of old versions.
        rows: Key of an image -> its row in every file, also of images that were found elsewhere.
        views: Tap -> number of views.
        grids: Rows and columns of every row's image; None where all images have the size of a view.
        maps: Tap -> memory-mapped array [images, V, N, D]; of images of any size flat, every image
            [V, N, D] after the other.
        checksums: Tap -> array [images, V]; empty in folders of old versions.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None:
            raise UserError(
                f"{folder} holds no vision features ({INDEX} with {', '.join(INDEX_KEYS)}); give"
                " the folder that feature_cache names"
            )
        self.encoder = index["encoder"]
        self.encoder_sum = index.get("encoder_sum")
        self.keys = index["pictures"]
        self.facts = index.get("facts") or [None] * len(self.keys)
        self.rows = {key: row for row, key in enumerate(self.keys)}
        self.views = {int(tap): num_views for tap, num_views in index["taps"].items()}
        self.grids = index.get("grids")
        self.shape = index["num_patches"], index["width"]
        self._ends = np.cumsum([0, *(rows * columns for rows, columns in self.grids or ())])
        self.maps = {tap: self._map_file(tap) for tap in self.views}
        self.checksums = {}
        if self.has_checks:
            self.checksums = {tap: self._read_checksums(tap) for tap in self.views}
        num_images = len(self.keys)
        self._checked_views = {
            tap: np.zeros((num_images, n), bool) for tap, n in self.views.items()
        }
        self._checked_images: dict[str, int] = {}
        self._rows_by_digest = {
            facts[-1]: row for row, facts in enumerate(self.facts) if facts is not None
        }

    @property
    def has_checks(self) -> bool:
        """Whether images and features can be checked: old versions wrote nothing to check."""
        return self.encoder_sum is not None

    @property
    def version(self) -> str:
        """What tells these features from others that were written into the folder later."""
        total = hashlib.sha256(f"{self.encoder} {self.encoder_sum} {self.views}".encode())
        for checksums in self.checksums.values():
            total.update(checksums.tobytes())
        return total.hexdigest()

    def _map_file(self, tap: int) -> np.memmap:
        shape = len(self.keys), self.views[tap], *self.shape
        if self.grids is not None:
            shape = (int(self._ends[-1]) * self.views[tap] * self.shape[1],)
        file = get_file(self.folder, tap)
        _check_size(file, 2 * int(np.prod(shape)))
        return np.memmap(file, np.float16, "r", shape=shape)

    def _get_views(self, tap: int, row: int) -> np.ndarray:
        """What a row's image has in the file of a tap, [V, N, D]."""
        if self.grids is None:
            return self.maps[tap][row]
        num_views, width = self.views[tap], self.shape[1]
        first, last = self._ends[row : row + 2] * num_views * width
        return self.maps[tap][first:last].reshape(num_views, -1, width)

    def _read_checksums(self, tap: int) -> np.ndarray:
        file = get_file(self.folder, tap).with_suffix(".crc32")
        _check_size(file, 4 * len(self.keys) * self.views[tap])
        return np.fromfile(file, "<u4").reshape(len(self.keys), self.views[tap])

    def __reduce__(self):
        # Other processes map the files again instead of being sent their contents.
        return _open_again, (self.folder, self.version, self._list_moved())

    def _list_moved(self) -> dict[str, int]:
        """Images that were found at another place than the index says."""
        moved = self._checked_images.items()
        return {key: row for key, row in moved if self.keys[row] != key}

    def read(self, example: Example, views: dict[int, int]) -> dict[int, Tensor]:
        """Return tap -> float16 [images of the example, V, N, D].

        Args:
            example: An example whose images are all in the cache.
            views: Tap -> number of views to read.

        Returns:
            Of images of any size, tap -> [S, V, D] of all their patches (`read_grids`).

        Raises:
            UserError: An image is not in the cache or has changed since, or its features are
                damaged.
        """
        rows = self._find_rows(example)
        features = {}
        for tap, num_views in views.items():
            images = []
            for row in rows:
                self._check_views(tap, row, num_views)
                images.append(torch.from_numpy(self._get_views(tap, row)[:num_views].copy()))
            features[tap] = self._join(images)
        return features

    def _join(self, images: list[Tensor]) -> Tensor:
        """Views [V, N, D] of some images as the model takes them."""
        if self.grids is None:
            return torch.stack(images)
        return torch.cat([views.transpose(0, 1) for views in images])

    def read_grids(self, example: Example) -> list[list[int]]:
        """Return rows and columns of an example's images of any size; errors as for `read`."""
        return [self.grids[row] for row in self._find_rows(example)]

    def _find_rows(self, example: Example) -> list[int]:
        rows = []
        for number, key in enumerate(get_image_keys(example)):
            row = self.find_row(key, (example, number))
            if row is None:
                raise UserError(
                    f"{self.folder} holds no features of the image {key} as it is now; it is new,"
                    f" or has changed since; {TO_START_OVER}"
                )
            rows.append(row)
        return rows

    def find_row(self, key: str, place: ImagePlace) -> int | None:
        """Return the row of an image; None where the cache lacks it, or its contents of now."""
        if key in self._checked_images:
            return self._checked_images[key]
        row = self.rows.get(key)
        example, number = place
        name = example.images[number]
        if isinstance(name, str) and self.has_checks:
            row = self._find_contents(example.store, name, row)
        if row is not None:
            self._checked_images[key] = row
        return row

    def _find_contents(self, store, name: str, row: int | None) -> int | None:
        """The row of an image's contents; `row` is that of its place."""
        store.check(name)
        known = None if row is None else self.facts[row]
        facts = describe_image(store, name, known)
        if known is None or not hold_same_contents(facts, known):
            return self._rows_by_digest.get(facts[-1])
        return row

    def _check_views(self, tap: int, row: int, num_views: int) -> None:
        """Raise UserError where features are not what was written; each is checked once."""
        if not self.checksums:
            return
        checked = self._checked_views[tap][row, :num_views]
        if checked.all():
            return
        views = self._get_views(tap, row)
        for view in range(num_views):
            if zlib.crc32(views[view]) != self.checksums[tap][row, view]:
                raise UserError(
                    f"the features of {self.keys[row]} in {get_file(self.folder, tap)} are not what"
                    f" was written: the file is damaged; {TO_START_OVER}"
                )
        checked[:] = True

    def make_blank(
        self, views: dict[int, int], grid: tuple[int, int] | None = None
    ) -> dict[int, Tensor]:
        """Return features of an image that shows nothing: tap -> zeros, shapes as `read` has them.

        Args:
            views: Tap -> number of views.
            grid: Rows and columns of an image of any size.
        """
        num_patches, width = self.shape if grid is None else (grid[0] * grid[1], self.shape[1])
        features = {}
        for tap, num_views in views.items():
            zeros = torch.zeros(num_views, num_patches, width, dtype=torch.float16)
            features[tap] = self._join([zeros])
        return features

    def find_obstacle(
        self,
        encoder: tuple[str, str],
        images: Mapping[str, ImagePlace],
        views: dict[int, int],
    ) -> str | None:
        """Return why the cache cannot serve these images, taps and views; None where it can.

        Fine views of another grid are other views.

        Args:
            encoder: What `hash_encoder` returns.
            images: Key of an image -> where it is.
            views: Tap -> number of views.
        """
        if not self.is_of(encoder):
            return "it was made by another encoder"
        for tap, num_views in views.items():
            if tap not in self.views or num_views not in (1, self.views[tap]):
                return f"it lacks {num_views} views of tap {tap}"
        for key, place in images.items():
            if self.find_row(key, place) is None:
                return f"{key} is new or has changed"
        return None

    def is_of(self, encoder: tuple[str, str]) -> bool:
        """Whether an encoder, as `hash_encoder` identifies it, made these features."""
        return self.encoder == encoder[0] and self.encoder_sum in (None, encoder[1])


def _open_again(folder: Path, version: str, moved: dict[str, int]) -> VisionFeatureCache:
    """The cache as another process has it."""
    cache = VisionFeatureCache(folder)
    if cache.version != version:
        raise UserError(
            f"the vision features in {folder} were replaced while they were in use; give every run"
            " its own feature_cache, or start this one again"
        )
    cache._checked_images.update(moved)
    return cache


def read_index(folder: Path) -> dict | None:
    """Return the index of a folder; None where it has none that is ours."""
    if not (folder / INDEX).is_file():
        return None
    try:
        index = read_json_file(folder / INDEX)
    except UserError:
        return None
    return index if all(key in index for key in INDEX_KEYS) else None


def _check_size(file: Path, num_bytes: int) -> None:
    found = file.stat().st_size if file.is_file() else 0
    if found != num_bytes:
        raise UserError(
            f"{file} is damaged: it has {found:,} bytes in place of {num_bytes:,}; {TO_START_OVER}"
        )


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


def get_file(folder: Path, tap: int) -> Path:
    """Return the file of a tap's features."""
    return folder / f"tap-{tap:02}.f16"


def read_cached_grids(cache: Any, examples: Sequence[Example]) -> list[list[list[int]]] | None:
    """Return rows and columns of the images of every example; None where all are of one size.

    Args:
        cache: A `VisionFeatureCache`, or what is read like one.
        examples: The examples.
    """
    if getattr(cache, "grids", None) is None:
        return None
    return [cache.read_grids(example) for example in examples]
