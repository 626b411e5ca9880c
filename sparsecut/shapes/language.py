"""How the picture world's language model is made: a GPT-2 that learns to read slots.

Where image tokens will stand, it is given slots: sums of word embeddings, each thing's words scattered over the slots of
its cell, with noise. So it knows the questions, the words and where to look, and nothing of pictures. The number of
slots varies (as for coarse views, as for fine ones, or both one after the other), so that a fusion with a longer prompt meets nothing new.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .questions import ask, caption, split_scene
from .scenes import COLOURS, DIGITS, LINES, SHADES, SHAPES, TEXTURES, Scene
from .sizes import SMALL, LanguageTraining, Size
from .vocabulary import make_tokenizer

SHARES = (
    1.0,
    1.0,
    0.5,
    0.25,
)  # of a cell's slots that hold a word: patches show a thing in part or whole


def pretrain_language(
    *,
    seed: int = 0,
    size: Size = SMALL,
    training: LanguageTraining | None = None,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, dict[str, float]]:
    """Train the model; returns it with its tokenizer and its share of right answers to unseen
    scenes.

    training: steps and rates; by default the size's own. On a CUDA device it computes in bfloat16.
    """
    torch.manual_seed(seed)
    training, tokenizer = training or size.language_training, make_tokenizer(size=size)
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    model = GPT2LMHeadModel(GPT2Config(**size.language, vocab_size=len(tokenizer), **special)).to(
        device
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    steps, warmup = training.steps, training.warmup
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    batches = Batches(seed, size, training, tokenizer)
    if size.ahead and steps > 10:
        workers = max(
            1, (os.cpu_count() or 2) // 2
        )  # the encoder, made at the same time, needs few once pictures are drawn
        loaded = DataLoader(
            batches, None, num_workers=workers, multiprocessing_context="spawn", prefetch_factor=2
        )
    else:
        loaded = (batches[step] for step in range(steps))
    with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda"):
        for step, packed in enumerate(loaded):
            logits, labels = answer(model, packed, 0.2)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 99 or step == steps - 1:
                log(f"language: step {step + 1} of {steps}, loss {loss.item():.2f}")
        shares = _share(model, tokenizer, size, training)
    return model.eval().cpu(), tokenizer, shares


class Batches(Dataset):
    """Packed conversations, one batch per step. Made ahead, each step has chance of its own; else
    it goes on from step to step.
    """

    def __init__(
        self, seed: int, size: Size, training: LanguageTraining, tokenizer: PreTrainedTokenizerFast
    ):
        self.seed, self.size, self.training, self.tokenizer = seed, size, training, tokenizer
        self.rng = random.Random(f"language/{seed}")

    def __len__(self) -> int:
        return self.training.steps

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        if step >= len(self):
            raise IndexError(step)
        rng = random.Random(f"language/{self.seed}/{step}") if self.size.ahead else self.rng
        first = step * self.training.batch
        scenes = [
            split_scene(f"pretrain/language/{first + i}", self.size)
            for i in range(self.training.batch)
        ]
        return pack(
            [
                conversation(s, self.tokenizer, rng, self.training.turns, self.size.sides)
                for s in scenes
            ]
        )


def slots(scene: Scene, rng: random.Random, side: int) -> list[list[str]]:
    """Words in each of side x side slots: every word of a thing in a share of its cell's slots, at
    least in one.
    """
    grid, part, share = [[] for _ in range(side * side)], side // scene.rows, rng.choice(SHARES)
    for t in scene.things:
        names = (SHAPES, tuple(COLOURS), tuple(SHADES), TEXTURES, LINES, DIGITS)
        row, column = divmod(t.place, scene.rows)
        cell = [
            (row * part + y) * side + column * part + x for y in range(part) for x in range(part)
        ]
        for words, which in zip(
            names, (t.shape, t.colour, t.shade, t.texture, t.lines, t.digit), strict=True
        ):
            for slot in rng.sample(cell, max(1, round(share * len(cell)))):
                grid[slot].append(words[which])
    return grid


def conversation(
    scene: Scene,
    tokenizer,
    rng: random.Random,
    turns: int,
    sides: tuple[tuple[int, ...], ...] = SMALL.sides,
) -> tuple[list[int], list[int], dict[int, list[int]]]:
    """Token ids (0 at slots), labels, and the word ids of every slot's position; one in eight is a
    caption.
    """
    words = tokenizer.get_vocab()
    end = tokenizer.eos_token_id
    grid = [words_of for side in rng.choice(sides) for words_of in slots(scene, rng, side)]
    ids = [tokenizer.bos_token_id, *[tokenizer.pad_token_id] * len(grid)]
    filled = {i: [words[w] for w in ws] for i, ws in enumerate(grid, 1)}
    labels = [-100] * len(ids)
    pairs = [("", caption(scene, rng))] if rng.random() < 0.125 else ask(scene, rng, turns)
    for question, told in pairs:
        before = [words[w] for w in question.split()]
        after = [*(words[w] for w in told.split()), end]
        ids, labels = ids + before + after, labels + [-100] * len(before) + after
    return ids, labels, filled


def pack(rows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Conversations as token ids, labels, mask and empty slots, each [B, L], and row, position and
    word of what fills them, [3, n].
    """
    longest = max(len(ids) for ids, _, _ in rows)
    ids = torch.tensor([i + [0] * (longest - len(i)) for i, _, _ in rows])
    labels = torch.tensor([y + [-100] * (longest - len(y)) for _, y, _ in rows])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _, _ in rows])
    places = [
        (b, p, w) for b, (_, _, filled) in enumerate(rows) for p, ws in filled.items() for w in ws
    ]
    empty = torch.zeros(ids.shape)
    for b, (_, _, filled) in enumerate(rows):
        empty[b, list(filled)] = 1
    return ids, labels, mask, empty, torch.tensor(places).T


def answer(
    model: GPT2LMHeadModel, packed: tuple[Tensor, ...], noise: float
) -> tuple[Tensor, Tensor]:
    """Logits [B, L - 1, words] for the labels [B, L - 1] that follow, with the slots filled in and
    noise on them.
    """
    ids, labels, mask, empty, where = (x.to(model.device, non_blocking=True) for x in packed)
    table, empty = model.get_input_embeddings(), empty.unsqueeze(-1)
    chance = torch.randn(*ids.shape, table.embedding_dim, device=ids.device)
    embedded = table(ids) * (1 - empty) + noise * table.weight.detach().std() * empty * chance
    embedded = embedded.index_put((where[0], where[1]), table(where[2]), accumulate=True)
    return model(inputs_embeds=embedded, attention_mask=mask).logits[:, :-1], labels[:, 1:]


@torch.no_grad()
def _share(model, tokenizer, size: Size, training: LanguageTraining) -> dict[str, float]:
    rng = random.Random("language/check")
    scenes = [split_scene(f"dev/language/{i}", size) for i in range(training.checked)]
    rows = [conversation(scene, tokenizer, rng, training.turns, size.sides) for scene in scenes]
    logits, labels = answer(model, pack(rows), 0.2)
    asked = labels >= 0
    return {
        "words of answers from slots": round(
            (logits.argmax(-1) == labels)[asked].float().mean().item(), 3
        )
    }
