"""Every image has the same right pixels by every way: transparent, deep, turned, broken."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sparsecut.data.images import ImageStore, decode_image
from sparsecut.pixels import FORMATS, open_image, parse_color, to_rgb
from sparsecut.schema import UserError
from sparsecut.serving import image_fetching

INK = np.zeros((16, 24), dtype=bool)  # where the glyph is
INK[4:12, 6:10] = INK[10:12, 6:18] = True
GLYPH = np.repeat(np.where(INK, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def make_alpha(mode: str) -> Image.Image:
    """The black glyph on nothing, which has black below it too."""
    black = Image.new("RGB", INK.shape[::-1]).convert("RGBA")
    black.putalpha(Image.fromarray(INK))
    return black.convert(mode)


def make_file(image: Image.Image, kind: str, **options) -> bytes:
    """An image as the bytes of a file."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def make_png(rows: bytes, bits: int, color: int, *chunks: bytes, size=INK.shape[::-1]) -> bytes:
    """A PNG file of packed rows without filters, of any depth, with chunks before the pixels."""

    def make_chunk(content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(content))
        return struct.pack(">I", len(content) - 4) + content + checksum

    width, height = size
    length = len(rows) // height
    lines = b"".join(b"\0" + rows[i * length :][:length] for i in range(height))
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = [header, *chunks, b"IDAT" + zlib.compress(lines), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(make_chunk, parts))


def pack_grey(bits: int) -> bytes:
    """Rows of the glyph: ink is 0, the rest the brightest value."""
    if bits == 16:
        return (~INK * np.uint16(65535)).astype(">u2").tobytes()
    planes = np.repeat(~INK[..., None], bits, axis=2).reshape(len(INK), -1)
    return np.packbits(planes, axis=1).tobytes()


def make_transparent_grey(bits: int) -> bytes:
    """A grey PNG file in which ink is black and another value, which is not white, is nothing."""
    rest = 1 if bits > 1 else 0
    if bits == 1:  # only two values: white ink on nothing would be white, so all is nothing
        return make_png(bytes(3 * 16), 1, 0, b"tRNS\0\0")
    values = np.where(INK, 0, rest)
    if bits == 16:
        rows = values.astype(">u2").tobytes()
    else:
        shifts = np.arange(bits)[::-1]
        rows = np.packbits((values[..., None] >> shifts & 1).reshape(len(INK), -1), axis=1)
        rows = rows.tobytes()
    return make_png(rows, bits, 0, b"tRNS" + struct.pack(">H", rest))


def make_transparent_color(bits: int) -> bytes:
    """A PNG file with three channels in which one dark colour is nothing."""
    nothing = np.array([8, 4, 2]) << (bits - 8)
    values = np.where(INK[..., None], 0, nothing)
    rows = values.astype(">u2" if bits == 16 else np.uint8).tobytes()
    return make_png(rows, bits, 2, b"tRNS" + struct.pack(">HHH", *map(int, nothing)))


def make_apng() -> bytes:
    other = Image.new("RGBA", INK.shape[::-1], (9, 9, 9, 255))
    return make_file(make_alpha("RGBA"), "PNG", save_all=True, append_images=[other])


def make_palette() -> Image.Image:
    """A palette of black ink and of a green that is nothing."""
    image = Image.fromarray(INK.astype(np.uint8))
    image.putpalette([0, 255, 0, 0, 0, 0])
    return image


TRANSPARENT = {
    "RGBA": lambda: make_file(make_alpha("RGBA"), "PNG"),
    "LA": lambda: make_file(make_alpha("LA"), "PNG"),
    "palette": lambda: make_file(make_palette(), "PNG", transparency=0),
    "palette of alphas": lambda: make_file(make_palette(), "PNG", transparency=b"\0\xff"),
    "grey, 2 bits": lambda: make_transparent_grey(2),
    "grey, 4 bits": lambda: make_transparent_grey(4),
    "grey, 8 bits": lambda: make_transparent_grey(8),
    "grey, 16 bits": lambda: make_transparent_grey(16),
    "RGB, 8 bits": lambda: make_transparent_color(8),
    "RGB, 16 bits": lambda: make_transparent_color(16),
    "APNG": make_apng,
    "GIF": lambda: make_file(make_palette(), "GIF", transparency=0),
    "WebP": lambda: make_file(make_alpha("RGBA"), "WEBP", lossless=True),
    "AVIF": lambda: make_file(make_alpha("RGBA"), "AVIF", quality=100, subsampling="4:4:4"),
    "TIFF": lambda: make_file(make_alpha("RGBA"), "TIFF"),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_lies_on_white_by_every_way(name, tmp_path):
    data = TRANSPARENT[name]()
    (tmp_path / "glyph.png").write_bytes(data)
    tolerance = 3 if name == "AVIF" else 0  # it loses a little
    ways = {
        "file": open_image(tmp_path / "glyph.png"),
        "bytes": open_image(data),
        "record": ImageStore(tmp_path).load("glyph.png"),
        "stored": decode_image(data),
        "request": image_fetching.decode_image(data, image_fetching.ImageLimits()),
        "PIL": to_rgb(Image.open(io.BytesIO(data))),
    }
    for way, image in ways.items():
        assert image.mode == "RGB", way
        assert abs(np.asarray(image).astype(int) - GLYPH).max() <= tolerance, way


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_pil_images_of_every_mode_with_alpha_lie_on_white_or_a_named_colour(mode):
    glyph = make_alpha("LA" if mode == "La" else "RGBA")
    if mode == "PA":  # Pillow loses the alpha on the way there
        glyph = make_palette()
        glyph.putalpha(Image.fromarray(INK))
    glyph = glyph.convert(mode)
    assert np.array_equal(to_rgb(glyph), GLYPH)
    blue = np.asarray(to_rgb(glyph, "blue"))
    assert (blue[INK] == 0).all()
    assert (blue[~INK] == (0, 0, 255)).all()


def test_half_transparent_pixels_are_mixed_and_opaque_ones_stay():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9, 9, 4), dtype=np.uint8)
    expected = pixels[..., :3] * (pixels[..., 3:] / 255) + 255 - pixels[..., 3:]
    assert abs(np.asarray(to_rgb(Image.fromarray(pixels))) - expected).max() <= 0.51
    pixels[..., 3] = 255
    assert np.array_equal(to_rgb(Image.fromarray(pixels)), pixels[..., :3])


def test_what_is_no_colour_is_refused():
    for color in ("mauve-ish", 3, (1, 2), (1, 2, 300)):
        with pytest.raises(UserError, match="background"):
            parse_color(color)


# --- deep images ---

GRADIENT = np.arange(65536).reshape(256, 256)


def make_pgm(maxval: int, ascii: bool = False) -> bytes:
    values = np.rint(GRADIENT * (maxval / 65535)).astype(int)
    if ascii:
        text = " ".join(map(str, values.ravel()))
        return f"P2\n256 256\n{maxval}\n{text}\n".encode()
    kind = ">u2" if maxval > 255 else np.uint8
    return f"P5\n256 256\n{maxval}\n".encode() + values.astype(kind).tobytes()


DEEP = {
    "PNG, 16 bits": lambda: make_file(Image.fromarray(GRADIENT.astype(np.uint16)), "PNG"),
    "TIFF, 16 bits": lambda: make_file(Image.fromarray(GRADIENT.astype(np.uint16)), "TIFF"),
    "TIFF, 16 bits, packed": lambda: make_file(
        Image.fromarray(GRADIENT.astype(np.uint16)), "TIFF", compression="tiff_lzw"
    ),
    "TIFF, 16 bits, big-endian": lambda: make_file(
        Image.frombytes("I;16B", (256, 256), GRADIENT.astype(">u2").tobytes()), "TIFF"
    ),
    "12 bits in 16": lambda: make_file(Image.fromarray((GRADIENT >> 4).astype(np.uint16)), "PNG"),
    "int32, 16 bits": lambda: make_file(Image.fromarray(GRADIENT.astype(np.int32)), "TIFF"),
    "int32": lambda: make_file(Image.fromarray((GRADIENT << 15).astype(np.int32)), "TIFF"),
    "floats to 1": lambda: make_file(
        Image.fromarray((GRADIENT / 65535).astype(np.float32)), "TIFF"
    ),
    "floats to 255": lambda: make_file(
        Image.fromarray((GRADIENT / 257).astype(np.float32)), "TIFF"
    ),
    "PGM to 65535": lambda: make_pgm(65535),
    "PGM to 4095": lambda: make_pgm(4095),
    "PGM to 1000": lambda: make_pgm(1000),
    "PGM to 200": lambda: make_pgm(200),
    "PGM to 4095, as text": lambda: make_pgm(4095, ascii=True),
    "PNG, RGB of 16 bits": lambda: make_png(
        np.repeat(GRADIENT, 3).astype(">u2").tobytes(), 16, 2, size=(256, 256)
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_keep_their_levels(name):
    data = DEEP[name]()
    expected = GRADIENT / 257
    tolerance = 1.4 if "200" in name else 1.01  # its steps are wider
    for image in (open_image(data), to_rgb(Image.open(io.BytesIO(data)))):
        levels = np.asarray(image).astype(float)
        assert abs(levels - expected[..., None]).max() < tolerance
        assert len(np.unique(levels)) >= (200 if "200" in name else 256)


def test_a_depth_that_is_declared_wins_over_the_brightest_value():
    dark = (GRADIENT // 1000).astype(">u2")  # up to 65
    image = open_image(b"P5\n256 256\n4095\n" + dark.tobytes())
    assert np.asarray(image).max() == round(65 * 255 / 4095)
    spread = (GRADIENT // 4096 * 257).astype(np.uint16)  # 0 to 15, spread from 8 bits
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(spread)))[..., 0], spread // 257)


REFUSED_VALUES = {
    "negative": GRADIENT.astype(np.int32) - 5,
    "odd depth": GRADIENT.astype(np.int32) * 100,
    "nan": np.full((3, 3), np.nan, np.float32),
    "infinite": np.full((3, 3), np.inf, np.float32),
    "heights": (GRADIENT / 10).astype(np.float32),
    "below zero": (GRADIENT / 65535 - 0.5).astype(np.float32),
    "radiance": (GRADIENT / 20000).astype(np.float32),
}


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_values_of_no_known_scale_are_refused(name, tmp_path):
    values = REFUSED_VALUES[name]
    Image.fromarray(values).save(tmp_path / "deep.tif")
    for source in (Image.fromarray(values), tmp_path / "deep.tif"):
        with pytest.raises(UserError, match="scale"):
            open_image(source)


@pytest.mark.parametrize("kind", ["CMYK", "YCbCr", "LAB", "HSV"])
def test_other_colour_spaces_come_back(kind):
    rng = np.random.default_rng(0)
    small = rng.integers(60, 190, (2, 3, 3), dtype=np.uint8)
    image = Image.fromarray(np.kron(small, np.ones((16, 16, 1), np.uint8)))
    if kind == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        other = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
        sources = [other, make_file(other, "TIFF")]
    else:
        other = image.convert(kind)
        sources = [other]
        if kind != "HSV":
            sources += [
                make_file(other, "TIFF"),
                make_file(other, "JPEG", quality=100, subsampling=0),
            ]
    for source in sources:
        assert abs(np.asarray(open_image(source)).astype(int) - np.asarray(image)).max() <= 6


# --- broken files ---


def test_no_other_decoder_is_run(tmp_path, monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.check_call", run)
    monkeypatch.setattr("subprocess.Popen.__init__", run)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "photo.png").write_bytes(eps)
    for kind in ("EPS", "TGA", "PCX", "ICO", "SGI", "IM", "DDS", "SPIDER", "ICNS", "JPEG2000"):
        image = Image.new("F" if kind == "SPIDER" else "RGB", (64, 64), 1)
        path = tmp_path / f"{kind}.file"  # Pillow would write SPIDER for .png from now on
        image.save(path, kind)
        path.rename(path.with_suffix(".png"))
    for path in tmp_path.iterdir():
        for read in (open_image, lambda path: ImageStore(tmp_path).load(path.name)):
            with pytest.raises(UserError, match=path.name) as error:
                read(path)
            assert "PNG" in str(error.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_refused_by_name_whatever_pillow_raises(kind, tmp_path):
    rng = np.random.default_rng(0)
    whole = make_file(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)), kind)
    path = tmp_path / "damaged.png"
    num_refused = 0
    for trial in range(60):
        damaged = bytearray(whole)
        if trial < 30:
            del damaged[len(whole) * trial // 31 :]
        else:
            for place in rng.integers(0, min(len(whole), 400), 12):
                damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert open_image(path).mode == "RGB"
        except UserError as error:
            assert path.name in str(error)
            num_refused += 1
    assert num_refused >= 25


def test_bombs_and_images_of_no_size_are_refused(monkeypatch, tmp_path):
    Image.new("RGB", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"bomb\.png"):
        open_image(tmp_path / "bomb.png")
    for size in ((0, 0), (5, 0), (0, 5)):
        with pytest.raises(UserError, match="x"):
            open_image(Image.new("RGB", size))


def test_an_image_that_was_handed_over_unread_and_is_broken_is_named(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(make_file(Image.fromarray(GLYPH), "PNG")[:70])
    with pytest.raises(UserError, match=r"cut\.png"):
        open_image(Image.open(path))


@pytest.mark.parametrize("name", ["", "absent.png", "x" * 5000, "a\0b", "~nobody/x", "data:,x"])
def test_what_is_no_image_is_refused(name):
    with pytest.raises(UserError, match="image"):
        open_image(name)
