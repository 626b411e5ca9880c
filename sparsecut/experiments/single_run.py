"""One run of a study: trained, evaluated, and noted down."""

from __future__ import annotations

import json
import time
from pathlib import Path

from ..data.jsonl import read_json_lines
from ..schema import write_text_file
from .rate_choice import find_rate
from .study import Study
from .study_parts import DIVERGED, Run


def run_to_end(study: Study, run: Run) -> None:
    """Train and evaluate one run; a dev run may find out that its rate is too high."""
    from ..training.trainer import LossNotFinite

    try:
        train_and_evaluate(study, run)
    except LossNotFinite as error:
        if run.rate is None:
            raise
        write_text_file(run.get_folder(study.output) / DIVERGED, f"{error}\n")


def train_and_evaluate(study: Study, run: Run) -> None:
    """Train and evaluate one run, from the start or from its last whole stage."""
    import torch

    from ..evaluation.evaluator import evaluate_recipe, evaluation_examples
    from ..profiling.timing import PeakMemory
    from ..training.stages import open_feature_cache, train

    start = time.perf_counter()
    chosen = None if run.rate is not None else find_rate(study, run.variant)
    recipe = study.get_recipe(run, chosen)
    folder = run.get_folder(study.output)
    peak = PeakMemory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model, processor = train(recipe, resume=True)
    features = open_feature_cache(recipe, model, processor, evaluation_examples(recipe))
    result = evaluate_recipe(recipe, model, processor, resume=True, feature_cache=features)

    train_seconds = 0.0
    for stage in recipe.stages:
        train_seconds += read_json_lines(folder / stage.name / "log.jsonl")[-1]["seconds"]

    facts = {
        "arm": run.variant,
        "budget": run.budget,
        "seed": run.seed,
        "rate": _get_rate(recipe),
        "plan": model.plan.to_dict(),
        "depths": [model.config.vision_depth, model.config.language_depth],
        "parameters": model.count_parameters(),
        "image_tokens": processor.num_image_tokens,
        "views": processor.num_views,
        "train_seconds": train_seconds,
        "eval_seconds": result["seconds"],
        "peak_bytes": peak.read(),
        "seconds": round(time.perf_counter() - start, 3),
    }
    _remove_stage_models(recipe, folder, keeps_last=run.rate is None)
    write_text_file(folder / "facts.json", json.dumps(facts, indent=1))  # last: the run is finished


def _get_rate(recipe) -> float | None:
    """The learning rate of fusion in the last stage; None where none trains it."""
    for stage in reversed(recipe.stages):
        if "fusion" in stage.train:
            return stage.lr.get("fusion", stage.args.get("learning_rate"))
    return None


def _remove_stage_models(recipe, folder: Path, *, keeps_last: bool) -> None:
    """Remove weights that nobody needs any more, which would be most of a study's size."""
    names = [stage.name for stage in recipe.stages]
    for name in names[:-1] if keeps_last else [*names, "final"]:
        for weights in (folder / name).glob("*.safetensors"):
            weights.unlink()
