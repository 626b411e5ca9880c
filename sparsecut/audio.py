"""Any sound to mono samples: files, bytes, URLs, arrays and tensors.

Every audio file that this package reads goes through here, so it has the same samples by every way.
Channels are averaged. The processor resamples to the rate of its encoder.
"""

from __future__ import annotations

import importlib
import io
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .pixels import URL_STARTS, read_url
from .schema import UserError
from .tensors import is_tensor

# No other decoder of libsndfile is run. A file's name does not matter, only what it holds.
FORMATS = ("WAV", "WAVEX", "FLAC", "MP3", "OGG")
FORMAT_NAMES = "WAV, FLAC, MP3 or OGG"
MAX_VALUES = 2**26  # samples of all channels; a file of some KiB can hold hours of silence
RATES = (1_000, 768_000)  # samples per second that files of sound have
UNKNOWN_SIZE = 2**31 - 2**16  # a program that writes into a pipe notes such a size, or none


class Clip(NamedTuple):
    """Some seconds of sound.

    Attributes:
        samples: Float32 [samples], mono, between -1 and 1.
        rate: Samples per second.
    """

    samples: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate


AudioSource = Clip | str | Path | bytes | dict


def open_audio(source: AudioSource) -> Clip:
    """Return a clip of sound, mono, at its own rate.

    Args:
        source: The path of a file, a file's bytes, an http(s) or data URL, a clip, or a row of an
            Audio column of `datasets` ({"array", "sampling_rate"} or {"bytes", "path"}).

    Raises:
        UserError: There is no such file, or it is no sound that can be read.
    """
    if isinstance(source, Clip):
        return source
    if isinstance(source, dict):
        return _open_row(source)
    if isinstance(source, bytes):
        return decode_audio(source)
    if isinstance(source, str) and source[:8].lower().startswith(URL_STARTS):
        return decode_audio(read_url(source, "audio"), f"the audio {source[:60]}")
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError, TypeError):  # no path at all
        is_file = False
    if not is_file:
        raise UserError(f"there is no audio {str(source)[:300]}; give the path of an audio file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"the audio {source} cannot be read ({error.strerror})") from None
    return decode_audio(data, f"the audio {source}")


def _open_row(row: dict) -> Clip:
    if row.get("array") is not None and row.get("sampling_rate"):
        return Clip(to_samples(row["array"]), int(row["sampling_rate"]))
    source = row.get("bytes") or row.get("path")
    if not source:
        raise UserError(
            f"an audio has the keys {', '.join(map(str, row))}, but needs array and sampling_rate,"
            " bytes, or a path"
        )
    return open_audio(source)


def decode_audio(data: bytes, what: str = "the audio") -> Clip:
    """Return the clip of an audio file's bytes.

    Args:
        data: The file.
        what: What it is, for the message of an error.

    Raises:
        UserError: It is of another format, broken, cut off, empty or too long; or the package that
            reads audio is missing.
    """
    soundfile = import_reader("soundfile", what)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, what)
            samples = file.read(dtype="float32", always_2d=True).mean(axis=1, dtype=np.float32)
            is_cut = len(samples) < file.frames or is_cut_wav(data)
            rate = file.samplerate
    except UserError:
        raise
    except Exception as error:  # of a broken file it may be anything
        reason = str(error).rpartition(": ")[2].rstrip(".") or type(error).__name__
        raise UserError(
            f"{what} cannot be read ({reason}): it is broken, or its format is not"
            f" {FORMAT_NAMES}; convert it to one of them"
        ) from None
    if is_cut:
        raise UserError(f"{what} ends early: it was cut off; give the whole file")
    _check_samples(samples, what)
    return Clip(samples, rate)


def _check_header(file: Any, what: str) -> None:
    """Raise UserError for what must not be decoded, before it is."""
    if file.format not in FORMATS:
        raise UserError(f"{what} has the format {file.format}; convert it to {FORMAT_NAMES}")
    if not RATES[0] <= file.samplerate <= RATES[1]:
        raise UserError(
            f"{what} has {file.samplerate} samples per second, but sound has {RATES[0]:,} to"
            f" {RATES[1]:,}; convert it"
        )
    if file.frames * file.channels > MAX_VALUES:
        raise UserError(
            f"{what} has {file.frames / file.samplerate:,.0f} s in {file.channels} channels, which"
            f" are more than {MAX_VALUES:,} samples; cut it into parts"
        )


def _check_samples(samples: np.ndarray, what: str) -> None:
    if not len(samples):
        raise UserError(f"{what} has no samples; leave it out")
    if not np.isfinite(samples).all():
        raise UserError(f"{what} has samples that are no numbers (NaN or infinite); write it again")


def is_cut_wav(data: bytes) -> bool:
    """Whether a WAV file has fewer bytes than it says; libsndfile would read what is there."""
    if data[:4] != b"RIFF":
        return False
    place = 12
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        if name == b"data":
            return size < UNKNOWN_SIZE and place + 8 + size > len(data)
        place += 8 + size + size % 2
    return False


def to_samples(values: Any) -> np.ndarray:
    """Return an array, tensor or list of numbers as float32 [samples].

    Raises:
        UserError: It holds something else, or has no sample.
    """
    if is_tensor(values):
        values = values.detach().cpu().float().numpy()
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "iuf" or array.ndim != 1:
        raise UserError(
            f"an audio of shape {list(array.shape)} and type {array.dtype} is no sound; give mono"
            " samples [samples] between -1 and 1, a path, or the bytes of a file"
        )
    if array.dtype in (np.int16, np.int32):  # as files and sound cards have them
        array = array / -float(np.iinfo(array.dtype).min)
    elif array.dtype.kind in "iu" and np.abs(array).max(initial=0) > 1:
        raise UserError(
            f"an audio has whole numbers up to {np.abs(array).max()} ({array.dtype}), whose scale"
            " is not known; give floats between -1 and 1, or int16"
        )
    samples = array.astype(np.float32)
    _check_samples(samples, "the audio")
    return samples


def resample(clip: Clip, rate: int) -> np.ndarray:
    """Return a clip's samples at another rate, float32, as transformers' `load_audio` does."""
    if clip.rate == rate:
        return clip.samples
    soxr = import_reader("soxr", f"audio of {clip.rate} samples per second")
    return soxr.resample(clip.samples, clip.rate, rate, quality="HQ").astype(np.float32)


def import_reader(package: str, what: str) -> Any:
    """Return a package of the extra `audio`; UserError where it is missing, for `what`."""
    try:
        return importlib.import_module(package)
    except (ImportError, OSError):  # OSError: its library is missing
        raise UserError(
            f"{what} needs the package {package}, which is not installed; install it: pip install"
            " 'sparsecut[audio]'"
        ) from None
