"""How the picture world's language model was made: a 6-layer GPT-2 that learns to read slots.

Where image tokens will stand, it is given slots: sums of word embeddings, each thing's words scattered over the slots of
its quarter, with noise. So it knows the questions, the words and where to look, and nothing of pictures. The number of
slots varies (4 x 4, 8 x 8, or both one after the other), so that a fusion with a longer prompt meets nothing new.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .questions import ask, caption, split_scene
from .scenes import COLOURS, DIGITS, LINES, SHADES, SHAPES, TEXTURES, Scene
from .words import make_tokenizer

CONFIG = {
    "n_embd": 96,
    "n_head": 4,
    "n_layer": 6,
    "n_positions": 512,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}
SHARES = (1.0, 1.0, 0.5, 0.25)  # of a quarter's slots that hold a word: patches show a thing in part or whole
SIDES = ((4,), (4,), (8,), (4, 8))  # slot grids of a prompt, drawn at random


def pretrain_language(
    *, seed: int = 0, steps: int = 1600, batch: int = 16, turns: int = 16, say: Callable[[str], None] = print
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, dict[str, float]]:
    """Train the model on one thread; returns it with its tokenizer and its share of right answers to unseen scenes."""
    torch.manual_seed(seed)
    tokenizer, rng = make_tokenizer(), random.Random(f"language/{seed}")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = GPT2LMHeadModel(GPT2Config(**CONFIG, vocab_size=len(tokenizer), **special))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 80) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    for step in range(steps):
        scenes = [split_scene(f"pretrain/language/{step * batch + i}") for i in range(batch)]
        rows = [conversation(scene, tokenizer, rng, turns) for scene in scenes]
        logits, labels = answer(model, rows, 0.2)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            say(f"language: step {step + 1} of {steps}, loss {loss.item():.2f}")
    return model.eval(), tokenizer, _share(model, tokenizer, turns)


def slots(scene: Scene, rng: random.Random, side: int) -> list[list[str]]:
    """Words in each of side x side slots: every word of a thing in a share of its quarter's slots, at least in one."""
    grid, half, share = [[] for _ in range(side * side)], side // 2, rng.choice(SHARES)
    for t in scene.things:
        names = (SHAPES, tuple(COLOURS), tuple(SHADES), TEXTURES, LINES, DIGITS)
        quarter = [(t.place // 2 * half + y) * side + t.place % 2 * half + x for y in range(half) for x in range(half)]
        for words, which in zip(names, (t.shape, t.colour, t.shade, t.texture, t.lines, t.digit), strict=True):
            for slot in rng.sample(quarter, max(1, round(share * len(quarter)))):
                grid[slot].append(words[which])
    return grid


def conversation(
    scene: Scene, tokenizer, rng: random.Random, turns: int
) -> tuple[list[int], list[int], dict[int, list[int]]]:
    """Token ids (0 at slots), labels, and the word ids of every slot's position; one in eight is a caption."""
    words = tokenizer.get_vocab()
    end = tokenizer.eos_token_id
    grid = [words_of for side in rng.choice(SIDES) for words_of in slots(scene, rng, side)]
    ids = [tokenizer.bos_token_id, *[tokenizer.pad_token_id] * len(grid)]
    filled = {i: [words[w] for w in ws] for i, ws in enumerate(grid, 1)}
    labels = [-100] * len(ids)
    pairs = [("", caption(scene, rng))] if rng.random() < 0.125 else ask(scene, rng, turns)
    for question, told in pairs:
        before = [words[w] for w in question.split()]
        after = [*(words[w] for w in told.split()), end]
        ids, labels = ids + before + after, labels + [-100] * len(before) + after
    return ids, labels, filled


def answer(model: GPT2LMHeadModel, rows, noise: float) -> tuple[Tensor, Tensor]:
    """Logits [B, L - 1, words] for the labels [B, L - 1] that follow, with the slots filled in."""
    longest = max(len(ids) for ids, _, _ in rows)
    ids = torch.tensor([i + [0] * (longest - len(i)) for i, _, _ in rows])
    labels = torch.tensor([y + [-100] * (longest - len(y)) for _, y, _ in rows])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _, _ in rows])
    places = [(b, p, w) for b, (_, _, filled) in enumerate(rows) for p, ws in filled.items() for w in ws]
    table, where = model.get_input_embeddings(), torch.tensor(places).T
    empty = torch.zeros(*ids.shape, 1)
    for b, (_, _, filled) in enumerate(rows):
        empty[b, list(filled)] = 1
    embedded = table(ids) * (1 - empty) + noise * table.weight.detach().std() * empty * torch.randn(
        *ids.shape, table.embedding_dim
    )
    embedded = embedded.index_put((where[0], where[1]), table(where[2]), accumulate=True)
    return model(inputs_embeds=embedded, attention_mask=mask).logits[:, :-1], labels[:, 1:]


@torch.no_grad()
def _share(model, tokenizer, turns: int) -> dict[str, float]:
    rng = random.Random("language/check")
    rows = [conversation(split_scene(f"dev/language/{i}"), tokenizer, rng, turns) for i in range(64)]
    logits, labels = answer(model, rows, 0.2)
    asked = labels >= 0
    return {"words of answers from slots": round((logits.argmax(-1) == labels)[asked].float().mean().item(), 3)}
