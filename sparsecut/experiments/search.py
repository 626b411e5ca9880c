"""A plan found by training: all pairs of encoder tap and decoder layer at once, then the best few.

The supernet has a narrow projector and a gate for every pair, beside the coarse input. An L1
penalty on the gates makes pairs compete. The importance of a trained pair is |g * dL/dg| of its
gate, summed over training batches. It estimates, to first order, how much the loss would rise
without the pair (Molchanov et al., CVPR 2017). Pairs are then taken greedily, best first, as long
as the budget holds. The plan they make is trained from the start like any other variant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml

from ..config.folder_lock import lock_folder
from ..plan import Plan, Shortcut
from ..schema import UserError, read_json_file, write_text_file
from .study import Run, Study, parse_study

SUPERNET = "supernet"
NUM_BATCHES = 16  # over which the importance is summed


def make_supernet_plan(
    vision_depth: int, language_depth: int, *, tiles: int = 2, rank: int = 8
) -> Plan:
    """Return a plan with the coarse input and every pair of a tap and a layer.

    Args:
        vision_depth: Blocks of the encoder; taps are 1 to this.
        language_depth: Layers of the language model.
        tiles: Fine views per side.
        rank: Inner width of each pair's projector.
    """
    mix = "channels" if tiles else "pick"
    shortcuts = [Shortcut((-2,), 0, "pick")]
    for tap in range(1, vision_depth + 1):
        for layer in range(language_depth):
            shortcuts.append(Shortcut((tap,), layer, mix))

    return Plan(tuple(shortcuts), tiles=tiles, gate="one", rank=rank)


def search_plan(
    study: Study,
    *,
    count: int | None = None,
    ratio: float | None = None,
    seeds: tuple[int, ...] = (0,),
    rank: int = 8,
    penalty: float = 0.01,
    workers: int = 2,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> tuple[Plan, list[dict]]:
    """Find a plan for a study's models and data, and write it to `output`/search.

    Args:
        study: Its recipe, images and main budget are used, not its variants.
        count: At most so many shortcuts. At least one of `count` and `ratio` is needed.
        ratio: At most so many times the baseline's prefill FLOPs, counted at the study's own size.
        seeds: A supernet is trained for each; importances are averaged.
        rank: Inner width of each pair's projector.
        penalty: Weight of the gates' sizes in the loss.
        workers: Processes on this machine.
        overwrite: Replace the plan of a search with another budget.
        log: Takes lines about the progress.

    Returns:
        The plan, and all pairs, best first: {"tap", "layer", "worth" (the importance), "gate"}.
        plan.yaml and search.json hold them too.

    Raises:
        UserError: There is no budget, it leaves no shortcut, or the folder holds another search.
    """
    check_budget(count, ratio)
    from ..building import read_depths
    from ..config.yaml_io import expand_path
    from .runner import run_study

    model = study.recipe["model"]
    depths = read_depths(expand_path(model["vision"]), expand_path(model["language"]))
    plan = make_supernet_plan(*depths, rank=rank)
    out = Path(study.output) / "search"
    supernets = make_supernet_study(study, plan, out, seeds, penalty)
    budget = {"count": count, "ratio": ratio, "seeds": list(seeds), "rank": rank}
    budget["penalty"] = penalty
    _check_earlier(out / "search.json", budget, overwrite)
    with lock_folder(out):
        run_study(supernets, workers=workers, log=log)
        pairs = _rank_pairs(plan, [measure_importance(supernets, seed) for seed in seeds])
        chosen = choose_pairs(pairs, plan, count, _make_cost_check(study, depths, ratio))
        record = {
            **budget,
            "plan": chosen.to_dict(),
            "pairs": pairs,
        }
        write_text_file(out / "search.json", json.dumps(record, indent=1))
        text = yaml.safe_dump(chosen.to_dict(), sort_keys=False, default_flow_style=None)
        write_text_file(out / "plan.yaml", text)
    return chosen, pairs


def _check_earlier(file: Path, budget: dict, overwrite: bool) -> None:
    """Raise UserError where the plan of a search with another budget would be replaced."""
    if overwrite or not file.is_file():
        return
    earlier = read_json_file(file)
    differing = [f"{k} {earlier.get(k)}" for k, v in budget.items() if earlier.get(k) != v]
    if differing:
        raise UserError(
            f"{file.parent} holds the plan of a search with {', '.join(differing)}; give another"
            " output=..., or add --overwrite (overwrite=True in Python) to replace it"
        )


def check_budget(count: int | None, ratio: float | None) -> None:
    """Raise UserError unless a budget is given that leaves room for a shortcut."""
    if count is None and ratio is None:
        raise UserError(
            "a search needs a budget: a number of shortcuts (count), a cost (ratio), or both"
        )

    if count is not None and count < 1:
        raise UserError(f"count is {count}, but a plan of a search has at least 1 shortcut")
    if ratio is not None and not 1 < ratio < math.inf:
        raise UserError(
            f"ratio is {ratio}, but shortcuts come on top of the baseline, so it must be above 1,"
            " e.g. 1.1"
        )


def make_supernet_study(
    study: Study, plan: Plan, out: Path, seeds: tuple[int, ...], penalty: float
) -> Study:
    """Return the study's data and main budget with one variant, the supernet, and the penalty."""
    stages = [{**stage, "gate_penalty": penalty} for stage in study.recipe["stages"]]
    changes = {
        "title": f"Search for {study.title}",
        "recipe": {**study.recipe, "stages": stages},
        "arms": {SUPERNET: plan.to_dict()},
        "baseline": SUPERNET,
        "families": {},
        "rates": None,
        "text_only": False,
        "seeds": list(seeds),
        "budgets": {study.main: {"change": list(study.budgets[study.main].change)}},
        "output": str(out),
    }
    return parse_study({**study.to_dict(), **changes})


def measure_importance(study: Study, seed: int) -> tuple[list[float], list[float]]:
    """Measure every gate of a trained supernet on batches of the last stage's data.

    Returns:
        The importance |g * dL/dg| of each gate, and the gates.
    """
    import torch

    from ..building import load
    from ..data.collator import Collator

    run = Run(study.main, SUPERNET, seed)
    stage = study.get_recipe(run).stages[-1]
    model, processor = load(run.get_folder(study.output) / "final")
    batch_size = stage.args.get("per_device_train_batch_size", 8)
    data = _read_training_data(study, run, model, processor, NUM_BATCHES * batch_size)
    collate = Collator(data.encoder)

    model.requires_grad_(False)
    gates = model.fusion.gates.requires_grad_(True)
    total = torch.zeros_like(gates)

    for start in range(0, len(data), batch_size):
        end = min(start + batch_size, len(data))
        rows = [data[i] for i in range(start, end)]
        loss = model(**collate(rows)).loss
        (gradient,) = torch.autograd.grad(loss, gates)
        total += (gates.detach() * gradient).abs()

    return total.tolist(), gates.tolist()


def _read_training_data(study: Study, run: Run, model, processor, number: int):
    """The first examples of the last stage, with cached features where the study keeps them."""
    from ..data.dataset import TrainingData
    from ..data.encoding import example_encoder
    from ..data.examples import read_source
    from ..data.feature_cache import VisionFeatureCache, get_tap_views
    from ..data.length_limits import Limits

    recipe = study.get_recipe(run)
    stage = recipe.stages[-1]

    examples = []
    for source in stage.data:
        examples += read_source(source, [])

    encoder = example_encoder(processor, stage.template, Limits(max_length=stage.max_length))
    return TrainingData(
        examples[:number],
        encoder,
        feature_cache=VisionFeatureCache(recipe.feature_cache) if recipe.feature_cache else None,
        tap_views=get_tap_views(model.plan, model.config.vision_depth),
    )


def _rank_pairs(plan: Plan, measured: list[tuple[list[float], list[float]]]) -> list[dict]:
    """The supernet's pairs with importance and gate, mean over seeds, best first."""
    pairs = []
    for i, shortcut in enumerate(plan.shortcuts[1:]):
        importance = [scores[i] for scores, _ in measured]
        gates = [values[i] for _, values in measured]
        pairs.append(
            {
                "tap": shortcut.taps[0],
                "layer": shortcut.layer,
                "worth": sum(importance) / len(measured),
                "gate": sum(gates) / len(measured),
            }
        )

    return sorted(pairs, key=lambda pair: -pair["worth"])


def choose_pairs(
    pairs: list[dict], plan: Plan, count: int | None, fits: Callable[[Plan], bool]
) -> Plan:
    """Return the plan of the coarse input and the best pairs within the budget.

    Args:
        pairs: {"tap", "layer"}, best first. One that does not fit is skipped.
        plan: The supernet's plan.
        count: At most so many pairs, or None.
        fits: Whether a plan is within the budget.

    Returns:
        A plan whose projectors start at zero.

    Raises:
        UserError: No pair is within the budget.
    """
    coarse, *_, last = plan.shortcuts
    unrestricted = replace(plan, gate="zero_projector", rank=None)

    chosen: list[Shortcut] = []
    for pair in pairs:
        if count is not None and len(chosen) == count:
            break
        shortcut = Shortcut((pair["tap"],), pair["layer"], last.mix)
        extended = sorted([*chosen, shortcut], key=lambda item: (item.layer, item.taps))
        if fits(replace(unrestricted, shortcuts=(coarse, *extended))):
            chosen = extended

    if not chosen:
        raise UserError("no pair is within the budget; raise ratio, for example to 1.5")
    return replace(unrestricted, shortcuts=(coarse, *chosen))


def _make_cost_check(
    study: Study, depths: tuple[int, int], ratio: float | None
) -> Callable[[Plan], bool]:
    """Whether a plan's prefill FLOPs are within `ratio` of the baseline's, at the study's size."""
    if ratio is None:
        return lambda plan: True

    from ..methods import make_plan
    from ..profiling.counting import PlanCounter
    from ..profiling.sizes import read_backbone_config

    model = study.recipe["model"]
    vision = read_backbone_config(model["vision"], "vision")
    language = read_backbone_config(model["language"], "language")
    baseline = make_plan(study.get_fusion(study.baseline), *depths)
    counter = PlanCounter(vision, language)
    limit = ratio * counter.count(baseline).prefill_total_flops

    def fits(plan: Plan) -> bool:
        return counter.count(plan).prefill_total_flops <= limit

    return fits
