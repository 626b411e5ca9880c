"""An image file of anything is an image in RGB, or a sentence."""

import io

import numpy as np
from helpers.fuzzing import draw_damaged
from hypothesis import strategies as st
from PIL import Image, features

from sparsecut.data.images import ImageStore, decode_image
from sparsecut.schema import UserError

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"),
    "PPM": ("1", "L", "RGB"),
    "AVIF": ("RGB", "RGBA"),
    "DDS": ("RGB", "RGBA"),
    "ICO": ("RGBA",),
    "TGA": ("RGB", "RGBA"),
}
MOST_PIXELS = 10**8


def make_files() -> list[bytes]:
    """One small file of every format and mode that Pillow can write here."""
    Image.init()
    levels = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    files = []
    for kind, modes in MODES.items():
        if kind not in Image.SAVE or (kind == "AVIF" and not features.check("avif")):
            continue
        for mode in modes:
            image = Image.fromarray(levels)
            if mode == "I;16":
                image = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
            file = io.BytesIO()
            image.convert(mode).save(file, kind)
            files.append(file.getvalue())
    return files


def test_damaged_files(fuzz, tmp_path):
    files = make_files()
    store = ImageStore(tmp_path)

    def check(content):
        (tmp_path / "image.png").write_bytes(content)
        results = []
        for load in (lambda: decode_image(content), lambda: store.load("image.png")):
            try:
                image = load()
            except UserError:
                results.append(None)
                continue
            assert image.mode == "RGB"
            assert 0 < image.width * image.height < MOST_PIXELS
            results.append(np.asarray(image))
        first, second = results
        assert (first is None) == (second is None), "a file and its bytes differ"
        assert first is None or np.array_equal(first, second)

    fuzz(check, st.sampled_from(files).flatmap(draw_damaged))


def test_intact_files_are_read():
    assert len(make_files()) > 20
