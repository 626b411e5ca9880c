"""What each shortcut of a trained model is good for: answers without it, answers with it alone, and
how much it adds.

A shortcut that is switched off adds zeros; nothing is trained again, so a drop says what the model leans on now, not what another
model could do without. Two shortcuts that carry the same can each be dropped at no loss.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..data.examples import IMAGE, Example
from ..data.feature_cache import keys_of, views_of
from ..prompts import prepare_inputs, render_prompt
from ..schema import UserError
from .evaluator import evaluate
from .statistics import Answers, difference

MEMORY_LIMIT = (
    2 * 2**30
)  # bytes of encoder states kept for the evaluations; above it, pictures are encoded every time


class RememberedStates:
    """Encoder states of pictures in memory, float16, read like `states.VisionStates`."""

    def __init__(self, model, processor, examples: Sequence[Example], batch_size: int = 32):
        self.kept: dict[str, dict[int, torch.Tensor]] = {}
        todo = {key: (e, i) for e in examples for i, key in enumerate(keys_of(e))}
        items = list(todo.items())
        for start in range(0, len(items), batch_size):
            chunk = items[start : start + batch_size]
            pixels = processor.pixels([e.pictures()[i] for _, (e, i) in chunk]).to(model.device)
            states = {tap: x.to("cpu", torch.float16) for tap, x in model.encode(pixels).items()}
            for row, (key, _) in enumerate(chunk):
                self.kept[key] = {tap: x[row] for tap, x in states.items()}

    @property
    def is_finite(self) -> bool:
        """Whether half precision held every state; above 65,504 it does not."""
        return all(
            bool(x.isfinite().all()) for states in self.kept.values() for x in states.values()
        )

    def read(self, example: Example, views: dict[int, int]) -> dict[int, torch.Tensor]:
        """tap -> [pictures of the example, V, N, D]."""
        kept = [self.kept[key] for key in keys_of(example)]
        return {tap: torch.stack([one[tap] for one in kept]) for tap in views}


class PairedStates:
    """The same states, after every picture those of the next one in order of first use, the last
    one's being the first's.
    """

    def __init__(self, states: RememberedStates):
        names = list(states.kept)
        self.states, self.next = states, dict(zip(names, names[1:] + names[:1], strict=True))

    def read(self, example: Example, views: dict[int, int]) -> dict[int, torch.Tensor]:
        """tap -> [2 * pictures of the example, V, N, D]: picture, other picture, picture, ..."""
        kept = [
            self.states.kept[name] for key in keys_of(example) for name in (key, self.next[key])
        ]
        return {tap: torch.stack([one[tap] for one in kept]) for tap in views}


@contextmanager
def shuffled(fusion, i: int) -> Iterator[None]:
    """Inside the block the fusion takes `PairedStates`, and shortcut i reads the other picture of
    every pair.
    """
    rest = [j for j in range(len(fusion.plan.shortcuts)) if j != i]

    def mix(module, args, output):
        with module.switched_off(i):
            found = {layer: z[::2] for layer, z in module.forward(*args).items()}
        with module.switched_off(*rest):
            layer = module.plan.shortcuts[i].layer
            found[layer] = found[layer] + module.forward(*args)[layer][1::2]
        return found

    handle = fusion.register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _evaluating(model) -> Iterator[None]:
    """Evaluation mode inside the block, and every module's own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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
    """Answer all questions with every shortcut, without each, and with each alone beside the input;
    measure what each adds.

    The input is the first shortcut into layer 0, which stays on where others are tried alone.
    Returns "conditions" (name -> accuracy, groups, levels, which shortcuts are off or shuffled, and
    the paired "difference" from all of them, in shares, with a 95 % interval over pictures),
    "shortcuts" (taps, layer, mix, norms, ratio, cosine, gate) and "plan". "shuffled i" feeds shortcut i with another picture,
    which tells use of its content from use of its presence; it is left out where there is one
    picture, or states are not kept in memory. Raises ValueError where there are no examples, none
    has a picture, or the plan has no shortcut besides the input.
    """
    others = model.fusion.gated
    if not others:
        raise UserError(
            "this model's plan has no shortcut besides the one into the input, so there is nothing"
            " to tell apart; give a model with more"
        )
    if not examples:
        raise UserError("there is nothing to ask: the list of examples is empty; give at least one")
    if not any(example.images for example in examples):
        raise UserError(
            "none of the questions has a picture, so shortcuts add nothing; give questions about"
            " pictures"
        )
    with _evaluating(model):
        found = _explained(
            model,
            processor,
            examples,
            progress,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
    return found


def _explained(
    model, processor, examples: Sequence[Example], progress: Callable, **settings
) -> dict:
    states, runs = _remember(model, processor, examples), conditions_of(model.fusion)
    others = model.fusion.gated if states is not None and len(states.kept) > 1 else []
    swaps = {f"shuffled {i}": i for i in others}
    names, records, results = [*runs, *swaps], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            where = Path(folder) / str(number)
            if name in swaps:
                with shuffled(model.fusion, swaps[name]):
                    found = evaluate(
                        model,
                        processor,
                        examples,
                        out=where,
                        states=PairedStates(states),
                        **settings,
                    )
            else:
                with model.fusion.switched_off(*runs[name]):
                    found = evaluate(
                        model, processor, examples, out=where, states=states, **settings
                    )
            lines = (where / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
            results[name], records[name] = found, [json.loads(line) for line in lines]
            progress((number + 1) * len(examples), len(names) * len(examples))
    conditions = {name: _condition(name, runs.get(name, ()), results, records) for name in names}
    for name, i in swaps.items():
        conditions[name]["shuffled"] = [i]
    return {
        "plan": model.plan.to_dict(),
        "depths": [model.config.vision_depth, model.config.language_depth],
        "input": model.fusion.main,
        "num_questions": len(examples),
        "conditions": conditions,
        "shortcuts": measure_additions(model, processor, examples, states, settings["batch_size"]),
    }


def conditions_of(fusion) -> dict[str, tuple[int, ...]]:
    """Name -> shortcuts that are off: nothing, each one, all but one (the input stays), all but the
    input.
    """
    others = fusion.gated
    drops = {f"without {i}": (i,) for i in others}
    alone = (
        {f"only {i}": tuple(j for j in others if j != i) for i in others} if len(others) > 1 else {}
    )
    return {"all": (), **drops, **alone, "input only": tuple(others)}


def _remember(model, processor, examples: Sequence[Example]) -> RememberedStates | None:
    if not model.supports_feature_cache:
        return None  # its base runs its encoder in its own way
    pictures = len({key for e in examples for key in keys_of(e)})
    views = sum(views_of(model.plan, model.config.vision_depth).values())
    size = 2 * pictures * views * model.config.num_patches * model.config.grid.width
    states = RememberedStates(model, processor, examples) if size <= MEMORY_LIMIT else None
    return states if states is not None and states.is_finite else None


def _condition(name: str, off: tuple[int, ...], results: dict, records: dict) -> dict:
    result, before, now = results[name], records["all"], records[name]
    row = {key: result[key] for key in ("accuracy", "groups", "levels", "mean_over_levels")}
    row["off"] = list(off)
    pairs = [(a["correct"], b["correct"]) for a, b in zip(before, now, strict=True)]
    row["lost"], row["gained"] = pairs.count((True, False)), pairs.count((False, True))
    if name != "all":
        ours, theirs = (Answers.from_records({0: lines}) for lines in (now, before))
        row["difference"] = difference(ours, theirs, resamples=2000).to_dict()
    return row


@torch.inference_mode()
def measure_additions(
    model, processor, examples: Sequence[Example], states, batch_size: int = 64
) -> list[dict]:
    """Of every shortcut: taps, layer, mix, gate, and over the pictures' image tokens the mean norm
    of what it adds after its gate, that of the hidden state it is added to, their ratio, and the
    cosine between them. gate: the value of a scalar, the mean size of a vector's values, the mean
    over image tokens of a context gate.

    What shortcuts into layer 0 are added to is the input's own features, which themselves are added
    to nothing.
    """
    fusion, shortcuts = model.fusion, model.plan.shortcuts
    first = list({tuple(keys_of(e)): e for e in examples if e.images}.values())
    sums = torch.zeros(len(shortcuts), 5, dtype=torch.float64)
    for start in range(0, len(first), batch_size):
        chunk = first[start : start + batch_size]
        read = _riding if model.is_upgrade else _encoded
        added, hidden = read(model, processor, chunk, states)
        for i, (shortcut, z, h) in enumerate(zip(shortcuts, added, hidden, strict=True)):
            z, gate = _after_context(fusion, shortcut.layer, z.flatten(0, 1), h)
            z, h = z.double(), h.double()
            cosine = torch.nn.functional.cosine_similarity(z, h, dim=-1)
            each = (
                z.norm(dim=-1).sum(),
                h.norm(dim=-1).sum(),
                cosine.sum(),
                gate.sum().double(),
                torch.tensor(float(len(z))),
            )
            sums[i] += torch.stack([value.cpu() for value in each])
    return [_facts(fusion, i, shortcut, sums[i].tolist()) for i, shortcut in enumerate(shortcuts)]


def _encoded(model, processor, chunk: Sequence[Example], states) -> tuple[list, list]:
    """Of every shortcut: what it alone adds, [P, N', H], and the hidden states that it is added to,
    [P * N', H].
    """
    fusion, views = model.fusion, views_of(model.plan, model.config.vision_depth)
    if states is None:
        kept = model.encode(
            processor.pixels([p for e in chunk for p in e.pictures()]).to(model.device)
        )
    else:
        read = [states.read(e, views) for e in chunk]
        kept = {tap: torch.cat([one[tap] for one in read]).to(model.device) for tap in views}
    added = [_alone(fusion, i, kept) for i in range(len(model.plan.shortcuts))]
    inputs = prepare_inputs(
        model, processor, [render_prompt(processor, _asked(e, processor)) for e in chunk], None
    )
    hidden = model(
        **inputs, vision_states=kept, output_hidden_states=True, use_cache=False
    ).hidden_states
    mask = inputs["input_ids"] == model.config.image_token_id
    into = added[fusion.main].flatten(0, 1)
    return added, [hidden[s.layer][mask] if s.layer else into for s in model.plan.shortcuts]


def _riding(model, processor, chunk: Sequence[Example], states) -> tuple[list, list]:
    """The same of an upgraded model, read during its base's own forward, [tokens, 1, H]; the
    input's own are in the hidden states.
    """
    fusion, found, own = model.fusion, {}, model.fusion.forward

    def forward(*, grains):
        for i in fusion.gated:
            with fusion.switched_off(*(j for j in fusion.gated if j != i)):
                found[i] = own(grains=grains)[fusion.plan.shortcuts[i].layer]
        return own(grains=grains)

    prompts = [render_prompt(processor, _asked(e, processor)) for e in chunk]
    inputs = prepare_inputs(model, processor, prompts, [e.pictures() for e in chunk])
    fusion.forward = forward
    try:
        hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    finally:
        del fusion.forward
    mask = inputs["input_ids"] == model.config.image_token_id
    found[fusion.main] = hidden[0][mask].unsqueeze(1)
    return [found[i] for i in range(len(found))], [
        hidden[s.layer][mask] for s in model.plan.shortcuts
    ]


def _alone(fusion, i: int, kept: dict) -> torch.Tensor:
    """What shortcut i gives, [P, N', H], or [P, N', S * H] under context gates: the output of its
    layer with all others off.
    """
    layer = fusion.plan.shortcuts[i].layer
    with fusion.switched_off(*(j for j in range(len(fusion.plan.shortcuts)) if j != i)):
        return fusion(kept)[layer]


def _after_context(
    fusion, layer: int, z: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is added [P * N', H], context gate at each token); other layers' features are added as
    they are.
    """
    if str(layer) not in fusion.context:
        return z, torch.ones(len(z), device=z.device)
    added = fusion.context[str(layer)](
        hidden, z
    )  # a gate depends on its own shortcut's features; the others are zeros
    return added, added.norm(dim=-1) / z.norm(dim=-1).clamp(min=1e-12)


def _asked(example: Example, processor) -> list[dict]:
    turns = (
        example.messages[:-1] if example.messages[-1]["role"] == "assistant" else example.messages
    )
    return [{**m, "content": m["content"].replace(IMAGE, processor.image_token)} for m in turns]


def _facts(fusion, i: int, shortcut, sums: list[float]) -> dict:
    norm, hidden, cosine, context, count = sums
    value = fusion.gates[fusion.gated.index(i)] if i in fusion.gated else torch.ones(())
    gate = (value.abs().mean() if value.dim() else value).item() * context / count
    plain = {"number": i, "taps": list(shortcut.taps), "layer": shortcut.layer, "mix": shortcut.mix}
    facts = {**plain, "grain": shortcut.grain, "gate": gate, "norm": norm / count}
    if i == fusion.main:
        return {**facts, "hidden_norm": None, "ratio": None, "cosine": None}
    return {
        **facts,
        "hidden_norm": hidden / count,
        "ratio": norm / max(hidden, 1e-12),
        "cosine": cosine / count,
    }
