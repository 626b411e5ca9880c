"""Where a model looks: a map over the image for every shortcut, in three ways.

size: how large what the shortcut adds at a token is, relative to the hidden state there.
gradient: how much the log-probability of an answer would change if the token's addition grew,
that is gradient times input.
occlusion: how much that log-probability falls when the shortcut adds nothing at one place.

Nothing of the model is changed. All three watch the fusion's output, which every model computes
once for a prompt, and multiply each token's features by a factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature

from ..any_size import list_grids
from ..data.encoding import example_encoder
from ..data.examples import Example
from ..hooks import observe_injections
from ..prompts import get_medium, make_greedy_config, prepare_inputs, read_answers
from ..schema import UserError, nearest
from .evaluator import render_question
from .patch_places import locate_patches, watch_table
from .shortcut_norms import apply_context_gate, only
from .token_places import (
    Boxes,
    choose_shape,
    group_tokens,
    locate_tokens,
    spread_over_image,
)

KINDS = ("size", "gradient", "occlusion")
MOST_PLACES = 64  # places of one image at which a shortcut is switched off
SMALLEST = 1e-12  # a map whose values are all below says nothing


@dataclass
class HeatMap:
    """One shortcut's map over one image.

    Attributes:
        shortcut: The shortcut's number in the plan.
        kind: A key of `KINDS`.
        image: The number of the image in the prompt.
        values: [rows, columns] over the whole upright image; NaN where the model sees nothing.
    """

    shortcut: int
    kind: str
    image: int
    values: np.ndarray

    @property
    def is_empty(self) -> bool:
        """Whether the map says nothing: every value is zero, or the model sees no part of it."""
        return not (np.nan_to_num(np.abs(self.values)) > SMALLEST).any()

    def find_peak(self) -> tuple[float, float] | None:
        """The middle of the cell with the highest value, (x, y) from 0 to 1; None for no peak."""
        if self.is_empty or not (np.nan_to_num(self.values) > SMALLEST).any():
            return None
        row, column = np.unravel_index(np.nanargmax(self.values), self.values.shape)
        rows, columns = self.values.shape
        return (column + 0.5) / columns, (row + 0.5) / rows


@dataclass
class HeatMaps:
    """All maps of one question and its answer.

    Attributes:
        answer: The answer that the maps of gradient and occlusion are about.
        log_probability: Of the answer's tokens, their sum.
        without: Shortcut to the same when this shortcut adds nothing at all.
        maps: The maps, by shortcut, kind and image in this order.
    """

    answer: str
    log_probability: float
    without: dict[int, float]
    maps: list[HeatMap] = field(default_factory=list)

    def get(self, shortcut: int, kind: str, image: int = 0) -> HeatMap | None:
        """One map; None where there is none, as of the size of what enters the input."""
        for one in self.maps:
            if (one.shortcut, one.kind, one.image) == (shortcut, kind, image):
                return one
        return None


def make_heat_maps(
    model,
    processor,
    example: Example,
    *,
    kinds: Sequence[str] = KINDS,
    shortcuts: Sequence[int] | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 8,
) -> HeatMaps:
    """Make the maps of one question.

    Args:
        model: A SparseCut model, built or upgraded. Its modes are restored.
        processor: Its processor.
        example: The question with its images. Where it ends with an answer, the maps are about
            this one, else about the model's own.
        kinds: Which of `KINDS` to make. Occlusion needs a pass for every shortcut and place.
        shortcuts: Numbers of the shortcuts; by default all that have weights.
        max_new_tokens: The longest answer of the model itself, in tokens.
        batch_size: Passes of occlusion that run at once.

    Raises:
        UserError: There is no image, the model takes audio, a kind or a shortcut is unknown, the
            answer is empty, or where the tokens are is not known.
    """
    _check_arguments(model, processor, example, kinds)
    numbers = _check_shortcuts(model, shortcuts)
    modes = [(module, module.training) for module in model.modules()]
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        with torch.inference_mode(False):
            example = answer_example(model, processor, example, max_new_tokens)
            return _Painter(model, processor, example, numbers, batch_size).paint(kinds)
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


def _check_arguments(model, processor, example: Example, kinds: Sequence[str]) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(
                f"the kind of map is {kind!r}{nearest(kind, KINDS)}, but allowed are"
                f" {', '.join(KINDS)}"
            )
    if get_medium(processor) != "image":
        raise UserError("heat maps lie over images, but this model takes audio; give another one")
    if not example.images:
        raise UserError(
            f"{example.place} has no image, so there is nothing to draw heat maps over; give a"
            " question about an image"
        )


def _check_shortcuts(model, shortcuts: Sequence[int] | None) -> list[int]:
    """The numbers of the shortcuts to map: those that have weights of their own."""
    plan = model.plan
    allowed = [i for i, one in enumerate(plan.shortcuts) if one.mixer.module is not None]
    for number in shortcuts or ():
        if number not in allowed:
            raise UserError(
                f"shortcuts contains {number!r}, but maps can be made of {allowed}; leave it out"
            )
    return allowed if shortcuts is None else list(shortcuts)


@torch.no_grad()
def answer_example(model, processor, example: Example, max_new_tokens: int = 16) -> Example:
    """Return an example that ends with an answer: its own, or the model's greedy one.

    Raises:
        UserError: The model answers with nothing.
    """
    if example.messages[-1]["role"] == "assistant":
        return example
    prompt = render_question(example, processor)
    inputs = prepare_inputs(model, processor, [prompt], [example.load_images()])
    config = make_greedy_config(model, max_new_tokens)
    ids = model.generate(**inputs, generation_config=config)
    answer = read_answers(processor, inputs, ids)[0].text
    if not answer.strip():
        raise UserError(
            f"the model answers {example.place} with nothing, so no map can say where it looks;"
            " give an answer"
        )
    reply = {"role": "assistant", "content": answer}
    return replace(example, messages=[*example.messages, reply])


class _Painter:
    """Runs a model on one answered question, with factors on what the shortcuts add."""

    def __init__(self, model, processor, example: Example, numbers: list[int], batch_size: int):
        self.model, self.processor, self.example = model, processor, example
        self.numbers = numbers
        self.batch_size = max(1, batch_size)
        self.images = example.load_images()
        encoder = example_encoder(processor)
        self.encoder = encoder
        self.item = {**encoder.encode(example), **encoder.encode_images(self.images)}
        self.states: dict[int, Tensor] | None = None

    def paint(self, kinds: Sequence[str]) -> HeatMaps:
        """Make the maps."""
        with torch.no_grad():
            parts, hidden, patches = self._trace()
            full = self._score([{}])[0]
            without = self._score([{i: torch.zeros(len(parts[i]))} for i in self.numbers])
        answer = self.example.messages[-1]["content"]
        losses = dict(zip(self.numbers, without, strict=True))
        result = HeatMaps(answer, full, losses)
        gradients = self._compute_gradients(parts) if "gradient" in kinds else {}
        for number in self.numbers:
            by_image = locate_tokens(self.model, self.processor, self.images, number, patches)
            by_kind: dict[str, Tensor] = {}
            if "size" in kinds and number != self.model.fusion.main:
                by_kind["size"] = self._compare_sizes(number, parts, hidden)
            if "gradient" in kinds:
                by_kind["gradient"] = gradients[number]
            for kind, values in by_kind.items():
                result.maps += _draw(number, kind, values.double().cpu().numpy(), by_image)
            if "occlusion" in kinds:
                result.maps += self._occlude(number, parts[number], by_image, full)
        return result

    # ---- one pass

    def _prepare(self, copies: int) -> tuple[dict, Tensor]:
        """The model's inputs for some copies of the question, and the answer's labels [B, L]."""
        batch = self.encoder.build_batch([self.item] * copies)
        batch = dict(BatchFeature(batch).to(self.model.device))
        labels = batch.pop("labels")
        if not self.model.is_upgrade:
            pixels = batch.pop("pixel_values")
            grids = batch.get("image_grids")
            if self.states is None:
                per_copy = len(pixels) // copies
                own = None if grids is None else list_grids(grids[: len(grids) // copies])
                with torch.no_grad():
                    self.states = self.model.encode(pixels[:per_copy], own)
            states = {tap: x.repeat(copies, *[1] * (x.dim() - 1)) for tap, x in self.states.items()}
            batch["vision_states"] = states
        return batch, labels

    def _run(self, factors: dict[int, Tensor], copies: int = 1) -> Tensor:
        """The log-probability of the answer, [copies].

        Args:
            factors: Shortcut to what its features are multiplied by, [copies * tokens].
            copies: How often the question is in the batch.
        """
        inputs, labels = self._prepare(copies)
        if self.model.plan.needs_prompt:  # labels say where it ends
            inputs["labels"] = labels
        with scaled(self.model.fusion, factors):
            logits = self.model(**inputs, use_cache=False).logits
        special = torch.tensor(self.processor.tokenizer.all_special_ids, device=labels.device)
        targets = labels[:, 1:]
        is_answer = targets >= 0
        is_word = is_answer & ~torch.isin(targets, special)
        chosen = is_word if is_word.any() else is_answer
        log_probabilities = logits[:, -labels.shape[1] : -1].float().log_softmax(-1)
        values = log_probabilities.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (values * chosen).sum(-1)

    def _score(self, conditions: Sequence[dict[int, Tensor]]) -> list[float]:
        """The log-probability of the answer under conditions, each a factor for every token."""
        scores = []
        for start in range(0, len(conditions), self.batch_size):
            batch = conditions[start : start + self.batch_size]
            factors = {}
            for number in {number for condition in batch for number in condition}:
                length = next(len(one[number]) for one in batch if number in one)
                rows = [one.get(number, torch.ones(length)) for one in batch]
                factors[number] = torch.cat(rows).to(self.model.device)
            with torch.no_grad():
                scores += self._run(factors, len(batch)).tolist()
        return scores

    # ---- the three kinds

    def _trace(self) -> tuple[dict[int, Tensor], dict[int, Tensor], list | None]:
        """What each shortcut adds [tokens, H], hidden states [tokens, H] by layer, and patches."""
        parts: dict[int, Tensor] = {}
        hidden: dict[int, Tensor] = {}

        def observe(layer: int, states: Tensor, added: Tensor) -> None:
            hidden[layer] = states

        fusion = self.model.fusion
        with observe_injections(observe), scaled(fusion, {}, parts):
            if not self.model.is_upgrade:
                self._run({})
                patches = None
            else:
                with watch_table(self.model) as table:
                    self._run({})
                text = self.item["text"]
                patches = locate_patches(self.model, self.processor, self.images, table, text)
        if not self.model.is_upgrade:
            hidden[0] = parts[fusion.main]
        return parts, hidden, patches

    def _compare_sizes(self, number: int, parts: dict, hidden: dict) -> Tensor:
        """The norm of what a shortcut adds at each token, over that of the hidden state there."""
        layer = self.model.plan.shortcuts[number].layer
        states = hidden[layer]
        added = parts[number]
        if self._is_even:
            tokens = added.unflatten(0, (len(self.images), -1))
            added, _ = apply_context_gate(self.model.fusion, layer, tokens, states)
        norms = states.float().norm(dim=-1).clamp(min=SMALLEST)
        return added.float().norm(dim=-1) / norms

    @property
    def _is_even(self) -> bool:
        """Whether context gates may pool: every image has equally many tokens."""
        return not self.model.is_upgrade and not self.processor.is_any_size

    def _compute_gradients(self, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        """Gradient times input by shortcut, [tokens], by factors of one on tokens' features."""
        factors = {}
        for number in self.numbers:
            ones = torch.ones(len(parts[number]), device=self.model.device)
            factors[number] = ones.requires_grad_()
        with torch.enable_grad():
            score = self._run(factors).sum()
            gradients = torch.autograd.grad(score, list(factors.values()), allow_unused=True)
        found = {}
        for number, gradient in zip(self.numbers, gradients, strict=True):
            found[number] = torch.zeros(len(parts[number])) if gradient is None else gradient
        return found

    def _occlude(
        self, number: int, part: Tensor, by_image: list[Boxes], full: float
    ) -> list[HeatMap]:
        """How far the answer's log-probability falls without a shortcut at each place."""
        places = []  # (image, group of its tokens)
        groups = []
        for image, boxes in enumerate(by_image):
            shape = _choose_places(choose_shape(boxes))
            own = group_tokens(boxes, shape)
            groups.append(own)
            places += [(image, group) for group in np.unique(own[own >= 0])]
        falls = np.zeros(len(places))
        if part.any():
            all_groups = np.concatenate(groups)
            owners = np.repeat(np.arange(len(groups)), [len(own) for own in groups])
            conditions = []
            for image, group in places:
                is_off = torch.from_numpy((owners == image) & (all_groups == group))
                conditions.append({number: 1.0 - is_off.float()})
            falls = full - np.array(self._score(conditions))
        maps = []
        for image, boxes in enumerate(by_image):
            values = np.full(len(boxes), np.nan)
            for (owner, group), fall in zip(places, falls, strict=True):
                if owner == image:
                    values[groups[image] == group] = fall
            maps += _draw(number, "occlusion", values, [boxes], first_image=image)
        return maps


def _choose_places(shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of places that are occluded one by one: cells, or squares of them."""
    side = 1
    rows, columns = shape
    while -(-rows // side) * -(-columns // side) > MOST_PLACES:
        side += 1
    return -(-rows // side), -(-columns // side)


def _draw(
    number: int, kind: str, values: np.ndarray, by_image: list[Boxes], first_image: int = 0
) -> list[HeatMap]:
    """Maps of a shortcut from its tokens' values, those of all images one after the other."""
    lengths = [len(boxes) for boxes in by_image]
    split = np.split(values, np.cumsum(lengths)[:-1])
    maps = []
    for image, (own, boxes) in enumerate(zip(split, by_image, strict=True), start=first_image):
        shown = np.isfinite(own)
        drawn = spread_over_image(own[shown], boxes[shown], choose_shape(boxes))
        maps.append(HeatMap(number, kind, image, drawn))
    return maps


@contextmanager
def scaled(
    fusion, factors: dict[int, Tensor], parts: dict[int, Tensor] | None = None
) -> Iterator[None]:
    """Inside the block, shortcuts' features are multiplied by a factor at every image token.

    Args:
        fusion: The model's fusion.
        factors: Shortcut's number to the factors, [image tokens].
        parts: Takes what each shortcut adds, [image tokens, H], before factors and context gates.
    """

    def scale(module, args, kwargs, output):
        if not factors and parts is None:
            return output
        fused = [_flatten(values) for values in output]
        wanted = factors if parts is None else range(len(module.plan.shortcuts))
        for number in wanted:
            if module.plan.shortcuts[number].mixer.module is None:
                continue
            position = module.get_position(number)
            with only(module, number), torch.no_grad():
                part = _flatten(module.forward(*args, **kwargs)[position])
            if parts is not None:
                parts[number] = part
            if number in factors:
                change = factors[number].to(part) - 1
                fused[position] = fused[position] + change.unsqueeze(-1) * part
        return tuple(_restore(flat, like) for flat, like in zip(fused, output, strict=True))

    handle = fusion.register_forward_hook(scale, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _flatten(values: Tensor | list[Tensor]) -> Tensor:
    """A layer's features as [image tokens, H]."""
    return torch.cat(list(values)) if isinstance(values, list) else values.flatten(0, -2)


def _restore(flat: Tensor, like: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(like, list):
        return list(flat.split([len(values) for values in like]))
    return flat.view_as(like)
