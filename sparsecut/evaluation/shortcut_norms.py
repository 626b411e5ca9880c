"""How much every shortcut adds: norms at the image tokens, beside the hidden states they change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..any_size import list_grids
from ..data.examples import Example
from ..data.feature_cache import get_image_keys, get_tap_views
from ..prompts import prepare_inputs
from ..waits import show_step
from .evaluator import render_question
from .question_batches import read_features


@torch.inference_mode()
def measure_additions(
    model, processor, examples: Sequence[Example], features=None, batch_size: int = 64
) -> list[dict]:
    """Measure what every shortcut adds at the image tokens.

    Args:
        model: A SparseCut model, joined or upgraded.
        processor: Its processor.
        examples: Conversations; of those with the same images the last is read.
        features: Vision features of the images (a `VisionFeatureCache` or `FeaturesInMemory`);
            None encodes them.
        batch_size: Examples that are read at once.

    Returns:
        For every shortcut its number, taps, layer, mix and grain, and means over image tokens.
        `gate` is the value of a scalar or context gate, or the mean size of a vector's values.
        `norm` is the norm of what is added, after the gate. `hidden_norm` is that of the hidden
        state it is added to. `ratio` and `cosine` compare the two. Shortcuts into layer 0 are
        added to the input's features, which are themselves added to nothing (None).
    """
    fusion = model.fusion
    shortcuts = model.plan.shortcuts
    by_images = {tuple(get_image_keys(example)): example for example in examples if example.images}
    distinct = list(by_images.values())
    trace = _trace_upgraded if model.is_upgrade else _trace_joined
    sums = torch.zeros(len(shortcuts), 5, dtype=torch.float64)
    with show_step("measuring what shortcuts add", len(distinct)) as step:
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            all_added, all_hidden = trace(model, processor, batch, features)
            for i, shortcut in enumerate(shortcuts):
                layer = shortcut.layer
                added, gate = apply_context_gate(fusion, layer, all_added[i], all_hidden[i])
                sums[i] += _sum_over_tokens(added.double(), all_hidden[i].double(), gate)
            step.advance(len(batch))
    return [_describe(fusion, i, sums[i].tolist()) for i in range(len(shortcuts))]


def only(fusion, number: int):
    """A block inside which all shortcuts of a fusion but one are switched off."""
    others = [i for i in range(len(fusion.plan.shortcuts)) if i != number]
    return fusion.switched_off(*others)


def _trace_joined(model, processor, batch: Sequence[Example], features) -> tuple[list, list]:
    """Run a joined model: what each shortcut adds, and what it is added to.

    Returns:
        Two lists by shortcut: features [P, N', H], before context gates, and hidden states
        [P * N', H]. Of images of any size, [tokens, 1, H] and [tokens, H].
    """
    fusion = model.fusion
    shortcuts = model.plan.shortcuts
    prompts = [render_question(example, processor) for example in batch]
    grids = None
    if processor.is_any_size:
        images = [example.load_images() for example in batch]
        inputs = prepare_inputs(model, processor, prompts, images)
        grids = list_grids(inputs["image_grids"])
        encoded = model.encode(inputs.pop("pixel_values"), grids)
    else:
        encoded = _encode_images(model, processor, batch, features)
        inputs = prepare_inputs(model, processor, prompts, None)
    added = []
    inputs["prompt_mask"] = inputs["attention_mask"]
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "prompt_mask")}
    further = model.read_prompts(**text, vision_states=encoded, image_grids=grids)
    for i in range(len(shortcuts)):
        with only(fusion, i):
            outputs = fusion(encoded, grids=grids, **further)[fusion.get_position(i)]
        if grids is not None:  # images of several sizes
            outputs = torch.cat(outputs).unsqueeze(1)
        added.append(outputs)
    inputs["vision_states"] = encoded
    hidden_states = _get_hidden_states(model, inputs)
    hidden_states[0] = added[fusion.main].flatten(0, 1)
    return added, [hidden_states[shortcut.layer] for shortcut in shortcuts]


def _encode_images(model, processor, batch: Sequence[Example], features) -> dict[int, Tensor]:
    """Vision features of all images by tap, [P, V, N, D]."""
    if features is not None:
        views = get_tap_views(model.plan, model.config.vision_depth)
        return read_features(features, batch, views, model.device)
    images = []
    for example in batch:
        images += example.load_images()
    return model.encode(processor.pixels(images).to(model.device))


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
            with only(fusion, i):
                outputs = original_forward(grains=grains)
            added[i] = outputs[fusion.get_position(i)]
        return original_forward(grains=grains)

    prompts = [render_question(example, processor) for example in batch]
    images = [example.load_images() for example in batch]
    inputs = prepare_inputs(model, processor, prompts, images)
    fusion.forward = watched_forward
    try:
        hidden_states = _get_hidden_states(model, inputs)
    finally:
        del fusion.forward
    # The input's features are those of the base itself.
    added[fusion.main] = hidden_states[0].unsqueeze(1)
    in_order = [added[i] for i in range(len(shortcuts))]
    return in_order, [hidden_states[shortcut.layer] for shortcut in shortcuts]


def _get_hidden_states(model, inputs) -> list[Tensor]:
    """The hidden states before every layer at the image tokens, [tokens, H]."""
    outputs = model(**inputs, output_hidden_states=True, use_cache=False)
    is_image = inputs["input_ids"] == model.config.image_token_id
    return [states[is_image] for states in outputs.hidden_states]


def apply_context_gate(
    fusion, layer: int, features: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply a layer's context gate, if it has one.

    A context gate depends on its own shortcut's features only; those of the others are zeros here.

    Returns:
        What is added, [T, H], and the gate's value at every token, [T].
    """
    num_tokens = features.shape[1]
    features = features.flatten(0, 1)
    if str(layer) not in fusion.context:
        ones = torch.ones(len(features), device=features.device)
        return features, ones
    context_gate = fusion.context[str(layer)]
    added = context_gate(hidden, features, num_tokens)
    before = features.norm(dim=-1).clamp(min=1e-12)
    return added, added.norm(dim=-1) / before


def _sum_over_tokens(added: Tensor, hidden: Tensor, gate: Tensor) -> Tensor:
    """Sums over image tokens, [5], in the order that `_describe` reads them."""
    cosine = torch.nn.functional.cosine_similarity(added, hidden, dim=-1)
    sums = [
        added.norm(dim=-1).sum(),
        hidden.norm(dim=-1).sum(),
        cosine.sum(),
        gate.sum().double(),
        torch.tensor(float(len(added))),
    ]
    return torch.stack([value.cpu() for value in sums])


def _describe(fusion, number: int, sums: list[float]) -> dict:
    """The facts of one shortcut from its sums over image tokens."""
    norm, hidden_norm, cosine, context_gate, count = sums
    shortcut = fusion.plan.shortcuts[number]
    facts = {
        "number": number,
        "taps": list(shortcut.taps),
        "layer": shortcut.layer,
        "mix": shortcut.mix,
        "grain": shortcut.grain,
        "gate": _get_gate_size(fusion, number) * context_gate / count,
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


def _get_gate_size(fusion, number: int) -> float:
    """The value of a shortcut's scalar gate, or the mean size of its vector's values."""
    if number not in fusion.gated:
        return 1.0
    gate = fusion.gates[fusion.gated.index(number)]
    is_vector = gate.dim() > 0
    return gate.abs().mean().item() if is_vector else gate.item()
