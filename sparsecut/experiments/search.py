"""A plan found by training: all pairs of encoder tap and decoder layer at once, then the best few
of them under a budget.

The supernet has a narrow projector and a gate for every pair, beside the coarse input; an L1 penalty on the gates makes pairs
compete. What a trained pair is worth is told by its gate: |g * dL/dg| summed over training batches, which is the first-order
estimate of what the loss would rise by without it (Molchanov et al., CVPR 2017). Pairs are then taken greedily, best first, as long
as the budget holds, and the plan they make is trained from the start like any other arm.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ..plan import Plan, Shortcut
from ..schema import UserError
from .study import Run, Study, parse_study

SUPERNET = "supernet"


def supernet_plan(vision_depth: int, language_depth: int, *, tiles: int = 2, rank: int = 8) -> Plan:
    """The coarse input and every pair of a tap (1 to the depth) and a layer, each with a projector
    of width `rank` and a gate.
    """
    pairs = [(tap, layer) for tap in range(1, vision_depth + 1) for layer in range(language_depth)]
    shortcuts = [Shortcut((tap,), layer, "channels" if tiles else "pick") for tap, layer in pairs]
    return Plan((Shortcut((-2,), 0, "pick"), *shortcuts), tiles=tiles, gate="one", rank=rank)


def search(
    study: Study,
    *,
    count: int | None = None,
    ratio: float | None = None,
    seeds: tuple[int, ...] = (0,),
    rank: int = 8,
    penalty: float = 0.01,
    workers: int = 2,
    log=print,
) -> tuple[Plan, list[dict]]:
    """Find a plan for a study's models and data, by training a supernet once per seed; its arms are
    not used.

    count: at most so many shortcuts; ratio: at most so many times the prefill operations of the
    baseline arm, counted at the study's own size; at least one of them. Writes plan.yaml and
    search.json to `output`/search and returns the plan with all pairs, best first: {"tap", "layer",
    "worth", "gate"}. Raises ValueError for a budget that leaves no shortcut.
    """
    check_budget(count, ratio)
    from ..building import depths_of
    from ..config.yaml_io import expand_path
    from .runner import run_study

    model = study.recipe["model"]
    depths = depths_of(expand_path(model["vision"]), expand_path(model["language"]))
    plan = supernet_plan(*depths, rank=rank)
    out = Path(study.output) / "search"
    nets = supernet_study(study, plan, out, seeds, penalty)
    run_study(nets, workers=workers, log=log)
    worth = [pair_importance(nets, seed) for seed in seeds]
    together = [sum(values) / len(values) for values in zip(*(w for w, _ in worth), strict=True)]
    gates = [sum(values) / len(values) for values in zip(*(g for _, g in worth), strict=True)]
    pairs = [
        {"tap": s.taps[0], "layer": s.layer, "worth": w, "gate": g}
        for s, w, g in zip(plan.shortcuts[1:], together, gates, strict=True)
    ]
    pairs.sort(key=lambda pair: -pair["worth"])
    fits = _fits(study, depths, ratio) if ratio is not None else lambda candidate: True
    found = choose(pairs, plan, count, fits)
    settings = {
        "count": count,
        "ratio": ratio,
        "seeds": list(seeds),
        "rank": rank,
        "penalty": penalty,
    }
    (out / "search.json").write_text(
        json.dumps({**settings, "plan": found.to_dict(), "pairs": pairs}, indent=1)
    )
    import yaml

    (out / "plan.yaml").write_text(
        yaml.safe_dump(found.to_dict(), sort_keys=False, default_flow_style=None)
    )
    return found, pairs


def check_budget(count: int | None, ratio: float | None) -> None:
    """Raise ValueError unless a budget is given that leaves room for a shortcut."""
    if count is None and ratio is None:
        raise UserError(
            "a search needs a budget: a number of shortcuts (count), a cost (ratio), or both"
        )
    if count is not None and count < 1:
        raise UserError(f"count is {count}, but a plan of a search has at least 1 shortcut")
    if ratio is not None and ratio <= 1:
        raise UserError(
            f"ratio is {ratio}, but shortcuts come on top of the baseline, so it must be above 1,"
            " e.g. 1.1"
        )


def supernet_study(
    study: Study, plan: Plan, out: Path, seeds: tuple[int, ...], penalty: float
) -> Study:
    """The study's data and main budget with one arm, the supernet; every stage has the penalty."""
    plain = study.to_dict()
    stages = [{**stage, "gate_penalty": penalty} for stage in study.recipe["stages"]]
    plain |= {
        "title": f"Search for {study.title}",
        "recipe": {**study.recipe, "stages": stages},
        "arms": {SUPERNET: plan.to_dict()},
        "baseline": SUPERNET,
        "families": {},
        "seeds": list(seeds),
        "budgets": {study.main: {"change": list(study.budgets[study.main].change)}},
        "output": str(out),
    }
    return parse_study(plain)


def pair_importance(study: Study, seed: int, batches: int = 16) -> tuple[list[float], list[float]]:
    """Of a trained supernet: |g * dL/dg| of every gate, summed over batches of the last stage's
    data, and the gates.
    """
    import torch

    from ..building import load
    from ..data.dataset import Collator, TrainingData
    from ..data.examples import read_source
    from ..data.feature_cache import VisionFeatureCache, views_of

    run = Run(study.main, SUPERNET, seed)
    recipe = study.recipe_of(run)
    model, processor = load(run.folder(Path(study.output)) / "final")
    stage = recipe.stages[-1]
    examples = [e for source in stage.data for e in read_source(source, [])]
    size = stage.args.get("per_device_train_batch_size", 8)
    kept = {
        "states": VisionFeatureCache(recipe.states),
        "views": views_of(model.plan, model.config.vision_depth),
    }
    data = TrainingData(
        examples[: size * batches],
        processor,
        template=stage.template,
        max_length=stage.max_length,
        **(kept if recipe.states else {}),
    )
    collate, total = Collator(processor), torch.zeros_like(model.fusion.gates)
    model.requires_grad_(False)
    gates = model.fusion.gates.requires_grad_(True)
    for start in range(0, len(data), size):
        batch = collate([data[i] for i in range(start, min(start + size, len(data)))])
        (grad,) = torch.autograd.grad(model(**batch).loss, gates)
        total += (gates.detach() * grad).abs()
    return total.tolist(), gates.tolist()


def choose(pairs: list[dict], plan: Plan, count: int | None, fits) -> Plan:
    """The coarse input and pairs, best first, as long as the plan they make is within the budget;
    projectors start at zero.
    """
    free = replace(plan, gate="zero_projector", rank=None)
    mix, chosen = plan.shortcuts[-1].mix, []
    for pair in pairs:
        if count is not None and len(chosen) == count:
            break
        together = sorted(
            [*chosen, Shortcut((pair["tap"],), pair["layer"], mix)], key=lambda s: (s.layer, s.taps)
        )
        if fits(replace(free, shortcuts=(plan.shortcuts[0], *together))):
            chosen = together
    if not chosen:
        raise UserError("no pair is within the budget; raise ratio, for example to 1.5")
    return replace(free, shortcuts=(plan.shortcuts[0], *chosen))


def _fits(study: Study, depths: tuple[int, int], ratio: float):
    """Whether a plan's prefill is within `ratio` of the baseline's, both counted at the study's own
    size.
    """
    from ..methods import make_plan
    from ..profiling.counting import backbone_config, count

    configs = [
        backbone_config(study.recipe["model"][part], part) for part in ("vision", "language")
    ]
    base = count(*configs, make_plan(study.arms[study.baseline], *depths)).prefill_total_flops
    return lambda plan: count(*configs, plan).prefill_total_flops <= ratio * base
