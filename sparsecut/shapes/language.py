"""How the language model is made: a GPT-2 that learns to read slots.

Where image tokens will stand, it gets slots: sums of word embeddings with noise. Each thing's words
are scattered over the slots of its cell. So the model knows the questions, the words and where to
look, and nothing of images. The number of slots varies: as for coarse views, as for fine ones, or
both one after the other. So a fusion with a longer prompt meets nothing new.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .questions import ask, caption, split_scene
from .scenes import COLOURS, DIGITS, LINES, SHADES, SHAPES, TEXTURES, Scene
from .sizes import SMALL, LanguageTraining, Size
from .vocabulary import make_tokenizer

IGNORED = -100  # label of a token that is not a target
NOISE = 0.2  # on slots, as a multiple of the embeddings' standard deviation
# Fraction of a cell's slots that hold a word, drawn at random: patches show things in part or
# whole.
FRACTIONS = (1.0, 1.0, 0.5, 0.25)
CAPTION_PROBABILITY = 0.125
LOG_EVERY = 100  # steps
WORDS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "shade": tuple(SHADES),
    "texture": TEXTURES,
    "lines": LINES,
    "digit": DIGITS,
}

# Token ids (0 at slots), labels, and the word ids at each slot's position.
Conversation = tuple[list[int], list[int], dict[int, list[int]]]


def pretrain_language(
    *,
    seed: int = 0,
    size: Size = SMALL,
    training: LanguageTraining | None = None,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, dict[str, float]]:
    """Train the language model.

    On a CUDA device it computes in bfloat16.

    Args:
        seed: Seed of all random choices.
        size: The size whose language model is made.
        training: Steps and rates. Default: the size's own.
        device: Where to compute.
        log: Called with a line of progress.

    Returns:
        The model, its tokenizer, and its accuracy on unseen scenes.
    """
    torch.manual_seed(seed)
    training = training or size.language_training
    tokenizer = make_tokenizer(size=size)
    config = GPT2Config(
        **size.language,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    steps = training.steps

    def scale_rate(step: int) -> float:
        warm = min(1.0, (step + 1) / training.warmup)
        return warm * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale_rate)
    batches = _load_batches(Batches(seed, size, training, tokenizer))
    on_cuda = torch.device(device).type == "cuda"
    with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
        for step, packed in enumerate(batches):
            logits, labels = answer(model, packed, NOISE)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % LOG_EVERY == 0 or step == steps - 1:
                log(f"language: step {step + 1} of {steps}, loss {loss.item():.2f}")
        accuracy = _measure_accuracy(model, tokenizer, size, training)
    return model.eval().cpu(), tokenizer, accuracy


class Batches(Dataset):
    """Packed conversations, one batch per step.

    Prepared ahead, each step has a random generator of its own; otherwise one generator goes on
    from step to step.
    """

    def __init__(
        self, seed: int, size: Size, training: LanguageTraining, tokenizer: PreTrainedTokenizerFast
    ):
        self.seed = seed
        self.size = size
        self.training = training
        self.tokenizer = tokenizer
        self.rng = random.Random(f"language/{seed}")

    def __len__(self) -> int:
        return self.training.steps

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        if step >= len(self):
            raise IndexError(step)
        rng = random.Random(f"language/{self.seed}/{step}") if self.size.ahead else self.rng
        first = step * self.training.batch
        conversations = []
        for number in range(first, first + self.training.batch):
            scene = split_scene(f"pretrain/language/{number}", self.size)
            conversations.append(
                make_conversation(scene, self.tokenizer, rng, self.training.turns, self.size.sides)
            )
        return pack(conversations)


def _load_batches(batches: Batches) -> Iterable[tuple[Tensor, ...]]:
    steps = len(batches)
    if not batches.size.ahead or steps <= 10:
        return (batches[step] for step in range(steps))
    # The encoder is made at the same time, but needs few cores once its images are drawn.
    workers = max(1, (os.cpu_count() or 2) // 2)
    return DataLoader(
        batches, None, num_workers=workers, multiprocessing_context="spawn", prefetch_factor=2
    )


def fill_slots(scene: Scene, rng: random.Random, side: int) -> list[list[str]]:
    """Scatter the scene's words over side x side slots.

    Every word of a thing stands in a random fraction of its cell's slots, at least in one.
    """
    slots: list[list[str]] = [[] for _ in range(side * side)]
    slots_per_cell = side // scene.rows  # per side
    fraction = rng.choice(FRACTIONS)
    for thing in scene.things:
        cell = _list_slots_of_cell(thing.place, scene.rows, slots_per_cell)
        count = max(1, round(fraction * len(cell)))
        for name, words in WORDS.items():
            word = words[getattr(thing, name)]
            for slot in rng.sample(cell, count):
                slots[slot].append(word)
    return slots


def _list_slots_of_cell(place: int, rows: int, slots_per_cell: int) -> list[int]:
    row, column = divmod(place, rows)
    side = rows * slots_per_cell
    slots = []
    for y in range(row * slots_per_cell, (row + 1) * slots_per_cell):
        for x in range(column * slots_per_cell, (column + 1) * slots_per_cell):
            slots.append(y * side + x)
    return slots


def make_conversation(
    scene: Scene,
    tokenizer,
    rng: random.Random,
    turns: int,
    sides: tuple[tuple[int, ...], ...] = SMALL.sides,
) -> Conversation:
    """Make a conversation about a scene; one in eight is a caption."""
    vocabulary = tokenizer.get_vocab()
    slots: list[list[str]] = []
    for side in rng.choice(sides):
        slots += fill_slots(scene, rng, side)
    ids = [tokenizer.bos_token_id, *[tokenizer.pad_token_id] * len(slots)]
    filled = {}
    for position, words in enumerate(slots, start=1):
        filled[position] = [vocabulary[word] for word in words]
    labels = [IGNORED] * len(ids)
    is_caption = rng.random() < CAPTION_PROBABILITY
    pairs = [("", caption(scene, rng))] if is_caption else ask(scene, rng, turns)
    for question, reply in pairs:
        question_ids = [vocabulary[word] for word in question.split()]
        reply_ids = [vocabulary[word] for word in reply.split()] + [tokenizer.eos_token_id]
        ids += question_ids + reply_ids
        labels += [IGNORED] * len(question_ids) + reply_ids
    return ids, labels, filled


def pack(conversations: list[Conversation]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pad conversations to one length.

    Returns:
        Token ids, labels, attention mask and empty slots, each [B, L]; and row, position and word
        of what fills the slots, [3, n].
    """
    longest = max(len(ids) for ids, _, _ in conversations)
    shape = (len(conversations), longest)
    all_ids = torch.zeros(shape, dtype=torch.long)
    all_labels = torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    empty = torch.zeros(shape)
    places = []
    for row, (ids, labels, filled) in enumerate(conversations):
        all_ids[row, : len(ids)] = torch.tensor(ids)
        all_labels[row, : len(labels)] = torch.tensor(labels)
        mask[row, : len(ids)] = 1
        empty[row, list(filled)] = 1
        for position, words in filled.items():
            places += [(row, position, word) for word in words]
    return all_ids, all_labels, mask, empty, torch.tensor(places).T


def answer(
    model: GPT2LMHeadModel, packed: tuple[Tensor, ...], noise: float
) -> tuple[Tensor, Tensor]:
    """Run the model with its slots filled in and noise on them.

    Returns:
        Logits [B, L - 1, words] and the labels that follow, [B, L - 1].
    """
    ids, labels, mask, empty, where = (x.to(model.device, non_blocking=True) for x in packed)
    table = model.get_input_embeddings()
    empty = empty.unsqueeze(-1)
    noise_vectors = torch.randn(*ids.shape, table.embedding_dim, device=ids.device)
    std = table.weight.detach().std()
    embedded = table(ids) * (1 - empty) + noise * std * empty * noise_vectors
    embedded = embedded.index_put((where[0], where[1]), table(where[2]), accumulate=True)
    return model(inputs_embeds=embedded, attention_mask=mask).logits[:, :-1], labels[:, 1:]


@torch.no_grad()
def _measure_accuracy(model, tokenizer, size: Size, training: LanguageTraining) -> dict[str, float]:
    rng = random.Random("language/check")
    conversations = []
    for number in range(training.checked):
        scene = split_scene(f"dev/language/{number}", size)
        conversations.append(make_conversation(scene, tokenizer, rng, training.turns, size.sides))
    logits, labels = answer(model, pack(conversations), NOISE)
    correct = (logits.argmax(-1) == labels)[labels >= 0]
    return {"words of answers from slots": round(correct.float().mean().item(), 3)}
