"""Pictures by digest, and their features kept under a limit of bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from PIL import Image


@dataclass(frozen=True)
class Picture:
    """A picture and what it is known by; views: what the encoder takes of it, [1, V, 3, h, w], in
    place of the picture where known.
    """

    digest: str
    image: Image.Image | None = None
    views: torch.Tensor | None = None

    @classmethod
    def of(cls, image: Image.Image, processor=None) -> Picture:
        """A picture by the digest of its size and pixels; its views alone where a processor of ours
        is given.
        """
        image = image if image.mode == "RGB" else image.convert("RGB")
        digest = sha256(repr(image.size).encode())
        digest.update(image.tobytes())
        digest = digest.hexdigest()
        return (
            cls(digest, image)
            if processor is None
            else cls(digest, views=processor.pixels([image]))
        )


@dataclass
class ImageFeatureCache:
    """Features of pictures under a limit of bytes; the longest unused go first."""

    limit: int
    size: int = 0
    found: OrderedDict = field(default_factory=OrderedDict)

    def get(self, key):
        """The features kept under a key, or None."""
        if key in self.found:
            self.found.move_to_end(key)
        return self.found.get(key)

    def put(self, key, features: list[torch.Tensor]) -> None:
        """Keep features, unless they alone are more than the limit."""
        num_bytes = sum(f.nbytes for f in features)
        if num_bytes > self.limit:
            return
        self.found[key] = features
        self.size += num_bytes
        while self.size > self.limit:
            self.size -= sum(f.nbytes for f in self.found.popitem(last=False)[1])
