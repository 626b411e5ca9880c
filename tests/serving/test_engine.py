"""The engine with models of other kinds: upgraded ones, and the picture world's backbones."""

import queue

import pytest
import torch
from helpers.clients import picture
from helpers.example_bases import build_example_base

from sparsecut import build, upgrade
from sparsecut.prompts import decode_answers, make_greedy_config, prepare_inputs, render_prompt
from sparsecut.serving.decoding import SamplingParams, joined
from sparsecut.serving.engine import Engine

TEXTS = [
    "what is it",
    "is it a red cat or a blue dog",
    "are you sure",
    "a b c d yes no what are you",
]


def alone(model, processor, messages, pictures, length: int) -> str:
    """The model's own answer, without the engine."""
    inputs = prepare_inputs(model, processor, [render_prompt(processor, messages)], [pictures])
    with torch.inference_mode():
        return decode_answers(
            processor,
            inputs,
            model.generate(**inputs, generation_config=make_greedy_config(model, length)),
        )[0]


def asked(processor, number: int):
    """One of many questions: turns, and none to two pictures of other sizes."""
    shown = [
        picture(9 * (number + i)).resize((20 + 4 * (number % 3), 16 + 8 * i))
        for i in range(number % 3)
    ]
    text = f"{processor.image_token}\n" * len(shown) + TEXTS[number % 4]
    return [{"role": "user", "content": text}], shown


def together(engine, questions, length: int, **more) -> list[str]:
    """What the engine answers to all of them, asked at once."""
    told = []
    for messages, shown in questions:
        told.append(queue.SimpleQueue())
        engine.submit(
            engine.ask(messages, shown, SamplingParams(length, temperature=0), **more), told[-1].put
        )
    answers = []
    for one in told:
        pieces = []
        while (piece := one.get(timeout=60)) is not None:
            if isinstance(piece, Exception):
                raise piece
            pieces.append(piece)
        answers.append(joined(pieces, 1)[0].text)
    return answers


def stir(model):
    torch.manual_seed(1)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_an_upgraded_model_answers_many_as_it_answers_one(kind):
    base, processor = build_example_base(kind)
    model, processor = upgrade(base, processor=processor)
    engine = Engine(stir(model), processor, max_batch=8)
    try:
        questions = [asked(processor, i) for i in range(12)]
        wanted = [alone(model, processor, *question, 8) for question in questions]
        assert together(engine, questions, 8) == wanted and len(set(wanted)) > 3
        with model.fusion.switched_off(*model.fusion.gated):
            without = [alone(model, processor, *question, 8) for question in questions]
        assert together(engine, questions, 8, off=model.fusion.gated) == without != wanted
        before = engine.counts.copy()
        assert together(engine, questions, 8) == wanted  # the same pictures again
        shown = engine.counts["pictures"] - before["pictures"]
        assert engine.counts["pictures_kept"] - before["pictures_kept"] == shown > 8
    finally:
        engine.close()


def test_the_worlds_backbones_answer_many_as_they_answer_one():
    model, processor = build("shapes", "shapes", "sparsecut")
    model.generation_config.eos_token_id = None  # longer answers than it would give
    engine = Engine(stir(model), processor, max_batch=32)
    try:
        texts = [
            "what shape is top-left",
            "how many are yellow",
            "where is the bar",
            "what digit is bottom-right and what shade",
        ]
        shown = [picture(i).resize((96, 96)) for i in range(4)]
        questions = [
            ([{"role": "user", "content": f"<image>\n{texts[i % 4]}"}], [shown[i % 3]])
            for i in range(12)
        ]
        wanted = [alone(model, processor, *question, 10) for question in questions]
        assert together(engine, questions, 10) == wanted and len(set(wanted)) > 2
        assert engine.counts["batches"] < 12 and len(engine.kept.found) == 3
    finally:
        engine.close()
