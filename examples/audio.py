"""Audio in, text out: the method joins an audio encoder and a language model.

    python examples/audio.py [STEPS]
    python examples/audio.py [STEPS] --real runs/real

It builds a small random Whisper encoder and Llama, and trains them on tones of three pitches. Some
hundred steps take about a minute on a CPU. Then it asks about new tones, saves the model, loads it,
and asks again.

With --real, the encoder is Whisper tiny.en as it was trained, and it stays frozen. The language
model is small and random as before. They learn spoken digits, and are asked about voices that they
never heard. `python examples/real/prepare.py runs/real whisper speech` makes encoder and clips.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

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
from sparsecut.data.examples import Example, read_examples

PITCHES = {"low": (200, 400), "middle": (700, 1200), "high": (2000, 3500)}  # Hz
RATE = 16_000  # samples per second
LENGTH = RATE // 2  # samples of a tone
QUESTION = "<audio> how high is the tone ?"
REAL_QUESTION = "<audio> which digit is it ?"
REAL_SECONDS = 2  # of a clip; Whisper itself always hears 30
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


def draw_tones(step: int, batch_size: int) -> tuple[list[np.ndarray], list[str]]:
    """Draw the batch of a step: new tones each time."""
    return make_tones(batch_size, seed=step + 1)


def build_tokenizer(texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Build a tokenizer of the words of questions and answers."""
    words = [word for text in texts for word in text.split() if word != "<audio>"]
    words = list(dict.fromkeys([*SPECIAL.values(), *words]))
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


def build_parts():
    """Build small random parts.

    Returns:
        An encoder of one second of audio, its feature extractor, a language model, a tokenizer.
    """
    tokenizer = build_tokenizer((QUESTION, *PITCHES))
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
    extractor = WhisperFeatureExtractor(feature_size=40, chunk_length=1)
    return WhisperModel(whisper).get_encoder(), extractor, build_language(tokenizer), tokenizer


def build_language(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a small random language model."""
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
    return LlamaForCausalLM(llama)


def build_real_parts(folder: Path, words: tuple[str, ...]):
    """Build the parts around a trained Whisper, whose encoder is frozen.

    Args:
        folder: The folder of the whole Whisper.
        words: All answers.

    Returns:
        An encoder of two seconds of audio, its feature extractor, a language model, a tokenizer.
    """
    encoder = WhisperModel.from_pretrained(folder).get_encoder().requires_grad_(False)
    bins = encoder.config.num_mel_bins
    extractor = WhisperFeatureExtractor(feature_size=bins, chunk_length=REAL_SECONDS)
    # A position is 20 ms. Those of later times go, so that a clip does not take 1,500 tokens.
    num_positions = 50 * REAL_SECONDS
    positions = encoder.embed_positions.weight.data[:num_positions].clone()
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(positions)
    encoder.config.max_source_positions = encoder.max_source_positions = num_positions
    tokenizer = build_tokenizer((REAL_QUESTION, *words))
    return encoder, extractor, build_language(tokenizer), tokenizer


def draw_from(examples: list[Example]) -> Callable:
    """Make a function that draws a batch of clips from records, with their answers."""

    def draw(step: int, batch_size: int):
        chosen = np.random.default_rng(step).choice(len(examples), batch_size, replace=False)
        batch = [examples[number] for number in chosen]
        clips = [example.load_images()[0] for example in batch]
        return clips, [get_answer(example) for example in batch]

    return draw


def get_answer(example: Example) -> str:
    """The right answer of a record."""
    return example.messages[-1]["content"]


def train(
    model,
    processor,
    steps: int,
    batch_size: int = 16,
    draw: Callable = draw_tones,
    question: str = QUESTION,
) -> list[float]:
    """Train all parts that are not frozen.

    Args:
        model: The model.
        processor: Its processor.
        steps: Optimizer steps.
        batch_size: Clips of a step.
        draw: Gives the clips and words of a step.
        question: What is asked about each.

    Returns:
        The loss of each step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3)
    losses = []
    model.train()
    for step in range(steps):
        clips, words = draw(step, batch_size)
        texts = [f"{question} {word} </s>" for word in words]
        batch = processor(audio=clips, text=texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[:, :-2] = -100  # the answer and the end token are the last two
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {steps}, loss {np.mean(losses[-50:]):.2f}", flush=True)
    model.eval()
    return losses


def answer(model, processor, clips: list, question: str = QUESTION) -> list[str]:
    """Return the model's answer for each clip."""
    texts = [question] * len(clips)
    batch = processor(audio=clips, text=texts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=2, do_sample=False)
    new_ids = ids[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new_ids, skip_special_tokens=True)]


def learn_tones(steps: int):
    """Train on tones.

    Returns:
        (model, processor, question, clips to ask about, their words).
    """
    encoder, extractor, language, tokenizer = build_parts()
    model, processor = join(encoder, extractor, language, tokenizer)
    losses = train(model, processor, steps)
    print(f"loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.2f}")
    return model, processor, QUESTION, *make_tones(60, seed=0)


def learn_digits(folder: Path, steps: int):
    """Train on spoken digits with a trained Whisper; returns what `learn_tones` does."""
    examples = read_examples(folder / "speech" / "train.json")
    words = tuple(dict.fromkeys(map(get_answer, examples)))
    model, processor = join(*build_real_parts(folder / "whisper", words))
    draw = draw_from(examples)
    losses = train(model, processor, steps, draw=draw, question=REAL_QUESTION)
    print(f"loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.2f}")
    unheard = read_examples(folder / "speech" / "test.json")
    clips = [example.load_images()[0] for example in unheard]
    return model, processor, REAL_QUESTION, clips, list(map(get_answer, unheard))


def join(encoder, extractor, language, tokenizer):
    """Join the parts: (model, processor)."""
    plan = {"method": "sparsecut", "tiles": 0}  # audio has no fine views
    return build(encoder, language, plan, image_processor=extractor, tokenizer=tokenizer)


def main(steps: int, real: Path | None) -> None:
    """Build, train, ask, save, load, ask again."""
    torch.manual_seed(0)
    learned = learn_tones(steps) if real is None else learn_digits(real, steps)
    model, processor, question, clips, words = learned
    answers = answer(model, processor, clips, question)
    accuracy = np.mean([reply == word for reply, word in zip(answers, words, strict=True)])
    chance = 1 / len(set(words))
    print(f"{accuracy:.1%} of {len(clips)} clips named right ({chance:.0%} by chance)")
    with tempfile.TemporaryDirectory() as folder:
        save(model, processor, folder)
        print("the same after loading:", answer(*load(folder), clips, question) == answers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("steps", nargs="?", type=int)
    parser.add_argument("--real", type=Path, help="the folder that examples/real/prepare.py wrote")
    given = parser.parse_args()
    main(given.steps or 200, given.real)
