"""What each shortcut of a trained model contributes: answers without it, with it alone, and norms.

A shortcut that is switched off adds zeros. Nothing is trained again: a loss of accuracy tells what
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
from ..data.feature_cache import keys_of, views_of
from ..prompts import prepare_inputs
from ..schema import UserError
from .evaluator import EvaluationResult, evaluate, render_question
from .statistics import Answers, estimate_difference

MEMORY_LIMIT = (
    2 * 2**30
)  # bytes of cached features; above it, images are encoded for every condition
RESAMPLES = 2000  # bootstrap draws of an interval


class FeaturesInMemory:
    """Vision features of all images of some examples, float16, read as a `VisionFeatureCache` is.

    Attributes:
        features: By the image's key (`keys_of`), then tap: features of its views, [V, N, D].
    """

    def __init__(self, model, processor, examples: Sequence[Example], batch_size: int = 32):
        self.features: dict[str, dict[int, Tensor]] = {}
        images = {}
        for example in examples:
            for number, key in enumerate(keys_of(example)):
                images[key] = (example, number)
        keys = list(images)
        for start in range(0, len(keys), batch_size):
            batch_keys = keys[start : start + batch_size]
            batch = [images[key] for key in batch_keys]
            opened = [example.pictures()[number] for example, number in batch]
            encoded = model.encode(processor.pixels(opened).to(model.device))
            encoded = {tap: x.to("cpu", torch.float16) for tap, x in encoded.items()}
            for row, key in enumerate(batch_keys):
                self.features[key] = {tap: x[row] for tap, x in encoded.items()}

    @property
    def is_finite(self) -> bool:
        """Whether half precision can hold every feature; above 65,504 it cannot."""
        tensors = [x for taps in self.features.values() for x in taps.values()]
        return all(bool(x.isfinite().all()) for x in tensors)

    def read(self, example: Example, views: dict[int, int]) -> dict[int, Tensor]:
        """The features of an example's P images by tap, [P, V, N, D]."""
        return self.stack(keys_of(example), views)

    def stack(self, keys: Sequence[str], views: dict[int, int]) -> dict[int, Tensor]:
        """The features of some images by tap, [len(keys), V, N, D]."""
        images = [self.features[key] for key in keys]
        return {tap: torch.stack([image[tap] for image in images]) for tap in views}


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
        for key in keys_of(example):
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
            features = [z[::2] for z in module.forward(*args)]
        with _only(module, number):
            features[position] = features[position] + module.forward(*args)[position][1::2]
        return tuple(features)

    handle = fusion.register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()


def _only(fusion, number: int):
    """A block inside which all shortcuts but one are switched off."""
    others = [i for i in range(len(fusion.plan.shortcuts)) if i != number]
    return fusion.switched_off(*others)


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
    use of its presence. It is left out for a single image, for an upgraded model, and where the
    features do not fit in memory.

    Args:
        model: A SparseCut model, joined or upgraded. Its modes are restored.
        processor: Its processor.
        examples: Questions, at least one of them with an image.
        batch_size: Questions that are answered at once.
        max_new_tokens: The longest answer, in tokens.
        progress: Called with the number of answers, and of all answers to give.

    Returns:
        `plan`, `depths` (encoder, language model), `input` (number of the shortcut that is the
        input), `num_questions`, `shortcuts` (see `measure_additions`), and `conditions` by name.
        Each has `accuracy`, `groups`, `levels`, `mean_over_levels`, `off`, the numbers of answers
        `lost` and `gained` against "all", and the paired `difference` from "all" with its 95 %
        interval over images.

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
    if not model.fusion.gated:
        raise UserError(
            "this model's plan has no shortcut besides the one into the input, so there is nothing"
            " to compare; give a model with more shortcuts"
        )
    if not examples:
        raise UserError("there is nothing to ask: the list of examples is empty; give at least one")
    if not any(example.images for example in examples):
        raise UserError(
            "none of the questions has an image, so shortcuts add nothing; give questions about"
            " images"
        )


def _explain(model, processor, examples: Sequence[Example], progress, settings: dict) -> dict:
    features = _compute_features(model, processor, examples)
    with_shuffled = features is not None and len(features.features) > 1
    conditions = list_conditions(model.fusion, with_shuffled=with_shuffled)
    results: dict[str, EvaluationResult] = {}
    for number, condition in enumerate(conditions, start=1):
        results[condition.name] = _evaluate_condition(
            model, processor, examples, condition, features, settings
        )
        progress(number * len(examples), len(conditions) * len(examples))
    reference = results["all"]
    facts = {c.name: _compare(c, results[c.name], reference) for c in conditions}
    return {
        "plan": model.plan.to_dict(),
        "depths": [model.config.vision_depth, model.config.language_depth],
        "input": model.fusion.main,
        "num_questions": len(examples),
        "conditions": facts,
        "shortcuts": measure_additions(
            model, processor, examples, features, settings["batch_size"]
        ),
    }


def _compute_features(model, processor, examples: Sequence[Example]) -> FeaturesInMemory | None:
    """Vision features of all images, or None where they cannot be cached in memory."""
    if not model.supports_feature_cache:
        return None
    keys = set()
    for example in examples:
        keys.update(keys_of(example))
    num_views = sum(views_of(model.plan, model.config.vision_depth).values())
    num_bytes = 2 * len(keys) * num_views * model.config.num_patches * model.config.grid.width
    if num_bytes > MEMORY_LIMIT:
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
    row = {key: result[key] for key in ("accuracy", "groups", "levels", "mean_over_levels")}
    row["off"] = list(condition.off)
    pairs = zip(reference.records, result.records, strict=True)
    changes = [(before["correct"], now["correct"]) for before, now in pairs]
    row["lost"] = changes.count((True, False))
    row["gained"] = changes.count((False, True))
    if condition.name != "all":
        answers = Answers.from_records({0: result.records})
        all_answers = Answers.from_records({0: reference.records})
        difference = estimate_difference(answers, all_answers, resamples=RESAMPLES)
        row["difference"] = difference.to_dict()
    if condition.shuffled is not None:
        row["shuffled"] = [condition.shuffled]
    return row


@torch.inference_mode()
def measure_additions(
    model, processor, examples: Sequence[Example], features=None, batch_size: int = 64
) -> list[dict]:
    """Measure what every shortcut adds at the image tokens.

    Args:
        model: A SparseCut model, joined or upgraded.
        processor: Its processor.
        examples: Conversations; of those with the same images the last is read.
        features: Vision features of the images (`FeaturesInMemory`); None encodes them.
        batch_size: Examples that are read at once.

    Returns:
        For every shortcut its number, taps, layer, mix and grain, and means over image tokens:
        `gate` (the value of a scalar gate, the mean size of a vector's values, or the value of a
        context gate); `norm` of what is added after the gate; `hidden_norm` of the hidden state
        that it is added to; their `ratio`, and the `cosine` between them. Shortcuts into layer 0
        are added to the input's features, which are themselves added to nothing (None).
    """
    fusion = model.fusion
    shortcuts = model.plan.shortcuts
    by_images = {tuple(keys_of(example)): example for example in examples if example.images}
    distinct = list(by_images.values())
    trace = _trace_upgraded if model.is_upgrade else _trace_joined
    sums = torch.zeros(len(shortcuts), 5, dtype=torch.float64)
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]
        all_added, all_hidden = trace(model, processor, batch, features)
        for i, shortcut in enumerate(shortcuts):
            added, gate = _apply_context_gate(fusion, shortcut.layer, all_added[i], all_hidden[i])
            sums[i] += _sum_over_tokens(added.double(), all_hidden[i].double(), gate)
    facts = []
    for i, shortcut in enumerate(shortcuts):
        facts.append(_describe_addition(fusion, i, shortcut, sums[i].tolist()))
    return facts


def _sum_over_tokens(added: Tensor, hidden: Tensor, gate: Tensor) -> Tensor:
    """Sums over image tokens, [5]: norms of what is added and of the hidden state, their cosine,
    the context gate, and one.
    """
    cosine = torch.nn.functional.cosine_similarity(added, hidden, dim=-1)
    count = torch.tensor(float(len(added)))
    sums = [
        added.norm(dim=-1).sum(),
        hidden.norm(dim=-1).sum(),
        cosine.sum(),
        gate.sum().double(),
        count,
    ]
    return torch.stack([value.cpu() for value in sums])


def _trace_joined(model, processor, batch: Sequence[Example], features) -> tuple[list, list]:
    """Run a joined model once: what each shortcut adds, and what it is added to.

    Returns two lists by shortcut: features [P, N', H], before context gates, and hidden states
    [P * N', H].
    """
    fusion = model.fusion
    views = views_of(model.plan, model.config.vision_depth)
    if features is None:
        images = []
        for example in batch:
            images += example.pictures()
        encoded = model.encode(processor.pixels(images).to(model.device))
    else:
        cached = [features.read(example, views) for example in batch]
        encoded = {}
        for tap in views:
            encoded[tap] = torch.cat([taps[tap] for taps in cached]).to(model.device)
    added = []
    for i in range(len(model.plan.shortcuts)):
        with _only(fusion, i):
            added.append(fusion(encoded)[fusion.get_position(i)])
    prompts = [render_question(example, processor) for example in batch]
    inputs = prepare_inputs(model, processor, prompts, None)
    outputs = model(**inputs, vision_states=encoded, output_hidden_states=True, use_cache=False)
    is_image = inputs["input_ids"] == model.config.image_token_id
    hidden = []
    for shortcut in model.plan.shortcuts:
        if shortcut.layer == 0:
            hidden.append(added[fusion.main].flatten(0, 1))
        else:
            hidden.append(outputs.hidden_states[shortcut.layer][is_image])
    return added, hidden


def _trace_upgraded(model, processor, batch: Sequence[Example], features) -> tuple[list, list]:
    """The same of an upgraded model, [tokens, 1, H] and [tokens, H].

    Its base runs the encoder, so the fusion is watched during the base's own forward.
    """
    fusion = model.fusion
    shortcuts = model.plan.shortcuts
    original_forward = fusion.forward
    added: dict[int, Tensor] = {}

    def watched_forward(*, grains):
        for i in fusion.gated:
            with _only(fusion, i):
                added[i] = original_forward(grains=grains)[fusion.get_position(i)]
        return original_forward(grains=grains)

    prompts = [render_question(example, processor) for example in batch]
    images = [example.pictures() for example in batch]
    inputs = prepare_inputs(model, processor, prompts, images)
    fusion.forward = watched_forward
    try:
        outputs = model(**inputs, output_hidden_states=True, use_cache=False)
    finally:
        del fusion.forward
    is_image = inputs["input_ids"] == model.config.image_token_id
    # The input's features are those of the base itself.
    added[fusion.main] = outputs.hidden_states[0][is_image].unsqueeze(1)
    hidden = [outputs.hidden_states[shortcut.layer][is_image] for shortcut in shortcuts]
    return [added[i] for i in range(len(shortcuts))], hidden


def _apply_context_gate(
    fusion, layer: int, features: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """What is added after a layer's context gate, if it has one, [T, H], and the gate's values, [T].

    A context gate depends on its own shortcut's features only; those of the others are zeros here.
    """
    num_tokens = features.shape[1]
    features = features.flatten(0, 1)
    if str(layer) not in fusion.context:
        return features, torch.ones(len(features), device=features.device)
    added = fusion.context[str(layer)](hidden, features, num_tokens)
    return added, added.norm(dim=-1) / features.norm(dim=-1).clamp(min=1e-12)


def _describe_addition(fusion, number: int, shortcut, sums: list[float]) -> dict:
    norm, hidden_norm, cosine, context_gate, count = sums
    gate = 1.0
    if number in fusion.gated:
        value = fusion.gates[fusion.gated.index(number)]
        gate = (value.abs().mean() if value.dim() else value).item()
    facts = {
        "number": number,
        "taps": list(shortcut.taps),
        "layer": shortcut.layer,
        "mix": shortcut.mix,
        "grain": shortcut.grain,
        "gate": gate * context_gate / count,
        "norm": norm / count,
        "hidden_norm": None,
        "ratio": None,
        "cosine": None,
    }
    if number != fusion.main:
        facts["hidden_norm"] = hidden_norm / count
        facts["ratio"] = norm / max(hidden_norm, 1e-12)
        facts["cosine"] = cosine / count
    return facts
