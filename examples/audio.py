"""Audio in, text out: the method joins an audio encoder and a language model.

    python examples/audio.py [STEPS]

It builds a small random Whisper encoder and Llama, and trains them on tones of three pitches. Some
hundred steps take about a minute on a CPU. Then it asks about new tones, saves the model, loads it,
and asks again.
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
RATE = 16_000  # samples per second
LENGTH = RATE // 2  # samples of a tone
QUESTION = "<audio> how high is the tone ?"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def make_tones(count: int, seed: int) -> tuple[list[np.ndarray], list[str]]:
    """Make noisy tones of random pitch and loudness, and the word for each."""
    rng = np.random.default_rng(seed)
    tones = []
    words = []
    for _ in range(count):
        word = rng.choice(list(PITCHES))
        frequency = rng.uniform(*PITCHES[word])
        wave = np.sin(2 * np.pi * frequency * np.arange(LENGTH) / RATE)
        loudness = rng.uniform(0.2, 1)
        noise = 0.02 * rng.standard_normal(LENGTH)
        tones.append((loudness * wave + noise).astype(np.float32))
        words.append(str(word))
    return tones, words


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of the words of questions and answers."""
    words = list(dict.fromkeys([*SPECIAL.values(), *QUESTION.split()[1:], *PITCHES]))
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


def build_parts():
    """Build small random parts.

    Returns:
        An encoder of one second of audio, its feature extractor, a language model, a tokenizer.
    """
    tokenizer = build_tokenizer()
    whisper = WhisperConfig(
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
    llama = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    extractor = WhisperFeatureExtractor(feature_size=40, chunk_length=1)
    return WhisperModel(whisper).get_encoder(), extractor, LlamaForCausalLM(llama), tokenizer


def train(model, processor, steps: int, batch_size: int = 16) -> list[float]:
    """Train all parts on tones, and return the loss of each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3)
    losses = []
    model.train()
    for step in range(steps):
        tones, words = make_tones(batch_size, seed=step + 1)
        texts = [f"{QUESTION} {word} </s>" for word in words]
        batch = processor(audio=tones, text=texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[:, :-2] = -100  # the answer and the end token are the last two
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def answer(model, processor, tones: list[np.ndarray]) -> list[str]:
    """Return the model's answer for each tone."""
    texts = [QUESTION] * len(tones)
    batch = processor(audio=tones, text=texts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=2, do_sample=False)
    new_ids = ids[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new_ids, skip_special_tokens=True)]


def main(steps: int) -> None:
    """Build, train, ask, save, load, ask again."""
    torch.manual_seed(0)
    encoder, extractor, language, tokenizer = build_parts()
    plan = {"method": "sparsecut", "tiles": 0}  # audio has no fine views
    model, processor = build(
        encoder, language, plan, image_processor=extractor, tokenizer=tokenizer
    )
    losses = train(model, processor, steps)
    tones, words = make_tones(60, seed=0)
    answers = answer(model, processor, tones)
    accuracy = np.mean([reply == word for reply, word in zip(answers, words, strict=True)])
    print(f"loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.2f}")
    print(f"{accuracy:.0%} of 60 tones named right (33% by chance)")
    with tempfile.TemporaryDirectory() as folder:
        save(model, processor, folder)
        print("the same after loading:", answer(*load(folder), tones) == answers)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
