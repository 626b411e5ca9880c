"""Images known by a digest, and a cache of their vision features with a limit of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from hashlib import sha256

from PIL import Image
from torch import Tensor

from ..audio import Clip


@dataclass(frozen=True)
class PreparedImage:
    """An image that waits for the model: either whole or as the encoder's views.

    Attributes:
        digest: SHA-256 of its size and pixels.
        image: The image in RGB; None where the views are known.
        views: What the encoder reads of it, [1, V, 3, h, w]; None where the image is cached.
        grid: Of an image of any size, rows and columns of patches, int64 [1, 2].
    """

    digest: str
    image: Image.Image | None = None
    views: Tensor | None = None
    grid: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of its pixels."""
        num_bytes = 0 if self.views is None else self.views.nbytes
        if self.image is not None:
            num_bytes += 3 * self.image.width * self.image.height
        return num_bytes


def hash_image(image: Image.Image) -> str:
    """SHA-256 of an RGB image's size and pixels."""
    digest = sha256(repr(image.size).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def hash_clip(clip: Clip) -> str:
    """SHA-256 of a clip's rate and samples."""
    digest = sha256(repr((clip.rate, len(clip.samples))).encode())
    digest.update(clip.samples.tobytes())
    return digest.hexdigest()


class ImageFeatureCache:
    """Vision features of images; those unused for longest go first.

    Attributes:
        max_bytes: Bytes of features at most; 0 keeps none.
        num_bytes: Bytes of the features in it.
        entries: Key -> features, the longest unused first.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.entries: OrderedDict[Hashable, list[Tensor]] = OrderedDict()

    def get(self, key: Hashable) -> list[Tensor] | None:
        """The features under a key, or None."""
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: Hashable, features: list[Tensor]) -> None:
        """Store features, unless they alone are more than the limit."""
        num_bytes = _count_bytes(features)
        if num_bytes > self.max_bytes:
            return
        self.entries[key] = features
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self.entries.popitem(last=False)
            self.num_bytes -= _count_bytes(oldest)


def _count_bytes(features: list[Tensor]) -> int:
    return sum(feature.nbytes for feature in features)
