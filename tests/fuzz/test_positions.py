"""Features reach the right positions: patch tables of images of any size, and prompts of any kind.

A table is right if the patches listed under a token are those on which it depends. A position is
right if a record gives the same logits in a batch, in chunks and alone.
"""

import functools
import inspect

import numpy as np
import torch
from helpers import bases
from helpers.bases import randomize_fusion
from helpers.image_processors import IMAGE_PROCESSORS
from helpers.tiny import WORDS, tiny_model
from helpers.upgrade_checks import check_table_of_images
from hypothesis import strategies as st
from PIL import Image

from sparsecut.hooks import RECOMPUTES_HOOKS

SIDES = st.one_of(st.integers(8, 40), st.integers(8, 150))
SIZES = st.tuples(SIDES, SIDES)
PLANS = ("sparsecut", "sparsecut_input", "deepstack", "hires_tokens", "dense_connector_sti", "cli")
PIECES = st.one_of(st.sampled_from(WORDS), st.just("<image>"))
PROMPTS = st.lists(st.lists(PIECES, min_size=1, max_size=12), min_size=1, max_size=3)


def make_image(size: tuple[int, int]) -> Image.Image:
    width, height = size
    levels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(levels.astype(np.uint8))


@functools.cache
def build_base(name: str):
    return bases.build_base(name)


@functools.cache
def build_model(method: str):
    model, processor = tiny_model({"method": method})
    randomize_fusion(model)
    return model.eval(), processor


def test_patch_tables(fuzz):
    def check(example):
        name, sizes = example
        base = build_base(name)
        images = [make_image(size) for size in sizes]
        if takes_images(name, base, images):
            check_table_of_images(name, base, images)

    names = st.sampled_from(list(IMAGE_PROCESSORS))
    fuzz(check, st.tuples(names, st.lists(SIZES, min_size=1, max_size=3)))


def takes_images(name: str, base, images: list) -> bool:
    """Whether the base itself can read the images: some families fail at very narrow ones."""
    inputs = IMAGE_PROCESSORS[name]()(images, return_tensors="pt")
    accepted = inspect.signature(base.model.get_image_features).parameters
    try:
        with torch.no_grad():
            base.model.get_image_features(**{key: inputs[key] for key in inputs if key in accepted})
    except (RuntimeError, ZeroDivisionError):
        return False
    return True


def test_prompts(fuzz):
    def check(example):
        method, prompts, sizes, side, chunk = example
        model, processor = build_model(method)
        processor.tokenizer.padding_side = side
        images = iter([make_image(sizes[i % len(sizes)]) for i in range(40)])
        images = [[next(images) for piece in prompt if piece == "<image>"] for prompt in prompts]
        texts = [" ".join(prompt) for prompt in prompts]
        batch = prepare(processor, texts, images)
        with torch.no_grad():
            logits = model(**batch).logits
            for row, (text, own) in enumerate(zip(texts, images, strict=True)):
                alone = prepare(processor, [text], [own])
                expected = model(**alone).logits[0]
                held = batch["attention_mask"][row].bool()
                torch.testing.assert_close(logits[row][held], expected, atol=2e-5, rtol=1e-4)
                check_chunks(model, alone, expected, chunk)

    fuzz(
        check,
        st.tuples(
            st.sampled_from(PLANS),
            PROMPTS,
            st.lists(SIZES, min_size=1, max_size=3),
            st.sampled_from(["left", "right"]),
            st.integers(1, 9),
        ),
    )


def prepare(processor, texts: list[str], images: list[list]):
    some_images = images if any(images) else None
    return processor(images=some_images, text=texts, padding=True, return_tensors="pt")


def check_chunks(model, inputs, expected: torch.Tensor, chunk: int) -> None:
    """Greedy answers of a prompt read in chunks begin with the token of the whole prompt."""
    settings = {"max_new_tokens": 1, "do_sample": False, "prefill_chunk_size": chunk}
    if model.plan.gate == "context" or RECOMPUTES_HOOKS:  # before 5.23 chunks get all images
        return  # needs whole images, and says so
    tokens = model.generate(**inputs, **settings)
    best = expected[-1].topk(2).values
    if best[0] - best[1] > 1e-4:
        assert tokens[0, -1] == expected[-1].argmax()
