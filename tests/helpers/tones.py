"""Tones of three pitches as files, and a small random Whisper encoder, for the tests of audio."""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

PITCHES = {"dark": (150, 300), "light": (3000, 4000), "medium": (900, 1200)}  # Hz; known words
QUESTION = "<audio> what shade"
SECONDS = 0.5
FORMATS = ("wav", "flac", "mp3")


def make_tone(word: str, rng, rate: int = 16_000, seconds: float = SECONDS) -> np.ndarray:
    """A noisy tone, float32 [samples]."""
    times = np.arange(int(rate * seconds)) / rate
    wave = rng.uniform(0.2, 0.8) * np.sin(2 * np.pi * rng.uniform(*PITCHES[word]) * times)
    return (wave + 0.02 * rng.standard_normal(len(times))).astype(np.float32)


def write_tones(folder: Path, count: int, seed: int, name: str) -> Path:
    """Write records with tones in three formats, some of another rate and with two channels."""
    rng = np.random.default_rng(seed)
    records = []
    words = list(PITCHES)
    for i in range(count):
        word = words[i % 3]
        rate = 16_000 if i % 4 else 22_050
        tone = make_tone(word, rng, rate)
        file = f"{name}{i}.{FORMATS[(i // 3) % 3]}"
        soundfile.write(folder / file, np.stack([tone] * (1 + i % 2), axis=1), rate)
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": word}]
        records.append({"id": f"{name}{i}", "audio": file, "conversations": turns})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records))
    return path


def save_encoder(folder: Path) -> Path:
    """Save a small random Whisper model with an encoder of half a second."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32,
        encoder_layers=4,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        max_source_positions=50,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        num_mel_bins=40,
    )
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=40, chunk_length=1).save_pretrained(folder)
    return folder


def make_recipe(folder: Path, steps: int) -> dict:
    """A recipe that trains all parts on the tones of `folder`."""
    return {
        "model": {"vision": str(folder / "whisper"), "language": "shapes"},
        "fusion": {"method": "sparsecut", "tiles": 0},
        "stages": [
            {
                "name": "tones",
                "data": {"path": str(folder / "train.json")},
                "train": ["fusion", "vision", "language"],
                "args": {
                    "max_steps": steps,
                    "learning_rate": 3e-3,
                    "per_device_train_batch_size": 12,
                    "logging_steps": 50,
                },
            }
        ],
        "evaluate": {"data": {"path": str(folder / "test.json")}, "max_new_tokens": 3},
        "output": str(folder / "out"),
    }
