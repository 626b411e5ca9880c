"""The model card: README.md of a model that is handed on, written from what is known of the model.

A card is signed by a hash of its text, in its last line. So a card that a user has edited is known,
and stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .adapters import list_adapted_parts
from .configuration import SparseCutConfig, SparseCutUpgradeConfig
from .drawing import draw, escape_controls
from .encoders import is_audio
from .licences import CARD as CARD
from .licences import describe_licenses, find_license, is_hub_name, join_licenses
from .plan import Plan
from .saved_code import AUTOMATIC
from .schema import read_text_file, write_text_file

TAGS = ("sparsecut", "vision-language", "shortcuts")
PAPER = "https://arxiv.org/abs/2602.00505"
SIGNATURE = re.compile(r"\n<!-- written by sparsecut: ([0-9a-f]{16}) -->\n*\Z")
NAME_LINE = re.compile(r"^name = .*$", re.MULTILINE)  # in the example of use

IMAGE_EXAMPLE = """\
from transformers import pipeline
name = {name}
ask = pipeline("image-text-to-text", name, trust_remote_code=True)
content = [{{"type": "image", "image": "photo.png"}}, {{"type": "text", "text": "What is this?"}}]
print(ask([{{"role": "user", "content": content}}], max_new_tokens=50)[0]["generated_text"][-1])"""
AUDIO_EXAMPLE = """\
from transformers import AutoModelForImageTextToText, AutoProcessor
name = {name}
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
inputs = processor(audio=["clip.wav"], text=[processor.audio_token], return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=50)))"""
SHORTCUTS_EXAMPLE = """\
import sparsecut  # pip install sparsecut
name = {name}
model, processor = sparsecut.load(name)
chat = sparsecut.Chat(model, processor, max_new_tokens=50)
print(chat.ask("What is this?", "photo.png"))"""


@dataclass(frozen=True)
class Part:
    """A pretrained part of a model.

    Attributes:
        role: "encoder", "language model" or "base".
        name: Its hub name or folder; None where it is not known.
    """

    role: str
    name: str | None


@dataclass(frozen=True)
class Score:
    """A score of an evaluation.

    Attributes:
        data: The benchmark's or data file's name.
        metric: What was measured.
        value: The score as it is reported: percent for an accuracy.
        interval: Its 95 % interval, in the same unit; None where there is none.
        count: Number of questions.
        command: The command that made it, where known.
        is_over_images: The interval is over images, several questions about each.
    """

    data: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    count: int
    command: str | None = None
    is_over_images: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """What a card says of a model.

    Attributes:
        plan: The shortcuts.
        depths: Numbers of encoder blocks and decoder layers.
        parts: The pretrained parts.
        are_shortcuts_alone: The base is not in the folder.
        takes_audio: The encoder is one of audio.
        data: What it was trained on, one line each; None where that is not known.
        datasets: Those of `data` that are on the hub, by name.
        scores: What an evaluation found.
        tags: Further tags for the hub.
        adapted: Parts whose adapters lie beside the weights.
    """

    plan: Plan
    depths: tuple[int, int]
    parts: tuple[Part, ...]
    are_shortcuts_alone: bool = False
    takes_audio: bool = False
    data: tuple[str, ...] | None = None
    datasets: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()
    tags: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()


def describe_config(config: SparseCutConfig | SparseCutUpgradeConfig) -> ModelFacts:
    """What the configuration of a whole model tells of it."""
    depths = config.vision_depth, config.language_depth
    if isinstance(config, SparseCutUpgradeConfig):
        name = config.base_name or _get_name(config.base_config)
        return ModelFacts(config.get_plan(), depths, (Part("base", name),))
    parts = (
        Part("encoder", _get_name(config.vision_config)),
        Part("language model", _get_name(config.text_config)),
    )
    return ModelFacts(config.get_plan(), depths, parts, takes_audio=is_audio(config.vision_config))


def describe_shortcuts(facts: dict) -> ModelFacts:
    """What fusion.json tells of shortcuts alone."""
    depths = facts["depths"][0], facts["depths"][1]
    plan = Plan.from_dict(facts["plan"])
    return ModelFacts(plan, depths, (Part("base", facts["base"]),), are_shortcuts_alone=True)


def _get_name(config: Any) -> str | None:
    return getattr(config, "_name_or_path", None) or None


def make_card(facts: ModelFacts, name: str, *, online: bool = False) -> str:
    """The text of a card.

    Args:
        facts: What is known of the model.
        name: The model's hub name, or its folder's.
        online: Whether the hub may be asked for licences of parts.
    """
    licenses = [find_license(part.name, online=online) for part in facts.parts]
    lines = [
        f"# {_clean(_get_title(name))}",
        "",
        _introduce(facts),
        "",
        "## Shortcuts",
        "",
        "```text",
        escape_controls(draw(facts.plan, *facts.depths)).replace("```", "'''"),
        "```",
        "",
        "## Parts and licences",
        "",
        *_list_parts(facts.parts, licenses),
        "",
        "## Training data",
        "",
        *_list_data(facts.data),
        "",
        "## Scores",
        "",
        *_list_scores(facts.scores),
        "",
        "## Use",
        "",
        *_show_use(facts, name),
    ]
    header = make_metadata(facts, name, licenses).to_yaml(line_break="\n")
    return _sign(f"---\n{header}\n---\n\n" + "\n".join(lines) + "\n")


def make_metadata(facts: ModelFacts, name: str, licenses: Sequence[str | None]) -> ModelCardData:
    """The part of a card that the hub reads.

    Args:
        facts: What is known of the model.
        name: The model's name.
        licenses: The licence of each part; None where it is not known.
    """
    on_hub = [part.name for part in facts.parts if is_hub_name(part.name)]
    results = []
    for score in facts.scores:
        result = EvalResult(
            task_type=_get_task(facts),
            dataset_type=_make_slug(score.data),
            dataset_name=_clean(score.data),
            metric_type=_make_slug(score.metric),
            metric_value=score.value,
        )
        results.append(result)
    return ModelCardData(
        base_model=on_hub or None,
        base_model_relation="adapter" if facts.are_shortcuts_alone and on_hub else None,
        datasets=list(facts.datasets) or None,
        eval_results=results or None,
        library_name="sparsecut" if facts.are_shortcuts_alone else "transformers",
        **describe_licenses(licenses),
        model_name=_clean(_get_title(name)) if results else None,
        pipeline_tag=_get_task(facts),
        tags=list(dict.fromkeys((*TAGS, *facts.tags))),
    )


def _get_title(name: str) -> str:
    """The last part of a model's name that says anything."""
    return name.removesuffix("/final").rpartition("/")[2]


def _get_task(facts: ModelFacts) -> str:
    return "audio-text-to-text" if facts.takes_audio else "image-text-to-text"


def _introduce(facts: ModelFacts) -> str:
    names = [f"{part.role} {_show_part(part)}" for part in facts.parts]
    if facts.are_shortcuts_alone:
        text = (
            f"Sparse shortcuts for a vision-language model, the {names[0]}, which is not in this"
            " repository."
        )
    elif len(names) == 1:
        text = f"A vision-language model, the {names[0]}, upgraded with sparse shortcuts."
    else:
        text = f"The {' and the '.join(names)}, joined by sparse shortcuts."
    return (
        f"{text} Features of several encoder layers enter several decoder layers"
        f" ([SparseCut]({PAPER}))."
    )


def _list_parts(parts: Sequence[Part], licenses: Sequence[str | None]) -> list[str]:
    lines = ["| part | name | licence |", "|---|---|---|"]
    for part, license_name in zip(parts, licenses, strict=True):
        shown = _quote(license_name) if license_name else "not known"
        lines.append(f"| {part.role} | {_show_part(part)} | {shown} |")
    lines += ["", "The Python files in this repository are SparseCut's, under Apache-2.0."]
    joined = join_licenses(licenses)
    if joined is None:
        lines.append("The licence of a part is not known, so none is named for the whole.")
    elif joined == "other":
        lines.append("The parts have different licences, and all of them hold for the whole.")
    return lines


def _show_part(part: Part) -> str:
    """The name of a part, without the folders above it on the machine that wrote the card."""
    if part.name is None:
        return "of unknown name"
    if is_hub_name(part.name) and "/" in part.name:
        return f"[{_quote(part.name)}](https://huggingface.co/{part.name})"
    return _quote(Path(part.name).name)


def _list_data(data: Sequence[str] | None) -> list[str]:
    if data is None:
        return ["Not noted. A model that `sparsecut train` writes lists its data here."]
    return [f"- {_clean(line)}" for line in data]


def _list_scores(scores: Sequence[Score]) -> list[str]:
    if not scores:
        return ["None yet. `sparsecut card FOLDER --scores OUT` adds those of `sparsecut eval`."]
    lines = ["| data | measure | score | 95 % interval | questions |", "|---|---|---|---|---|"]
    commands = []
    for score in scores:
        interval = ""
        if score.interval:
            interval = " to ".join(f"{bound:.1f}" for bound in score.interval)
        cells = (
            _quote(score.data),
            _quote(score.metric),
            f"{score.value:.1f}",
            interval,
            str(score.count),
        )
        lines.append(f"| {' | '.join(cells)} |")
        if score.command and score.command not in commands:
            commands.append(score.command)
    shared = [_quote(score.data) for score in scores if score.interval and score.is_over_images]
    if shared:
        names = " and ".join(dict.fromkeys(shared))
        lines += [
            "",
            f"Several questions of {names} share an image, so its interval is over images.",
        ]
    if commands:
        shown = [escape_controls(command, keep_lines=False) for command in commands]
        text = "\n".join(shown).replace("```", "'''")
        lines += ["", "```sh", text, "```"]
    return lines


def _show_use(facts: ModelFacts, name: str) -> list[str]:
    example = AUDIO_EXAMPLE if facts.takes_audio else IMAGE_EXAMPLE
    if facts.are_shortcuts_alone:
        example = SHORTCUTS_EXAMPLE
    lines = ["```python", example.format(name=json.dumps(name)), "```"]
    if facts.adapted:
        parts = " and the ".join(facts.adapted)
        lines += ["", f"The adapters of the {parts} part are put on too (`pip install peft`)."]
    if not facts.are_shortcuts_alone:
        lines += [
            "",
            "`trust_remote_code=True` runs the Python files of this repository. With `pip install"
            " sparsecut` and `import sparsecut` first, it is not needed.",
        ]
    return lines


def _clean(text: str) -> str:
    """Text of one line, with nothing that would control a terminal, end the line or begin HTML."""
    return escape_controls(text, keep_lines=False).replace("<", "&lt;")


def _quote(text: str) -> str:
    """A name as code in Markdown, also inside of a table."""
    return f"`{escape_controls(text, keep_lines=False).replace('`', chr(39)).replace('|', '/')}`"


def _make_slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text.lower()).strip("-") or "unknown"


# ---- the file


def write_card(
    folder: str | Path,
    facts: ModelFacts,
    *,
    name: str | None = None,
    online: bool = False,
    tags: tuple[str, ...] = (),
) -> bool:
    """Write the card of a folder, unless it has one that a user wrote or edited.

    Args:
        folder: The model's folder.
        facts: What is known of the model.
        name: Its hub name. Default: the folder's.
        online: Whether the hub may be asked for licences of parts.
        tags: Further tags for the hub.

    Returns:
        Whether it was written.
    """
    file = Path(folder) / CARD
    if file.exists() and not is_unedited(read_text_file(file)):
        return False
    facts = replace(facts, tags=(*facts.tags, *tags), adapted=list_adapted_parts(Path(folder)))
    write_text_file(file, make_card(facts, name or Path(folder).resolve().name, online=online))
    return True


def is_unedited(text: str) -> bool:
    """Whether a card is as sparsecut or transformers wrote it."""
    signature = SIGNATURE.search(text)
    if signature is None:
        return AUTOMATIC in text
    return _digest(text[: signature.start()]) == signature[1]


def rename(text: str, name: str) -> str | None:
    """An unedited card of sparsecut, with another name of the model in its example of use.

    Returns:
        The card; None where sparsecut did not write it.
    """
    body, num_signatures = SIGNATURE.subn("", text)
    if not num_signatures:
        return None
    line = f"name = {json.dumps(name)}"
    return _sign(NAME_LINE.sub(lambda _: line, body, count=1))


def _sign(text: str) -> str:
    body = text.rstrip("\n") + "\n"
    return f"{body}\n<!-- written by sparsecut: {_digest(body)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.rstrip("\n").encode()).hexdigest()[:16]
