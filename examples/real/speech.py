"""Spoken digits in many voices of espeak-ng, as WAV files and records of audio.

The library comes with the package espeakng-loader, which is GPL-3 as espeak-ng is. A voice is an
accent of English with a variant of the speaker. Test voices have accents and variants that training
never has.
"""

from __future__ import annotations

import ctypes
import json
import random
import wave
from pathlib import Path

import numpy as np
from fetch_packages import show_progress

from sparsecut.schema import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "which digit is it ?"
ACCENTS = {
    "train": ("en-us", "en", "en-gb-x-rp", "en-gb-x-gbclan", "en-us-nyc"),
    "test": ("en-gb-scotland", "en-029", "en-gb-x-gbcwmd"),
}
VARIANTS = {
    "train": ("m1", "m2", "m3", "m4", "f1", "f2", "f3", "steph", "michael", "linda"),
    "test": ("m7", "f4", "f5", "grandpa", "belinda"),
}
SPEEDS = (130, 160, 190)  # words a minute
PITCHES = (35, 50, 65)  # of 100
RETRIEVAL = 1  # espeak-ng: samples are handed to a function
UTF8 = 1
SPEED, PITCH = 1, 3  # numbers of espeak-ng's settings
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Speaker:
    """espeak-ng, in this process.

    Attributes:
        rate: Samples a second.
    """

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError as error:
            raise UserError(
                "speaking needs the package espeakng-loader; run pip install -r"
                " examples/real/requirements.txt"
            ) from error
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.rate = self._library.espeak_Initialize(RETRIEVAL, 0, data, 0)
        if self.rate <= 0:
            raise UserError("espeak-ng did not start; install espeakng-loader again")
        self._samples: list[np.ndarray] = []
        self._callback = CALLBACK(self._receive)  # kept, as the library calls it later
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count: int, events) -> int:
        if samples and count:
            self._samples.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def speak(self, text: str, voice: str, speed: int = 160, pitch: int = 50) -> np.ndarray:
        """Speak a text.

        Args:
            text: What is said.
            voice: An accent, or accent+variant.
            speed: Words a minute.
            pitch: From 0 to 100.

        Returns:
            Samples as 16-bit integers.

        Raises:
            UserError: There is no such voice.
        """
        library = self._library
        if library.espeak_SetVoiceByName(voice.encode()):
            raise UserError(f"espeak-ng has no voice {voice}")
        library.espeak_SetParameter(SPEED, speed, 0)
        library.espeak_SetParameter(PITCH, pitch, 0)
        self._samples.clear()
        said = text.encode() + b"\0"
        library.espeak_Synth(said, ctypes.c_size_t(len(said)), 0, 0, 0, UTF8, None, None)
        library.espeak_Synchronize()
        return np.concatenate(self._samples)


def write_speech(out: Path) -> dict[str, int]:
    """Write train.json and test.json: records of spoken digits, with their WAV files.

    An id is SPLIT.WORD.VOICE.SPEED.PITCH.

    Args:
        out: The folder to write.

    Returns:
        How many records each file has.
    """
    speaker = Speaker()
    (out / "clips").mkdir(parents=True, exist_ok=True)
    lot = random.Random(0)
    counts = {}
    for split, accents in ACCENTS.items():
        voices = [f"{accent}+{variant}" for accent in accents for variant in VARIANTS[split]]
        records = []
        for number, voice in enumerate(voices, start=1):
            for word in WORDS:
                speed, pitch = lot.choice(SPEEDS), lot.choice(PITCHES)
                name = f"{split}.{word}.{voice}.{speed}.{pitch}"
                samples = speaker.speak(word, voice, speed, pitch)
                write_wave(out / "clips" / f"{name}.wav", samples, speaker.rate)
                records.append(make_audio_record(name, word))
            show_progress(f"speech, {split}", number, len(voices), "voices")
        (out / f"{split}.json").write_text(json.dumps(records), encoding="utf-8")
        counts[split] = len(records)
    return counts


def make_audio_record(name: str, word: str) -> dict:
    """Make a record of one spoken word in LLaVA's format."""
    turns = [
        {"from": "human", "value": f"<audio>\n{QUESTION}"},
        {"from": "gpt", "value": word},
    ]
    return {"id": name, "audio": f"clips/{name}.wav", "conversations": turns}


def write_wave(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write samples of 16 bits as a WAV file with one channel."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
