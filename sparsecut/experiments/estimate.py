"""How many runs a study has left, and how long they will take.

Times are those of finished runs of the same folder, by training steps. Where none is finished, they
are roughly what the counted FLOPs take at the speed of a matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.yaml_io import expand_path
from ..schema import read_json_file
from .rates import TEXT_ONLY
from .study import Study
from .study_parts import Run

DEV = "dev"
BACKWARD = 3  # a training step takes so many forward passes
EFFICIENCY = 0.25  # of small models, against one large matrix product
SECONDS_TO_START = 10  # a run reads data, builds a model and answers questions
MATRIX_SIZE = 512
REPEATS = 20


@dataclass
class RunGroup:
    """Runs of one kind.

    Attributes:
        name: "dev", a budget, or "text_only".
        total: All of them.
        finished: Those that are finished.
        seconds: What the others will take, on one thread; None where it is not known.
    """

    name: str
    total: int = 0
    finished: int = 0
    seconds: float | None = 0.0


@dataclass
class StudyEstimate:
    """What is left of a study.

    Attributes:
        groups: Its runs by kind.
        source: What the times come from, for people.
    """

    groups: list[RunGroup]
    source: str

    @property
    def seconds(self) -> float | None:
        """Seconds of all runs that are left, on one thread; None where they are not known."""
        parts = [group.seconds for group in self.groups]
        return None if None in parts else sum(parts)


def estimate_study(study: Study) -> StudyEstimate:
    """Count a study's runs and estimate the time of those that are left; nothing is written."""
    out = Path(study.output)
    runs = study.list_runs()
    steps = {run: _count_steps(study, run) for run in runs}
    speeds = _read_speeds(out, runs, steps)
    source = f"by {sum(run.is_finished(out) for run in runs)} finished runs"
    start = 0.0
    if not speeds:
        speed = _guess_step_seconds(study)
        speeds = {} if speed is None else {None: speed}
        start = SECONDS_TO_START
        source = "a rough guess by FLOPs; one finished run tells more"
    if not speeds:
        source = "not known before a run is finished: the models are not here"

    groups: dict[str, RunGroup] = {}
    for run in runs:
        group = groups.setdefault(name_group(run), RunGroup(name_group(run)))
        group.total += 1
        if run.is_finished(out):
            group.finished += 1
            continue
        seconds = _predict(run, steps[run], speeds, start)
        group.seconds = None if None in (seconds, group.seconds) else group.seconds + seconds
    return StudyEstimate(list(groups.values()), source)


def name_group(run: Run) -> str:
    """The kind of a run."""
    if run.rate is not None:
        return DEV
    return TEXT_ONLY if run.variant == TEXT_ONLY else run.budget


def _count_steps(study: Study, run: Run) -> int | None:
    """Training steps of a run, None where a stage counts epochs."""
    rate = None if study.rates is None else study.rates.default
    numbers = [stage.args.get("max_steps", -1) for stage in study.get_recipe(run, rate).stages]
    known = all(isinstance(number, int) and number > 0 for number in numbers)
    return sum(numbers) if known else None


def _read_speeds(out: Path, runs: Sequence[Run], steps: dict) -> dict[str | None, float]:
    """Variant to seconds a step of its finished runs, all in; under None their mean."""
    measured: dict[str | None, list[float]] = {}
    for run in runs:
        facts = run.get_folder(out) / "facts.json"
        if not facts.is_file() or steps[run] is None:
            continue
        seconds = read_json_file(facts).get("seconds")
        if seconds is not None:
            for name in (run.variant, None):
                measured.setdefault(name, []).append(seconds / steps[run])
    return {name: sum(values) / len(values) for name, values in measured.items()}


def _predict(run: Run, num_steps: int | None, speeds: dict, start: float) -> float | None:
    speed = speeds.get(run.variant, speeds.get(None))
    if speed is None or num_steps is None:
        return None
    return start + num_steps * speed


def _guess_step_seconds(study: Study) -> float | None:
    """Seconds of a step of the baseline, by its FLOPs; None where its models are not here."""
    recipe = study.get_recipe(Run(study.main, study.baseline, study.seeds[0]))
    try:
        flops = _count_prompt_flops(study, recipe)
    except (ValueError, OSError):  # also of hub names; UserError is one of the first
        return None
    args = recipe.stages[-1].args
    records = args.get("per_device_train_batch_size", 8) * args.get(
        "gradient_accumulation_steps", 1
    )
    return BACKWARD * flops * records / (EFFICIENCY * _measure_speed())


def _count_prompt_flops(study: Study, recipe) -> float:
    """FLOPs of a prompt of the baseline, without the encoder where its features are cached."""
    from ..methods import make_plan
    from ..profiling.counting import count_plan
    from ..profiling.sizes import read_backbone_config

    vision = read_backbone_config(expand_path(recipe.model.vision), "vision")
    language = read_backbone_config(expand_path(recipe.model.language), "language")
    depths = vision.num_hidden_layers, language.num_hidden_layers
    plan = make_plan(study.get_fusion(study.baseline), *depths)
    cost = count_plan(vision, language, plan, view_size=recipe.model.view_size)
    if recipe.feature_cache is None:
        return cost.prefill_total_flops
    return cost.fusion_flops + cost.language_prefill_flops


def _measure_speed() -> float:
    """FLOP a second of one thread, in a matrix product."""
    import torch

    torch.set_num_threads(1)
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE)
    matrix @ matrix
    start = time.perf_counter()
    for _ in range(REPEATS):
        matrix @ matrix
    return REPEATS * 2 * MATRIX_SIZE**3 / (time.perf_counter() - start)


def format_estimate(estimate: StudyEstimate, workers: int) -> str:
    """An estimate as lines for a terminal."""
    lines = []
    width = max(12, *(len(group.name) for group in estimate.groups))
    for group in estimate.groups:
        left = group.total - group.finished
        lines.append(
            f"{group.name:{width}} {group.total:5} runs, {group.finished:5} finished, {left:5}"
            f" to do {_format_hours(group.seconds)}".rstrip()
        )
    seconds = estimate.seconds
    total = sum(group.total for group in estimate.groups)
    shared = None if seconds is None else seconds / workers
    noun = "process" if workers == 1 else "processes"
    alone, divided = (_format_hours(each) or "unknown" for each in (seconds, shared))
    lines.append(
        f"{'all':{width}} {total:5} runs; what is left takes {alone} of one thread, {divided} in"
        f" {workers} {noun}"
    )
    lines.append(f"(times: {estimate.source})")
    return "\n".join(lines)


def _format_hours(seconds: float | None) -> str:
    """A time as people say it; empty where it is not known."""
    if seconds is None:
        return ""
    return f"{seconds / 60:,.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"
