"""What each shortcut of a trained model contributes: answers without it, with it alone, and norms.

A shortcut that is switched off adds zeros. Nothing is trained again: a loss of accuracy shows what
this model relies on, not what another model could do without. Of two shortcuts that carry the same
information, each can be switched off without loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.examples import Example
from ..data.feature_cache import get_image_keys, get_tap_views
from ..schema import UserError
from ..waits import show_step
from .evaluator import EvaluationResult, evaluate
from .shortcut_norms import measure_additions, only
from .statistics import estimate_difference
from .variant_answers import Answers

MEMORY_LIMIT = (
    2 * 2**30
)  # bytes of cached features; above it, images are encoded for every condition
RESAMPLES = 2000  # bootstrap draws of an interval


class FeaturesInMemory:
    """Vision features of all images of some examples, float16, read as a `VisionFeatureCache` is.

    Attributes:
        features: By the image's key (`get_image_keys`), then tap: features of its views, [V, N, D].
    """

    def __init__(self, model, processor, examples: Sequence[Example], batch_size: int = 32):
        self.features: dict[str, dict[int, Tensor]] = {}
        images = {}
        for example in examples:
            for number, key in enumerate(get_image_keys(example)):
                images[key] = (example, number)
        keys = list(images)
        with show_step("encoding images", len(keys)) as step:
            for start in range(0, len(keys), batch_size):
                batch_keys = keys[start : start + batch_size]
                batch = [images[key] for key in batch_keys]
                self._encode(model, processor, batch_keys, batch)
                step.advance(len(batch))

    def _encode(self, model, processor, keys: list[str], images: list[tuple]) -> None:
        """Add the features of some images, each given as (example, number in the example)."""
        opened = [example.load_image(number) for example, number in images]
        pixels = processor.pixels(opened).to(model.device)
        encoded = {}
        for tap, features in model.encode(pixels).items():
            encoded[tap] = features.to("cpu", torch.float16)
        for row, key in enumerate(keys):
            self.features[key] = {tap: features[row] for tap, features in encoded.items()}

    @property
    def is_finite(self) -> bool:
        """Whether half precision can hold every feature; above 65,504 it cannot."""
        tensors = [x for taps in self.features.values() for x in taps.values()]
        return all(bool(x.isfinite().all()) for x in tensors)

    def read(self, example: Example, views: dict[int, int]) -> dict[int, Tensor]:
        """The features of an example's P images by tap, [P, V, N, D]."""
        return self.stack(get_image_keys(example), views)

    def stack(self, keys: Sequence[str], views: dict[int, int]) -> dict[int, Tensor]:
        """The features of some images by tap, [len(keys), V, N, D]."""
        images = [self.features[key] for key in keys]
        stacked = {}
        for tap in views:
            stacked[tap] = torch.stack([image[tap] for image in images])
        return stacked


class PairedFeatures:
    """The same features, each image followed by another one, for `shuffled`.

    The other image is the next one in order of first use; the last image is followed by the first.

    Attributes:
        features: The features of every image.
        partners: By an image's key, the key of the image that follows it.
    """

    def __init__(self, features: FeaturesInMemory):
        keys = list(features.features)
        self.features = features
        self.partners = dict(zip(keys, keys[1:] + keys[:1], strict=True))

    def read(self, example: Example, views: dict[int, int]) -> dict[int, Tensor]:
        """Features by tap, [2 * P, V, N, D]: an image, its partner, the next image, ..."""
        keys = []
        for key in get_image_keys(example):
            keys += [key, self.partners[key]]
        return self.features.stack(keys, views)


@contextmanager
def shuffled(fusion, number: int) -> Iterator[None]:
    """Inside the block, one shortcut reads the partner of every image.

    The fusion then takes `PairedFeatures` and returns features of the images alone.

    Args:
        fusion: The model's fusion.
        number: The shortcut's place in the plan.
    """
    position = fusion.get_position(number)

    def mix(module, args, output):
        with module.switched_off(number):
            outputs = module.forward(*args)
        with only(module, number):
            alone = module.forward(*args)[position]
        mixed = [z[::2] for z in outputs]
        mixed[position] = mixed[position] + alone[1::2]
        return tuple(mixed)

    handle = fusion.register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Condition:
    """One way to use the shortcuts of a model.

    Attributes:
        name: "all", "without 2", "only 2", "input only" or "shuffled 2".
        off: Numbers of the shortcuts that are switched off.
        shuffled: Number of the shortcut that reads another image, if any does.
    """

    name: str
    off: tuple[int, ...] = ()
    shuffled: int | None = None


def list_conditions(fusion, *, with_shuffled: bool = False) -> list[Condition]:
    """All conditions of a plan, the complete one first.

    The input, which is the first shortcut into layer 0, always stays on.
    """
    others = fusion.gated
    conditions = [Condition("all")]
    conditions += [Condition(f"without {i}", off=(i,)) for i in others]
    if len(others) > 1:
        for i in others:
            off = tuple(j for j in others if j != i)
            conditions.append(Condition(f"only {i}", off))
    conditions.append(Condition("input only", off=tuple(others)))
    if with_shuffled:
        conditions += [Condition(f"shuffled {i}", shuffled=i) for i in others]
    return conditions


@torch.inference_mode()
def explain(
    model,
    processor,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Evaluate a model under every condition of its shortcuts, and measure what each one adds.

    "shuffled i" gives shortcut i another image, which separates the use of its content from the
    use of its presence. It is left out for a single image, for an upgraded model, for a plan that
    reads prompts, and where the features do not fit in memory.

    Args:
        model: A SparseCut model, joined or upgraded. Its modes are restored.
        processor: Its processor.
        examples: Questions, at least one of them with an image.
        batch_size: Questions that are answered at once.
        max_new_tokens: The longest answer, in tokens.
        progress: Called with the number of answers, and of all answers to give.

    Returns:
        `model` (its name), `plan`, `depths` (encoder, language model), `input` (number of the
        shortcut that is the input), `num_questions`, `num_images` (different ones, or sets of
        them), `shortcuts` (see `measure_additions`), and `conditions` by name. Each has `accuracy`,
        `groups`, `levels`, `mean_over_levels`, `off`, the numbers of answers `lost` and `gained`
        against "all", and the paired `difference` from "all" with its 95 % interval over images,
        also by group (`group_differences`).

    Raises:
        UserError: There is no example, none has an image, or the plan has no shortcut besides the
            input.
    """
    _check_can_explain(model, examples)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        return _explain(model, processor, examples, progress, settings)
    finally:
        for module, training in modes:
            module.training = training


def _check_can_explain(model, examples: Sequence[Example]) -> None:
    """Raise UserError where there is nothing to compare."""
    if not model.fusion.gated:
        raise UserError(
            "this model's plan has no shortcut besides the one into the input, so there is nothing"
            " to compare; give a model with more shortcuts"
        )
    if not examples:
        raise UserError(
            "there is nothing to evaluate: the list of examples is empty; give at least one"
        )
    if not any(example.images for example in examples):
        raise UserError(
            "none of the questions has an image, so shortcuts add nothing; give questions about"
            " images"
        )


def _explain(model, processor, examples: Sequence[Example], progress, settings: dict) -> dict:
    """What `explain` returns, of a model in evaluation mode."""
    features = _compute_features(model, processor, examples)
    with_shuffled = features is not None and len(features.features) > 1
    conditions = list_conditions(model.fusion, with_shuffled=with_shuffled)
    results: dict[str, EvaluationResult] = {}
    with show_step("conditions of shortcuts", len(conditions)) as step:
        for number, condition in enumerate(step.count(conditions), start=1):
            results[condition.name] = _evaluate_condition(
                model, processor, examples, condition, features, settings
            )
            progress(number * len(examples), len(conditions) * len(examples))
    reference = results["all"]
    facts = {c.name: _compare(c, results[c.name], reference) for c in conditions}
    return {
        "model": model.config._name_or_path,
        "plan": model.plan.to_dict(),
        "depths": [model.config.vision_depth, model.config.language_depth],
        "input": model.fusion.main,
        "num_questions": len(examples),
        "num_images": _count_images(reference.records),
        "conditions": facts,
        "shortcuts": measure_additions(
            model, processor, examples, features, settings["batch_size"]
        ),
    }


def _compute_features(model, processor, examples: Sequence[Example]) -> FeaturesInMemory | None:
    """Vision features of all images, or None where they cannot be cached in memory."""
    is_any_size = getattr(processor, "is_any_size", False)
    if not model.supports_feature_cache or is_any_size or model.plan.needs_prompt:
        return None
    keys = set()
    for example in examples:
        keys.update(get_image_keys(example))
    config = model.config
    num_views = sum(get_tap_views(model.plan, config.vision_depth).values())
    num_values = len(keys) * num_views * config.num_patches * config.grid.width
    if 2 * num_values > MEMORY_LIMIT:
        return None
    features = FeaturesInMemory(model, processor, examples)
    return features if features.is_finite else None


def _evaluate_condition(
    model,
    processor,
    examples: Sequence[Example],
    condition: Condition,
    features: FeaturesInMemory | None,
    settings: dict,
) -> EvaluationResult:
    if condition.shuffled is None:
        with model.fusion.switched_off(*condition.off):
            return evaluate(model, processor, examples, feature_cache=features, **settings)
    pairs = PairedFeatures(features)
    with shuffled(model.fusion, condition.shuffled):
        return evaluate(model, processor, examples, feature_cache=pairs, **settings)


def _compare(condition: Condition, result: EvaluationResult, reference: EvaluationResult) -> dict:
    """The facts of one condition, against the result of all shortcuts."""
    facts = {key: result[key] for key in ("accuracy", "groups", "levels", "mean_over_levels")}
    facts["off"] = list(condition.off)
    facts |= _count_changes(result.records, reference.records)
    if condition.name != "all":
        answers = Answers.from_records({0: result.records})
        all_answers = Answers.from_records({0: reference.records})
        difference = estimate_difference(answers, all_answers, resamples=RESAMPLES)
        facts["difference"] = difference.to_dict()
        facts["group_differences"] = _compare_groups(result.records, reference.records)
    if condition.shuffled is not None:
        facts["shuffled"] = [condition.shuffled]
    return facts


def _compare_groups(records: list[dict], reference: list[dict]) -> dict[str, dict]:
    """The paired difference of every group, and `num_images`; all intervals hold at 95 %."""
    groups = {record["group"] for record in records} - {None}
    if not groups:
        return {}
    by_group = []
    for rows in (records, reference):
        regrouped = [{**row, "level": row["group"]} for row in rows]
        by_group.append(Answers.from_records({0: regrouped}))
    difference = estimate_difference(*by_group, comparisons=len(groups), resamples=RESAMPLES)
    found = difference.to_dict()["levels"]
    for group, estimate in found.items():
        estimate["num_images"] = _count_images([one for one in records if one["group"] == group])
    return found


def _count_images(records: list[dict]) -> int:
    """The different images, or sets of images, that records ask about."""
    return len({tuple(record["images"]) for record in records if record["images"]})


def _count_changes(records: list[dict], reference: list[dict]) -> dict[str, int]:
    """How many right answers were lost, and how many wrong ones became right."""
    lost = 0
    gained = 0
    for now, before in zip(records, reference, strict=True):
        lost += before["correct"] and not now["correct"]
        gained += now["correct"] and not before["correct"]
    return {"lost": lost, "gained": gained}
