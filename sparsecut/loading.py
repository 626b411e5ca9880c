"""Reading images, models and weights from files; what cannot be read is the user's to mend."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .schema import UserError

ImageSource = Image.Image | str | Path
PACKAGE = str(Path(__file__).parent)
FILE_ERRORS = (OSError, SafetensorError, StrictDataclassError)  # whoever reads the file


def load_pretrained(kind, name, complaint: str, **settings):
    """Call `kind.from_pretrained`.

    A damaged file makes transformers and tokenizers raise almost any error. Each means that the
    folder cannot be read, unless our own code was running.

    Args:
        kind: A class with `from_pretrained`, such as AutoConfig.
        name: A folder or hub name.
        complaint: What cannot be read and what to give instead; the reason is put behind it.
        **settings: Further arguments of `from_pretrained`.

    Raises:
        UserError: There is no such folder or hub name, or it is damaged.
    """
    try:
        return kind.from_pretrained(name, **settings)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        is_about_files = isinstance(error, FILE_ERRORS)
        if _arose_in_our_code(error) and not is_about_files:
            raise
        reason = str(error) if is_about_files else f"{type(error).__name__}: {error}"
        raise UserError(f"{complaint}. Hugging Face says: {reason}") from error


def _arose_in_our_code(error: Exception) -> bool:
    """Whether code of this package ran below the call; its own `from_pretrained` only passes on."""
    for frame, _ in traceback.walk_tb(error.__traceback__.tb_next):
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and code.co_name != "from_pretrained":
            return True
    return False


def read_tensors(file: Path, remedy: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; UserError where it is missing or damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights {file} cannot be read ({error}); {remedy}") from error


def open_upright(file) -> Image.Image:
    """Read an image file as RGB, turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(Image.open(file)).convert("RGB")


def open_image(source: ImageSource) -> Image.Image:
    """Return an image as it is, or read it from a path.

    Raises:
        UserError: There is no such file, or it is no image that can be read.
    """
    if isinstance(source, Image.Image):
        return source
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"there is no image {source}; give the path of an image file")
    try:
        return open_upright(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"the image {source} cannot be read ({error}); give a PNG or JPEG file"
        ) from error
