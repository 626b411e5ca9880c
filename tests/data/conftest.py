"""A folder of images for the tests of the data package."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def image_folder(tmp_path):
    """A folder of images: a.png and sub/b.png are good, broken.png is not."""
    (tmp_path / "sub").mkdir()
    for seed, name in enumerate(["a.png", "sub/b.png"]):
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path
