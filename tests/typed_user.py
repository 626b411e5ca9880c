"""What a user of the package writes, for a type checker: `make types` reads it; nothing runs it."""

from collections.abc import Iterator
from typing import assert_type

from transformers import PreTrainedModel, ProcessorMixin

import sparsecut
from sparsecut.processing_audio import SparseCutAudioProcessor


def check_what_is_built() -> str:
    """A model that is built, its plan, and a chat with it."""
    model, processor = sparsecut.build("shapes", "shapes", "sparsecut", view_size=(96, 96))
    assert_type(model, sparsecut.SparseCutForConditionalGeneration)
    assert_type(processor, sparsecut.SparseCutProcessor | SparseCutAudioProcessor)
    assert_type(model.plan, sparsecut.Plan)
    chat = sparsecut.Chat(model, processor, max_new_tokens=4)
    assert_type(chat.stream("what is this", "image.png"), Iterator[str])
    return chat.ask("what is this", "image.png")


def check_what_is_upgraded() -> None:
    """A pretrained model with shortcuts, and one that is loaded."""
    model, processor = sparsecut.upgrade("llava-hf/llava-1.5-7b-hf")
    assert_type(model, sparsecut.SparseCutUpgrade)
    assert_type(processor, ProcessorMixin)
    loaded, processor = sparsecut.load("my-shortcuts")
    assert_type(loaded, PreTrainedModel)


def check_plans() -> str:
    """A plan by name, and its drawing."""
    plan = sparsecut.make_plan("deepstack", 24, 32)
    assert_type(plan, sparsecut.Plan)
    assert_type(plan.shortcuts, tuple[sparsecut.Shortcut, ...])
    return sparsecut.draw(plan, 24, 32)
