"""A recipe: a model, its plan, the stages of its training, and what it is evaluated on.

A recipe is frozen data, equal to its YAML. Relative paths start at the working directory. Paths may
name environment variables ("$DATA/train.json"), which are read when the path is used. `dump_recipe`
writes the recipe as it ran, so that this file alone repeats the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..schema import (
    UserError,
    build_dataclass,
    check_choice,
    check_pattern,
    check_types,
    make_tuples,
    write_text_file,
)
from ..view_sizes import COARSE_VIEWS, NATIVE
from .mistaken_files import read_settings_file
from .overrides import override
from .shipped import find_file
from .source import Source as Source
from .yaml_io import dump_yaml, rename_key, to_lists

PARTS = ("vision", "projector", "fusion", "language", "head")
ADAPTERS = ("vision:lora", "language:lora")
TEMPLATES = ("chat", "plain")
LOSSES = ("tokens", "batches")


BUILD_SETTINGS = ("view_size", "coarse", "min_pixels", "max_pixels")


@dataclass(frozen=True)
class Model:
    """Where training starts: a vision encoder and a language model to join, or a base model.

    Attributes:
        vision: The encoder's hub name or folder.
        language: The language model's hub name or folder.
        base: A pretrained VLM, which is upgraded, or a model or shortcuts saved by this package.
        view_size: Pixels of a view's side, where the encoder takes other sizes than its own.
        coarse: How images are fitted to the encoder, one of `COARSE_VIEWS`; None for "squash".
        min_pixels: With coarse "native", the fewest pixels of an image after it was resized.
        max_pixels: With coarse "native", the most.
        replan: Whether a saved model that `build` made gets the recipe's fusion as its new plan,
            and keeps the projector of its input.
    """

    vision: str | None = None
    language: str | None = None
    base: str | None = None
    view_size: int | None = None
    coarse: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    replan: bool = False

    def __post_init__(self):
        check_types(self)
        if self.replan and self.base is None:
            raise UserError(
                "replan gives a saved model another plan, but no base is given; name the saved"
                " model as base, or remove replan"
            )
        names = [name for name in ("vision", "language", "base") if getattr(self, name) is not None]
        if names not in (["vision", "language"], ["base"]):
            raise UserError(
                "a model is either vision and language, or base, but"
                f" {' and '.join(names) or 'none of them'} was given; name an encoder and a"
                " language model to join, or a pretrained VLM to upgrade or a saved model to"
                " continue with"
            )
        if self.coarse is not None:
            check_choice("coarse", self.coarse, COARSE_VIEWS)
        self._check_fitting()

    def _check_fitting(self) -> None:
        """Refuse settings of images that have no effect."""
        for name in BUILD_SETTINGS:
            value = getattr(self, name)
            if self.base is not None and value is not None:
                raise UserError(
                    f"{name}={value} is for an encoder that is joined, but base={self.base} has its"
                    " own; remove it"
                )
            is_limit = name.endswith("_pixels") and value is not None
            if is_limit and (self.coarse != NATIVE or value < 1):
                raise UserError(
                    f"{name} is {value} and coarse is {self.coarse or 'squash'}, but limits are"
                    " above 0 and need coarse: native; remove it, or set coarse: native"
                )

    def get_build_settings(self) -> dict:
        """Return the arguments of `build` that say how images are fitted to the encoder."""
        settings = {name: getattr(self, name) for name in BUILD_SETTINGS}
        return settings | {"coarse": self.coarse or "squash"}


@dataclass(frozen=True)
class Lora:
    """PEFT adapters of a stage that trains a part as `language:lora`.

    Attributes:
        r: Rank of the matrices.
        alpha: Their factor is alpha / r.
        dropout: Dropout before an adapter, from 0 to below 1.
        targets: PEFT's target modules, a word or a list.
        merge: Whether adapters are added to the weights after the stage, or stay beside the model.
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
        if isinstance(self.targets, str):
            check_pattern("targets", self.targets)
        elif not all(isinstance(target, str) for target in self.targets):
            raise UserError(f"targets is {self.targets!r}, but names layers, such as q_proj")
        if not self.targets:
            raise UserError("targets is empty; name layers such as q_proj, or write all-linear")
        for name in ("r", "alpha"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}, but must be from 0 to below 1")


@dataclass(frozen=True)
class Stage:
    """One round of training: data, the parts that are trained, and how.

    Attributes:
        name: Names the stage's folder.
        data: The sources of records.
        train: The parts that are trained, of `PARTS`, or `language:lora` for an adapter on a frozen
            part.
        args: `TrainingArguments` of transformers, under the same names.
        lr: Learning rates of some of the trained parts; the others take that of `args`.
        template: "chat" for the tokenizer's chat template, "plain" for image and caption.
        max_length: Longer records are cut to so many tokens. None refuses what is longer than the
            language model takes.
        gate_penalty: This times the sum of the gates' sizes is added to the loss.
        loss_over: "tokens" for the mean over all trained tokens of a step, however they are divided
            into micro-batches and processes. "batches" for the mean of each micro-batch's own mean,
            as older training code has it: a token counts for less in a batch with long answers.
        group: Whether the records of a step have similar lengths, and all or none have images.
        pack: Tokens of a row; each row has as many records as fit, and none sees another.
        max_image_tokens: A record with more is refused, and packed rows hold no more.
        pad_to: Batches are as long as a multiple of it, for `torch_compile`.
        lora: Settings of adapters.
        weight_decay: Weight decay of some of the trained parts; the others take that of `args`.
        global_batch: Records of a step over all processes. Micro-batches are accumulated to it.
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
        if not self.train or not self.data:
            raise UserError(
                f"stage {self.name} would train nothing; give it data and parts to train among"
                f" {', '.join(PARTS)}"
            )
        check_choice("template", self.template, TEMPLATES)
        check_choice("loss_over", self.loss_over, LOSSES)
        self._check_parts()
        self._check_part_values("lr")
        self._check_part_values("weight_decay")
        self._check_numbers()
        self._check_mixture()

    def _check_parts(self) -> None:
        for part in self.train:
            check_choice("train names a part that", part, (*PARTS, *ADAPTERS))
            if f"{part}:lora" in self.train:
                raise UserError(
                    f"train names both {part} and {part}:lora; train the part, or its adapter"
                )
        has_adapter = not set(self.train).isdisjoint(ADAPTERS)
        if has_adapter and self.lora is None:
            object.__setattr__(self, "lora", Lora())
        if self.lora is not None and not has_adapter:
            raise UserError(
                f"lora is set, but stage {self.name} trains {', '.join(self.train)}; train"
                " language:lora, or remove it"
            )

    def _check_part_values(self, name: str) -> None:
        for part, value in getattr(self, name).items():
            is_head = part == "head" and "language" in self.train
            if part not in self.train and not is_head:
                raise UserError(
                    f"{name} is set for {part!r}, but stage {self.name} trains"
                    f" {', '.join(self.train)}; add the part to `train` or remove its {name}"
                )
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < math.inf
            ):
                raise UserError(
                    f"{name}.{part} is {value!r}, but must be a number of at least 0, like 1e-3"
                )

    def _check_numbers(self) -> None:
        for name in ("pack", "max_image_tokens", "max_length", "pad_to", "global_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                unit = "record" if name == "global_batch" else "token"
                raise UserError(
                    f"{name} is {value}, but at least 1 {unit} is needed; remove it for no limit"
                )
        if self.gate_penalty < 0:
            raise UserError(f"gate_penalty is {self.gate_penalty}, but must be at least 0")

    def _check_mixture(self) -> None:
        streams = [source.streaming for source in self.data]
        weights = [source.weight is not None for source in self.data]
        if any(streams) and not all(streams):
            raise UserError(
                f"stage {self.name} mixes streams and files; set streaming: true for all of its"
                " data, or for none"
            )
        if any(weights) and not all(weights):
            raise UserError(
                f"stage {self.name} gives a weight to some of its data only; give one to all, or to"
                " none"
            )
        if any(weights) and self.pack:
            raise UserError(
                f"stage {self.name} gives its data weights and packs it into rows; remove pack, or"
                " the weights"
            )
        if any(streams) and (self.group or self.pack):
            raise UserError(
                f"stage {self.name} reads a stream, whose records are not known in advance; remove"
                " group and pack"
            )
        max_steps = self.args.get("max_steps", -1)
        # Another type is refused where all arguments are checked.
        if any(streams) and isinstance(max_steps, int | float) and max_steps <= 0:
            raise UserError(
                f"stage {self.name} reads a stream, whose length is not known; set args.max_steps"
            )


@dataclass(frozen=True)
class Evaluation:
    """What the trained model is evaluated on.

    Attributes:
        data: The sources of questions; the last assistant turn is the right answer.
        max_new_tokens: The longest answer, in tokens.
        batch_size: Questions that are answered at once.
    """

    data: tuple[Source, ...]
    max_new_tokens: int = 16
    batch_size: int = 16

    def __post_init__(self):
        make_tuples(self, "data")
        check_types(self)


@dataclass(frozen=True)
class Recipe:
    """A model, its plan, and the stages of its training.

    Attributes:
        model: Where training starts.
        stages: Its stages, in order.
        output: The run's folder.
        fusion: A method's name, a method with options, or a plan in full. It may be None only where
            the model has a base: a saved model has its plan, and `upgrade` has a default.
        evaluate: What the trained model is evaluated on.
        seed: Seed of the new weights and of the order of records.
        feature_cache: A folder for the vision features of a frozen encoder. Every image is then
            encoded once, whatever the number of epochs.
        chat_template_kwargs: Arguments of the chat template, such as `enable_thinking: false`.
            They are saved with the model as defaults of its template.
    """

    model: Model
    stages: tuple[Stage, ...]
    output: str
    fusion: str | dict | None = None
    evaluate: Evaluation | None = None
    seed: int = 0
    feature_cache: str | None = None
    chat_template_kwargs: dict = field(default_factory=dict)

    def __post_init__(self):
        make_tuples(self, "stages")
        check_types(self)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}, but must be from 0 to {2**32 - 1}")
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"stages are named {names}, but at least one stage is needed and names must differ"
            )
        if self.fusion is not None and not self.fusion:
            raise UserError(
                f"fusion is {self.fusion!r}, which names no method and holds no plan; write for"
                " example `fusion: {method: sparsecut}`"
            )
        if self.model.base is None and self.fusion is None:
            raise UserError(
                "a model of an encoder and a language model needs a plan, but fusion is not given;"
                " add one, for example `fusion: {method: sparsecut}`"
            )
        if self.model.replan and self.fusion is None:
            raise UserError(
                "model.replan is true, but fusion is not given; write the new plan, for example"
                " `fusion: cli`, or remove replan"
            )
        if self.model.base is None and self._trains("projector"):
            raise UserError(
                "a stage trains projector, but only an upgraded model (model: {base: ...}) has one"
                " of its own; a built model has its projectors in fusion: train that"
            )
        if self.feature_cache is not None and self._trains("vision"):
            raise UserError(
                f"feature_cache is {self.feature_cache!r}, but features can be cached only of a"
                " frozen encoder, and a stage trains vision; remove feature_cache, or vision from"
                " `train`"
            )

    def _trains(self, part: str) -> bool:
        return any(part in stage.train for stage in self.stages)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: The file, or the name of a recipe that ships with the package, such as "tiny".
        overrides: Dotted changes such as "stages.0.args.max_steps=10".

    Raises:
        UserError: There is no such recipe, or it is wrong.
    """
    plain = read_settings_file(find_file(path, "recipe"), "recipe")
    return parse_recipe(plain, overrides, name=str(path))


def parse_recipe(plain: Any, overrides: Sequence[str] = (), *, name: str = "recipe") -> Recipe:
    """Build a recipe from plain keys and values, as YAML holds them.

    Args:
        plain: The keys and values.
        overrides: Dotted changes such as "stages.0.args.max_steps=10".
        name: Stands at the start of error messages.

    Raises:
        UserError: The recipe is wrong.
    """
    for change in overrides:
        plain = override(plain, change)
    plain = rename_key(plain, "states", "feature_cache", name)
    return build_dataclass(Recipe, plain, name)


def dump_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe with everything that was decided; loading the file gives an equal recipe."""
    plain = asdict(recipe, dict_factory=_drop_empty)
    for holder in (*plain["stages"], plain.get("evaluate", {})):
        if len(holder.get("data", ())) == 1:
            holder["data"] = holder["data"][0]
    write_text_file(path, dump_yaml(to_lists(plain)))


def _drop_empty(items: list[tuple[str, Any]]) -> dict:
    return {key: value for key, value in items if value is not None and value != {}}
