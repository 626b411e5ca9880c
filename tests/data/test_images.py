"""Images by name, from folders and archives."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from sparsecut.data.images import ImageStore
from sparsecut.loading import open_image
from sparsecut.schema import UserError


@pytest.mark.parametrize("name", ["p.tar", "p.tar.gz", "p.tgz"])
def test_archives_give_the_folder_s_images(image_folder, name):
    with tarfile.open(image_folder / name, "w:gz" if name.endswith("gz") else "w") as archive:
        archive.add(image_folder / "a.png", "./a.png")
        archive.add(image_folder / "sub", "sub")
    archived, folder = ImageStore(image_folder / name), ImageStore(image_folder)
    assert "sub" not in archived
    for image in ("a.png", "sub/b.png"):
        assert image in archived
        assert np.array_equal(archived.load(image), folder.load(image))


def test_what_cannot_be_read_is_refused(image_folder, monkeypatch):
    (image_folder / "bad.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match=r"bad.tar"):
        ImageStore(image_folder / "bad.tar")
    with pytest.raises(UserError, match="nowhere"):
        ImageStore(image_folder / "nowhere")
    store = ImageStore(image_folder)
    for name in ("broken.png", "absent.png"):
        with pytest.raises(UserError, match=name):
            store.load(name)
    monkeypatch.setattr("sparsecut.data.images.MEMORY_LIMIT", 100)
    with tarfile.open(image_folder / "big.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("empty"), io.BytesIO())
        archive.add(image_folder / "a.png", "a.png")
    with pytest.raises(UserError, match=r"big.tar.gz .*unpack"):
        ImageStore(image_folder / "big.tar.gz")


def test_photographs_are_upright(tmp_path):
    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, :8] = 250  # white on the left, as the camera held sideways stored it
    exif = Image.Exif()
    exif[274] = 6  # to be turned a quarter clockwise
    Image.fromarray(wide).save(tmp_path / "a.jpg", exif=exif, quality=95)
    for image in (ImageStore(tmp_path).load("a.jpg"), open_image(tmp_path / "a.jpg")):
        turned = np.asarray(image)
        assert turned.shape == (16, 8, 3)
        assert turned[:8].mean() > 230 > 20 > turned[8:].mean()
