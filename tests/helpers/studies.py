"""Studies for tests: a quick one to run, and finished ones made up on the spot.

A made-up study has real plans, drawn answers of known accuracy, and counts from a rule of thumb.
"""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from sparsecut.methods import make_plan
from sparsecut.plan import Plan
from sparsecut.profiling import counting

DEPTHS = (8, 6)
SPECS = {
    "llava": "llava",
    "hires_tokens": "hires_tokens",
    "hires_channels": "hires_channels",
    "sti": "dense_connector_sti",
    "sci": "dense_connector_sci",
    "dci": "dense_connector_dci",
    "mmfuser": "mmfuser",
    "deepstack": "deepstack",
    "qwen3_vl": "qwen3_vl",
    "granite4": "granite4",
    "lsf": "lsf_internal_direct",
    "cli": {"method": "cli", "rank": 4},
    "sparsecut": "sparsecut",
    "sparsecut_input": "sparsecut_input",
    **{
        f"sparsecut_{p}": {"method": "sparsecut", "pattern": p}
        for p in ("sparse", "dense", "top", "reversed", "reversed_dense")
    },
    "sparsecut_shared": {"method": "sparsecut", "shared": True, "norm": False, "pattern": "sparse"},
    "sparsecut_gated": {"method": "sparsecut", "gate": "zero"},
    "sparsecut_coarse": {"method": "sparsecut", "tiles": 0},
}
LEVELS = {"high": ("shape", "place"), "mid": ("texture", "count"), "low": ("shade", "lines")}

QUICK = {
    "title": "quick",
    "recipe": {
        "model": {"vision": "shapes", "language": "shapes"},
        "stages": [
            {
                "name": "tune",
                "data": {"path": "drawn"},
                "train": ["fusion"],
                "args": {
                    "max_steps": 2,
                    "per_device_train_batch_size": 4,
                    "learning_rate": 1e-3,
                    "logging_steps": 1,
                },
            }
        ],
        "evaluate": {"data": {"path": "drawn"}, "max_new_tokens": 2, "batch_size": 32},
    },
    "pictures": {"train": 16, "ask": 6, "split": "dev"},
    "arms": {
        "plain": {"method": "llava", "norm": True},
        "cut": {"method": "sparsecut", "pattern": "bottom", "fine": 0.4},
    },
    "baseline": "plain",
    "seeds": [3, 4],
    "budgets": {
        "short": [],
        "long": {"change": ["stages.0.args.max_steps=4"], "arms": ["cut"], "seeds": [4]},
    },
}


def make_study(
    out: Path,
    variants: list[str],
    *,
    seeds=(0, 1),
    num_images: int = 40,
    budgets=("main", "long"),
    accuracies: dict[str, float] | None = None,
) -> Path:
    """Write what a finished study leaves on disk.

    Args:
        out: The study's folder.
        variants: Names of `SPECS`; the first is the baseline.
        seeds: Seeds of every variant.
        num_images: Images that are evaluated.
        budgets: Names of the budgets, the main one first.
        accuracies: Variant to the fraction right under the main budget; drawn where not given.
    """
    draw = np.random.default_rng(0)
    plans = {name: make_plan(SPECS[name], *DEPTHS) for name in variants}
    _write_study_files(out, plans, list(seeds), budgets)
    difficulty = draw.normal(0, 0.08, num_images)
    for b, budget in enumerate(budgets):
        for name, plan in plans.items():
            accuracy = (accuracies or {}).get(name, 0.5 + 0.3 * draw.random())
            tilt = np.zeros(3) if accuracies else draw.normal(0, 0.08, 3)
            for seed in seeds:
                chances = accuracy + 0.06 * b + draw.normal(0, 0.01) + difficulty
                folder = out / "runs" / budget / name / str(seed)
                _write_answers(folder, chances, tilt - tilt.mean(), draw)
                _write_log(folder, 1 - chances.mean(), 400 * (b + 1), draw)
                _write_facts(folder, name, plan, 400 * (b + 1), seed)
    return out


def _write_study_files(out: Path, plans: dict, seeds: list[int], budgets) -> None:
    out.mkdir(parents=True, exist_ok=True)
    study = {
        "title": "Ways to feed images to a language model",
        "note": "Made-up answers: this page shows how a report looks.",
        "recipe": {},
        "arms": {name: SPECS[name] for name in plans},
        "output": str(out),
        "baseline": next(iter(plans)),
        "seeds": seeds,
        "budgets": {b: [f"stages.1.args.max_steps={400 * (i + 1)}"] for i, b in enumerate(budgets)},
        "main": budgets[0],
    }
    (out / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    costs = {name: make_costs(plan) for name, plan in plans.items()}
    (out / "costs.json").write_text(json.dumps(costs))


def _write_answers(folder: Path, chances, tilt, draw) -> None:
    """Write predictions.jsonl and result.json: two questions of each level about each image."""
    (folder / "eval").mkdir(parents=True)
    lines = []
    groups: dict[str, list[bool]] = {}
    for image, chance in enumerate(chances):
        for (level, kinds), more in zip(LEVELS.items(), tilt, strict=True):
            for kind in kinds:
                record = {
                    "id": f"test/{image}/{kind}",
                    "prompt": f"what {kind}",
                    "images": [f"test/{image}.png"],
                    "group": kind,
                    "prediction": "a",
                    "reference": "b",
                    "correct": bool(draw.random() < chance + more),
                    "level": level,
                }
                groups.setdefault(kind, []).append(record["correct"])
                lines.append(json.dumps(record) + "\n")
    (folder / "eval" / "predictions.jsonl").write_text("".join(lines))
    accuracies = {kind: {"accuracy": sum(right) / len(right)} for kind, right in groups.items()}
    result = {"groups": accuracies, "seconds": 6.0}
    (folder / "eval" / "result.json").write_text(json.dumps(result))


def _write_log(folder: Path, level: float, num_steps: int, draw) -> None:
    """Write the log of the last stage: a loss that falls."""
    (folder / "tune").mkdir()
    stages = {"stages": [{"name": "align"}, {"name": "tune"}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(stages))
    lines = []
    for step in range(10, num_steps + 1, 10):
        loss = level + 1.5 * float(np.exp(-step / 90)) + draw.normal(0, 0.02)
        lines.append(json.dumps({"step": step, "loss": loss, "seconds": step / 4}) + "\n")
    (folder / "tune" / "log.jsonl").write_text("".join(lines))


def _write_facts(folder: Path, name: str, plan, num_steps: int, seed: int) -> None:
    fusion = 18624 * len(plan.shortcuts)
    facts = {
        "arm": name,
        "seed": seed,
        "plan": plan.to_dict(),
        "depths": list(DEPTHS),
        "parameters": {"vision": 938304, "fusion": fusion, "language": 725952, "head": 5568},
        "image_tokens": plan.image_tokens(16),
        "views": plan.num_views,
        "train_seconds": num_steps / 4,
        "eval_seconds": 6.0,
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def make_costs(plan) -> dict:
    """What costs.json holds of a plan, by a rule of thumb."""
    here = _make_count(plan, view_flops=4e7, token_flops=2e6, num_patches=16)
    large = _make_count(plan, view_flops=3.8e11, token_flops=1.4e10, num_patches=576)
    return {"plan": plan.to_dict(), "here": here, "large": large}


def _make_count(plan, *, view_flops: float, token_flops: float, num_patches: int) -> dict:
    fine_taps = plan.fine_taps(DEPTHS[0])
    fine_fraction = max(fine_taps, default=0) / DEPTHS[0]
    num_tokens = plan.image_tokens(num_patches) + 64
    num_added = num_patches * len(plan.shortcuts) * plan.num_grains
    parts = {
        "encoder_coarse_flops": round(view_flops),
        "encoder_fine_flops": round(view_flops * fine_fraction * plan.tiles**2),
        "fusion_flops": round(0.01 * token_flops * num_added),
        "language_prefill_flops": round(token_flops * num_tokens),
    }
    return {
        **parts,
        "prefill_total_flops": sum(parts.values()),
        "language_per_new_token_flops": round(token_flops),
        "num_image_tokens": plan.image_tokens(num_patches),
        "num_fusion_parameters": 18624 * len(plan.shortcuts),
        "kv_cache_bytes": 1000 * num_tokens,
    }


@dataclass(frozen=True)
class RoughCount:
    """Stands for `counting.PlanCost`."""

    numbers: dict

    @property
    def prefill_total_flops(self) -> int:
        """FLOPs of a prompt."""
        return self.numbers["prefill_total_flops"]

    def to_dict(self) -> dict:
        """The numbers as costs.json holds them."""
        return self.numbers


@contextmanager
def rough_counts():
    """Count by a rule of thumb inside the block: a real count takes seconds for each plan."""

    def count(counter: counting.PlanCounter, plan, **settings) -> RoughCount:
        vision, language = counter.configs
        if not isinstance(plan, Plan):
            plan = make_plan(plan, vision.num_hidden_layers, language.num_hidden_layers)
        return RoughCount(make_costs(plan)["here"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting.PlanCounter, "count", count)
        yield
