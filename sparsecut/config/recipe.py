"""The file a user writes: a model, its plan, the stages of its training and what it is evaluated
on.

A recipe is frozen data, equal to its YAML, and knows nothing of torch. Relative paths are relative to the working
directory, where the command was typed; paths may name environment variables ("$DATA/train.json"), which are read when the
path is used. `dump_recipe` writes the recipe as it ran, so that this file alone repeats the run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from ..schema import (
    UserError,
    build_dataclass,
    check_choice,
    check_pattern,
    check_types,
    make_tuples,
)
from .yaml_io import override, plain_lists, read_yaml

PARTS = ("vision", "projector", "fusion", "language", "head")
ADAPTED = ("vision:lora", "language:lora")
TEMPLATES = ("chat", "plain")
LOSSES = ("tokens", "batches")
ON_ERROR = ("stop", "skip")
CHOICES = ("where", "hold_out", "keep")  # what chooses among a source's records


@dataclass(frozen=True)
class Source:
    """Records in LLaVA's format (path: .json, .jsonl or .parquet) and their pictures (images: a
    folder or a tar archive).

    images: None means the folder of `path`. on_error: "stop" at a bad record, or "skip" and count
    it. where: a regular expression that a record's id must contain; hold_out: one that it must not;
    group: one whose parentheses catch the group of a record that names none. keep: at most so many,
    a fixed random choice. weight: the source's share of a mixture, against the others' weights.
    streaming: records come from the files as they are read. max_broken: the share of records that
    may be skipped.
    """

    path: str
    images: str | None = None
    on_error: str = "stop"
    where: str | None = None
    hold_out: str | None = None
    group: str | None = None
    keep: int | None = None
    weight: float | int | None = None
    streaming: bool = False
    max_broken: float | int = 0.01

    def __post_init__(self):
        check_types(self)
        if self.weight is not None and self.weight <= 0:
            raise UserError(
                f"weight is {self.weight}, but a share is above 0; remove the source to leave"
                " it out"
            )
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"max_broken is {self.max_broken}, but a share is from 0 to 1")
        if self.streaming and (
            chosen := [name for name in CHOICES if getattr(self, name) is not None]
        ):
            raise UserError(
                f"{chosen[0]} is set, but records of a stream are not chosen among: set streaming:"
                " false, or remove it"
            )
        check_choice("on_error", self.on_error, ON_ERROR)
        for name in ("where", "hold_out", "group"):
            check_pattern(name, getattr(self, name))
        if self.group and re.compile(self.group).groups != 1:
            raise UserError(
                f"group is {self.group!r}, but needs one pair of parentheses, around what names the"
                " group"
            )
        if self.keep is not None and self.keep < 1:
            raise UserError(
                f"keep is {self.keep}, but at least 1 record must be kept; leave it out to keep all"
            )


@dataclass(frozen=True)
class Model:
    """Where training starts: a vision encoder and a language model to join, or a base, by hub name
    or folder.

    base: a finished vision-language model, which is upgraded, or a model (or shortcuts) saved by
    this package. view_size: pixels of a view, for vision encoders of pictures of any size.
    """

    vision: str | None = None
    language: str | None = None
    base: str | None = None
    view_size: int | None = None

    def __post_init__(self):
        check_types(self)
        given = [name for name in ("vision", "language", "base") if getattr(self, name) is not None]
        if given not in (["vision", "language"], ["base"]):
            raise UserError(
                "a model is either vision and language, or base, but"
                f" {' and '.join(given) or 'none of them'} was given; name an encoder and a"
                " language model to join, or a finished vision-language model to upgrade or go on"
                " from"
            )
        if self.base is not None and self.view_size is not None:
            raise UserError(
                f"view_size={self.view_size} is for an encoder that is joined, but base={self.base}"
                " has its own; leave it out"
            )


@dataclass(frozen=True)
class Lora:
    """Adapters of a stage that trains a part as `language:lora`: PEFT's rank, alpha, dropout and
    target modules.

    merge: true adds them to the weights after the stage, false keeps them beside the model.
    """

    r: int = 16
    alpha: int = 32
    dropout: float | int = 0.0
    targets: str | tuple = "all-linear"
    merge: bool = True

    def __post_init__(self):
        if not isinstance(self.targets, str):
            make_tuples(self, "targets")
        check_types(self)
        if self.r < 1 or not 0 <= self.dropout < 1:
            raise UserError(
                f"r is {self.r} and dropout {self.dropout}, but r is at least 1 and dropout from 0"
                " to below 1"
            )


@dataclass(frozen=True)
class Stage:
    """One round of training: what it learns from (data), which parts learn (train), and how (args,
    lr).

    train: parts, or `language:lora` for an adapter on one that rests (lora: its settings). args:
    `TrainingArguments` of transformers, nothing renamed. lr, weight_decay: for some of the trained
    parts, the others take those of `args`. template: "chat" (the tokenizer's own) or "plain"
    (picture, then caption). max_length: longer records are cut to so many tokens; None takes the
    language model's limit and refuses longer ones. gate_penalty: this times the sum of the gates'
    sizes is added to the loss (`sparsecut search` uses it). loss_over: "tokens" (the mean over all
    learned tokens of a step, however they are divided into micro-batches and processes) or
    "batches" (the mean of each micro-batch's own mean, as older training code has it: a token
    counts for less in a batch with long answers). group: true puts records of alike length into a
    step, and records with pictures and texts into different ones.
    pack: rows of so many tokens, each with as many records as fit; none sees another.
    max_image_tokens: a record with more is refused, and packed rows hold no more. pad_to: batches
    are as long as a multiple of it, for torch_compile. global_batch: records of a step over all
    processes; micro-batches are accumulated to that many, or the stage is refused.
    """

    name: str
    data: tuple[Source, ...]
    train: tuple[str, ...]
    args: dict = field(default_factory=dict)
    lr: dict = field(default_factory=dict)
    template: str = "chat"
    max_length: int | None = None
    gate_penalty: float | int = 0.0
    loss_over: str = "tokens"
    group: bool = False
    pack: int | None = None
    max_image_tokens: int | None = None
    pad_to: int | None = None
    lora: Lora | None = None
    weight_decay: dict = field(default_factory=dict)
    global_batch: int | None = None

    def __post_init__(self):
        make_tuples(self, "data", "train")
        check_types(self)
        if not re.fullmatch(r"[\w-]+", self.name) or self.name == "final":
            raise UserError(
                f"name is {self.name!r}, but it names a folder: use letters, digits, - and _, and"
                " not 'final'"
            )
        for part in self.train:
            check_choice("train names a part that", part, (*PARTS, *ADAPTED))
        if twice := [part for part in self.train if f"{part}:lora" in self.train]:
            raise UserError(
                f"train names both {twice[0]} and {twice[0]}:lora; train the part, or its adapter"
            )
        if self.lora is None and set(self.train) & set(ADAPTED):
            object.__setattr__(self, "lora", Lora())
        if self.lora is not None and not set(self.train) & set(ADAPTED):
            raise UserError(
                f"lora is set, but stage {self.name} trains {', '.join(self.train)}; train"
                " language:lora, or remove it"
            )
        if not self.train or not self.data:
            raise UserError(
                f"stage {self.name} would train nothing; give it data and parts to train among"
                f" {', '.join(PARTS)}"
            )
        for name in ("lr", "weight_decay"):
            for part, value in getattr(self, name).items():
                if part not in self.train and not (part == "head" and "language" in self.train):
                    raise UserError(
                        f"{name} is set for {part!r}, but stage {self.name} trains"
                        f" {', '.join(self.train)}; add the part to `train` or remove its {name}"
                    )
                if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                    raise UserError(
                        f"{name}.{part} is {value!r}, but must be a number of at least 0, like 1e-3"
                    )
        check_choice("template", self.template, TEMPLATES)
        _check_mixture(self)
        check_choice("loss_over", self.loss_over, LOSSES)
        for name in ("pack", "max_image_tokens", "max_length", "pad_to", "global_batch"):
            if (given := getattr(self, name)) is not None and given < 1:
                what = "record" if name == "global_batch" else "token"
                raise UserError(
                    f"{name} is {given}, but at least 1 {what} is needed; leave it out for no limit"
                )
        if self.gate_penalty < 0:
            raise UserError(f"gate_penalty is {self.gate_penalty}, but a penalty is at least 0")


@dataclass(frozen=True)
class Evaluation:
    """What the trained model is asked: data, answer length and batch size."""

    data: tuple[Source, ...]
    max_new_tokens: int = 16
    batch_size: int = 16

    def __post_init__(self):
        make_tuples(self, "data")
        check_types(self)


@dataclass(frozen=True)
class Recipe:
    """A model, its plan (fusion: a method's name, a method with options, or a plan in full), and
    the stages of its training.

    fusion is None only where the model is a base: a saved model has its plan, one that is upgraded
    takes `upgrade`'s own. states: a folder for the states of the encoder, which is then run once
    per picture, whatever the number of epochs; only where no stage trains it.
    """

    model: Model
    stages: tuple[Stage, ...]
    output: str
    fusion: str | dict | None = None
    evaluate: Evaluation | None = None
    seed: int = 0
    states: str | None = None

    def __post_init__(self):
        make_tuples(self, "stages")
        check_types(self)
        if self.fusion is None and self.model.base is None:
            raise UserError(
                "a model of an encoder and a language model needs a plan, but fusion is not given;"
                " add one, for example `fusion: {method: sparsecut}`"
            )
        if self.model.base is None and any("projector" in stage.train for stage in self.stages):
            raise UserError(
                "a stage trains projector, but only an upgraded model (model: {base: ...}) has one"
                " of its own; a model that is built has its projectors in fusion: train that"
            )
        if self.states is not None and any("vision" in stage.train for stage in self.stages):
            raise UserError(
                f"states is {self.states!r}, but states can only be kept of an encoder that is"
                " frozen, and a stage trains vision; remove `states`, or vision from `train`"
            )
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"stages are named {names}, but at least one stage is needed and names must differ"
            )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and change it by dotted overrides such as "stages.0.args.max_steps=10";
    ValueError if wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no recipe {path}; give a YAML file such as configs/tiny.yaml")
    return parse_recipe(
        read_yaml(path.read_text(encoding="utf-8"), str(path)), overrides, name=str(path)
    )


def parse_recipe(plain: dict, overrides: Sequence[str] = (), *, name: str = "recipe") -> Recipe:
    """A recipe from plain keys and values, as YAML holds them; `name` stands at the start of error
    messages.
    """
    for change in overrides:
        plain = override(plain, change)
    return build_dataclass(Recipe, plain, name)


def dump_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the recipe with everything that was decided, so that loading the file gives an equal
    recipe.
    """
    plain = asdict(
        recipe, dict_factory=lambda items: {k: v for k, v in items if v is not None and v != {}}
    )
    for holder in (*plain["stages"], plain.get("evaluate", {})):
        if len(holder.get("data", ())) == 1:
            holder["data"] = holder["data"][0]
    text = yaml.safe_dump(plain_lists(plain), sort_keys=False, allow_unicode=True, width=110)
    Path(path).write_text(text, encoding="utf-8")


def _check_mixture(stage: Stage) -> None:
    """Raise ValueError where a stage's sources cannot be mixed as they say."""
    weights = {source.weight is not None for source in stage.data}
    streams = {source.streaming for source in stage.data}
    if len(streams) > 1:
        raise UserError(
            f"stage {stage.name} mixes streams and files; set streaming: true for all of its data,"
            " or for none"
        )
    if len(weights) > 1:
        raise UserError(
            f"stage {stage.name} gives a weight to some of its data only; give one to all, or to"
            " none"
        )
    if True in streams and stage.args.get("max_steps", -1) <= 0:
        raise UserError(
            f"stage {stage.name} reads a stream, whose length is not known; say how long with"
            " args.max_steps"
        )
    if True in streams and (stage.group or stage.pack):
        raise UserError(
            f"stage {stage.name} reads a stream, whose records are not known in advance; remove"
            " group and pack"
        )
    if True in weights and stage.pack:
        raise UserError(
            f"stage {stage.name} weighs its data and packs it into rows; remove pack, or the"
            " weights"
        )
