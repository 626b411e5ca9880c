"""That an engine answers many questions at once as its model answers each alone."""

import queue

import torch
from helpers.clients import answer_alone, make_image

from sparsecut.serving.decoding import SamplingParams, join_deltas

TEXTS = [
    "what is it",
    "is it a red cat or a blue dog",
    "are you sure",
    "a b c d yes no what are you",
]


def randomize_fusion(model):
    """Give the shortcuts weights that change answers."""
    torch.manual_seed(1)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_question(processor, number: int, size: tuple[int, int] | None = None):
    """(messages, images): one of many questions, with none to two images of different sizes."""
    images = []
    for i in range(number % 3):
        image = make_image(9 * (number + i))
        images.append(image.resize(size or (20 + 4 * (number % 3), 16 + 8 * i)))
    text = f"{processor.image_token}\n" * len(images) + TEXTS[number % 4]
    return [{"role": "user", "content": text}], images


def answer_together(engine, questions, length: int, shortcuts_off=()) -> list[str]:
    """The engine's answers to questions that are submitted at once."""
    queues = []
    for messages, images in questions:
        deltas = queue.SimpleQueue()
        prepared = [engine.prepare_image(image) for image in images]
        sampling = SamplingParams(length, temperature=0)
        request = engine.prepare(messages, prepared, sampling, shortcuts_off=shortcuts_off)
        engine.submit(request, deltas.put)
        queues.append(deltas)
    return [read_answer(deltas) for deltas in queues]


def read_answer(deltas: queue.SimpleQueue) -> str:
    """Wait for the end of an answer."""
    parts = []
    while (delta := deltas.get(timeout=60)) is not None:
        if isinstance(delta, Exception):
            raise delta
        parts.append(delta)
    return join_deltas(parts, 1)[0].text


def check_answers(engine, questions, length: int = 8, shortcuts_off=()) -> list[str]:
    """Compare the engine's answers with the model's own; returns them."""

    def answer_all() -> list[str]:
        with engine.model.fusion.switched_off(*shortcuts_off):
            return [
                answer_alone(engine.model, engine.processor, messages, images, length)
                for messages, images in questions
            ]

    # The model belongs to the engine's thread, which may still be at the end of an earlier batch.
    expected = engine.run(answer_all).result()
    assert answer_together(engine, questions, length, shortcuts_off) == expected
    return expected
