"""Sounds in, words out: the method joins an audio encoder to a language model just as it joins a
vision encoder.

    python examples/audio.py [STEPS]

makes a small random Whisper encoder and Llama, tones of different pitch, and a few hundred training steps (about a minute on a
CPU); then it asks about tones that were not heard in training, saves the model, loads it, and asks again.
"""

import sys
import tempfile

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from sparsecut import build, load
from sparsecut.building import save

PITCHES = {"low": (200, 400), "middle": (700, 1200), "high": (2000, 3500)}  # Hz
RATE, QUESTION = 16_000, "<audio> how high is the tone ?"


def tones(count: int, seed: int) -> tuple[list[np.ndarray], list[str]]:
    """Half-second tones of random pitch and loudness with noise, and the word for each."""
    random, sounds, words = np.random.default_rng(seed), [], []
    for _ in range(count):
        word = random.choice(list(PITCHES))
        wave = np.sin(2 * np.pi * random.uniform(*PITCHES[word]) * np.arange(RATE // 2) / RATE)
        sounds.append(
            (random.uniform(0.2, 1) * wave + 0.02 * random.standard_normal(RATE // 2)).astype(
                np.float32
            )
        )
        words.append(str(word))
    return sounds, words


def parts():
    """A small random encoder that listens to one second, its feature extractor, a language model,
    and a tokenizer.
    """
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = list(dict.fromkeys([*special.values(), *QUESTION.split()[1:], *PITCHES]))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whisper = WhisperConfig(
        d_model=32, encoder_layers=4, encoder_attention_heads=2, encoder_ffn_dim=64, max_source_positions=50,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=8, pad_token_id=0, bos_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, num_mel_bins=40,
    )  # fmt: skip
    shape = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    llama = LlamaConfig(
        **shape, vocab_size=len(words), bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    extractor = WhisperFeatureExtractor(feature_size=40, chunk_length=1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    return WhisperModel(whisper).get_encoder(), extractor, LlamaForCausalLM(llama), tokenizer


def train(model, processor, steps: int, batch_size: int = 16) -> list[float]:
    """Train all parts on tones and return the loss of each step."""
    optimizer, losses = (
        torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 2e-3),
        [],
    )
    model.train()
    for step in range(steps):
        sounds, words = tones(batch_size, seed=step + 1)
        texts = [f"{QUESTION} {word} </s>" for word in words]
        batch = processor(audio=sounds, text=texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[:, :-2] = -100  # the answer and the end are the last two
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def answers(model, processor, sounds: list[np.ndarray]) -> list[str]:
    """What the model says of each sound."""
    batch = processor(
        audio=sounds, text=[QUESTION] * len(sounds), return_tensors="pt", padding=True
    )
    new = model.generate(**batch, max_new_tokens=2, do_sample=False)[
        :, batch["input_ids"].shape[1] :
    ]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def main(steps: int) -> None:
    """Build, train, ask, save, load, ask again."""
    torch.manual_seed(0)
    encoder, extractor, language, tokenizer = parts()
    plan = {"method": "sparsecut", "tiles": 0}  # a sound has no finer views
    model, processor = build(
        encoder, language, plan, image_processor=extractor, tokenizer=tokenizer
    )
    losses = train(model, processor, steps)
    sounds, words = tones(60, seed=0)
    said = answers(model, processor, sounds)
    right = np.mean([a == b for a, b in zip(said, words, strict=True)])
    print(
        f"loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.2f}; {right:.0%} of 60 tones named right"
        " (33% by chance)"
    )
    with tempfile.TemporaryDirectory() as folder:
        save(model, processor, folder)
        print("the same after loading:", answers(*load(folder), sounds) == said)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
