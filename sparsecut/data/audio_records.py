"""Records of audio: they have the forms of records of images, with sound in the images' place.

`audio` or `audios` stands for `image` or `images`, `<audio>` for `<image>`, and parts of a content
are of type audio, input_audio or audio_url. So such a record becomes one of images before its form
is looked for, and its example says that it is audio.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..audio import import_reader, to_samples
from ..schema import UserError
from .turns import IMAGE

AUDIO = "<audio>"
KEYS = {"audio": "image", "audios": "images"}
PARTS = ("audio", "input_audio", "audio_url")
# Keys of a record that hold turns, so that audio may stand among their parts.
TURN_KEYS = ("messages", "conversations", "prompt")
NOT_TEXT = ("id", "group", "level", *KEYS)
CONTENT_KEYS = ("content", "value")


def find_medium(record: Any) -> str:
    """Return "audio" where a record holds audio, and "image" otherwise.

    Raises:
        UserError: It holds both.
    """
    if not isinstance(record, dict):
        return "image"
    audio = [key for key in KEYS if _holds_value(record.get(key))]
    has_audio = bool(audio) or _has_audio_part(record)
    images = [key for key in KEYS.values() if _holds_value(record.get(key))]
    if has_audio and images:
        raise UserError(
            f"the record has audio and `{images[0]}`, but a model takes one of them beside text;"
            " remove one"
        )
    return "audio" if has_audio else "image"


def _holds_value(value: Any) -> bool:
    """Whether a key has a value; arrays have no truth of their own."""
    return value is not None and not (isinstance(value, str | bytes | list | dict) and not value)


def _has_audio_part(record: dict) -> bool:
    for key in TURN_KEYS:
        turns = record.get(key)
        if isinstance(turns, list):
            parts = [part for turn in turns for part in _list_parts(turn)]
            if any(map(_is_audio_part, parts)):
                return True
    return False


def _list_parts(turn: Any) -> list:
    for key in CONTENT_KEYS:
        if isinstance(turn, dict) and isinstance(turn.get(key), list):
            return turn[key]
    return []


def _is_audio_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    return kind in PARTS if isinstance(kind, str) else kind is None and "audio" in part


@contextmanager
def explain_audio(medium: str) -> Iterator[None]:
    """Name audio in the errors of a record that became one of images."""
    try:
        yield
    except UserError as error:
        if medium != "audio":
            raise
        text = str(error).replace(".png", ".wav").replace("an image", "an audio file")
        raise UserError(text.replace("images", "audios").replace("image", "audio")) from None


def put_for_images(record: Any, medium: str) -> Any:
    """Return a record of audio as one of images; other records come back as they are.

    Raises:
        UserError: Its text has `<image>`.
    """
    if medium != "audio":
        return record
    changed = {}
    for key, value in record.items():
        if key in KEYS:
            changed[KEYS[key]] = _put_files(value)
        else:
            changed[key] = value if key in NOT_TEXT else _put_text(value)
    return changed


def _put_text(value: Any) -> Any:
    """A value of a record with placeholders and parts of audio as those of images."""
    if isinstance(value, str):
        if IMAGE in value:
            raise UserError(f"a text holds {IMAGE}, but the record has audio; write {AUDIO}")
        return value.replace(AUDIO, IMAGE)
    if isinstance(value, list):
        return [_put_text(item) for item in value]
    if _is_audio_part(value):
        return _put_part(value)
    if isinstance(value, dict):
        return {key: _put_text(item) for key, item in value.items()}
    return value


def _put_part(part: dict) -> dict:
    """A part with audio as a part with an image, or a place for one of the record's."""
    for key in (*PARTS, "path", "url", "data", "base64", "bytes"):
        if _holds_value(part.get(key)):
            name = key if key in ("data", "base64") else "image"
            return {"type": "image", name: _put_files(part[key])}
    rest = {key: part[key] for key in ("index",) if key in part}
    return {"type": "image", **rest}


def _put_files(value: Any) -> Any:
    """Decoded audio as the bytes of a file, as an Audio column of `datasets` may give it."""
    if isinstance(value, list | tuple):
        return [_put_files(item) for item in value]
    if isinstance(value, dict) and value.get("array") is not None and value.get("sampling_rate"):
        return encode_wav(to_samples(value["array"]), int(value["sampling_rate"]))
    return value


def encode_wav(samples: np.ndarray, rate: int) -> bytes:
    """Return a WAV file of mono float samples, which holds them in full."""
    file = io.BytesIO()
    soundfile = import_reader("soundfile", "audio")
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()
