"""`sparsecut chat`: talk with a model about images or sound."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from ..config.places import check_model_files
from ..shapes import EXAMPLE_IMAGE, EXAMPLE_QUESTIONS
from ..shipped_model import SHIPPED_FOLDER
from .app import (
    Device,
    Dtype,
    OptionalModel,
    TemplateArguments,
    Text,
    app,
    argument,
    echo,
    load_model,
    option,
    set_template_arguments,
)
from .early_checks import check_files


@app.command()
def chat(
    model: OptionalModel = None,
    images: Annotated[
        list[Path] | None, argument("Images that go with the first question.")
    ] = None,
    audio: Annotated[
        list[Path] | None,
        option("A sound file that goes with the first question: WAV, FLAC, MP3 or OGG."),
    ] = None,
    ask: Annotated[Text, option("Ask this one question, print the answer, and leave.")] = None,
    temperature: Annotated[
        float, option("0 takes the likeliest tokens; more draws at random.", min=0)
    ] = 0.0,
    max_new_tokens: Annotated[int, option("Longest answer, in tokens.", min=1)] = 256,
    template_arg: TemplateArguments = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model about images or sound. In the conversation, /help lists the commands.

    Without MODEL it is the small one that ships with the package, and an example image.
    """
    if model is None:
        model = str(SHIPPED_FOLDER)
        images = [EXAMPLE_IMAGE]
        echo(describe_shipped_model(), err=True)
    check_model_files(model)
    check_files(images, "image")
    check_files(audio, "audio")
    from ..audio import open_audio
    from ..pixels import open_image

    opened = [open_image(path) for path in images or []] + [
        open_audio(path) for path in audio or []
    ]
    loaded, processor = load_model(model, device, dtype)
    from ..chat import Chat, run_terminal
    from ..prompts import check_medium, get_medium

    for medium, files in (("image", images), ("audio", audio)):
        if files:
            check_medium(processor, medium, f"the file {files[0]}")
    set_template_arguments(processor, template_arg)
    conversation = Chat(loaded, processor, temperature=temperature, max_new_tokens=max_new_tokens)
    if ask is not None:
        for text in conversation.stream(ask, *opened):
            echo(text, nl=False)
        echo()
        return
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # not part of every Python
            import readline  # noqa: F401  (from now on `input` knows arrow keys and a history)
    prompt = "> " if is_terminal else ""
    if is_terminal:
        echo(f"/{get_medium(processor)} PATH adds one, /help lists the commands, /quit leaves")
    run_terminal(
        conversation,
        opened,
        lambda: input(prompt),
        lambda text: echo(text, nl=False),
    )
    if is_terminal:
        echo()


def describe_shipped_model() -> str:
    """Return what a conversation with the shipped model is about, and what to ask there."""
    questions = "".join(f"\n  {question}" for question in EXAMPLE_QUESTIONS)
    return (
        "This is the small model that ships with SparseCut; it was trained on drawn shapes alone.\n"
        f"The image: {EXAMPLE_IMAGE}\n"
        f"Ask, for example:{questions}"
    )
