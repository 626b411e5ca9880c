"""A finished study made up on the spot: real plans, drawn answers of known accuracy, counts from a
rule of thumb.
"""

import json
from pathlib import Path

import numpy as np
import yaml

from sparsecut.methods import make_plan

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


def made_up_study(
    out: Path,
    arms: list[str],
    *,
    seeds=(0, 1),
    pictures: int = 40,
    budgets=("main", "long"),
    accuracies=None,
) -> Path:
    """Write what a study of these arms of SPECS leaves in `out`. accuracies: arm -> share right at
    the main budget, else drawn.
    """
    rng = np.random.default_rng(0)
    out.mkdir(parents=True, exist_ok=True)
    study = {
        "title": "Ways to feed pictures to a language model",
        "note": "Made-up answers: this page shows how a report looks.",
        "recipe": {},
        "arms": {name: SPECS[name] for name in arms},
        "output": str(out),
        "baseline": arms[0],
        "seeds": list(seeds),
        "budgets": {b: [f"stages.1.args.max_steps={400 * (i + 1)}"] for i, b in enumerate(budgets)},
        "main": budgets[0],
    }
    (out / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    plans = {name: make_plan(SPECS[name], *DEPTHS) for name in arms}
    (out / "costs.json").write_text(
        json.dumps({name: _costs(name, plan) for name, plan in plans.items()})
    )
    ease = rng.normal(0, 0.08, pictures)
    chance = {name: (accuracies or {}).get(name, 0.5 + 0.3 * rng.random()) for name in arms}
    tilt = {name: rng.normal(0, 0.08, 3) for name in arms}
    for b, budget in enumerate(budgets):
        for name in arms:
            for seed in seeds:
                right = chance[name] + 0.06 * b + rng.normal(0, 0.01) + ease
                shift = tilt[name] - tilt[name].mean() if accuracies is None else np.zeros(3)
                _run(
                    out / "runs" / budget / name / str(seed),
                    name,
                    plans[name],
                    right,
                    shift,
                    400 * (b + 1),
                    rng,
                    seed,
                )
    return out


def _run(folder: Path, name: str, plan, right, shift, steps: int, rng, seed: int) -> None:
    (folder / "eval").mkdir(parents=True)
    (folder / "tune").mkdir()
    rows, groups = [], {}
    for p, chance in enumerate(right):
        for (level, kinds), more in zip(LEVELS.items(), shift, strict=True):
            for kind in kinds:
                correct = bool(rng.random() < chance + more)
                groups.setdefault(kind, []).append(correct)
                ask = {
                    "id": f"test/{p}/{kind}",
                    "prompt": f"what {kind}",
                    "images": [f"test/{p}.png"],
                    "group": kind,
                }
                rows.append(
                    {**ask, "prediction": "a", "reference": "b", "correct": correct, "level": level}
                )
    (folder / "eval" / "predictions.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    result = {
        "groups": {k: {"accuracy": sum(v) / len(v)} for k, v in groups.items()},
        "seconds": 6.0,
    }
    (folder / "eval" / "result.json").write_text(json.dumps(result))
    stages = {"stages": [{"name": "align"}, {"name": "tune"}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(stages))
    level = 1 - right.mean()
    lines = [
        {
            "step": s,
            "loss": level + 1.5 * float(np.exp(-s / 90)) + rng.normal(0, 0.02),
            "seconds": s / 4,
        }
        for s in range(10, steps + 1, 10)
    ]
    (folder / "tune" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {
        "arm": name,
        "seed": seed,
        "plan": plan.to_dict(),
        "depths": list(DEPTHS),
        "parameters": {
            "vision": 938304,
            "fusion": 18624 * len(plan.shortcuts),
            "language": 725952,
            "head": 5568,
        },
        "image_tokens": plan.image_tokens(16),
        "views": plan.num_views,
        "train_seconds": steps / 4,
        "eval_seconds": 6.0,
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def _costs(name: str, plan) -> dict:
    costs = {"plan": plan.to_dict()}
    for size, views, tokens in (("here", 4e7, 2e6), ("large", 3.8e11, 1.4e10)):
        patches = 16 if size == "here" else 576
        fine = (
            len(plan.fine_taps(DEPTHS[0]))
            and max(plan.fine_taps(DEPTHS[0])) / DEPTHS[0] * plan.tiles**2
        )
        parts = {
            "encoder_coarse_flops": views,
            "encoder_fine_flops": views * fine,
            "fusion_flops": tokens * patches * 0.01 * len(plan.shortcuts) * plan.num_grains,
            "language_prefill_flops": tokens * (plan.image_tokens(patches) + 64),
        }
        costs[size] = {
            **{key: round(value) for key, value in parts.items()},
            "prefill_total_flops": round(sum(parts.values())),
            "language_per_new_token_flops": round(tokens),
            "num_image_tokens": plan.image_tokens(patches),
            "num_fusion_parameters": 18624 * len(plan.shortcuts),
            "kv_cache_bytes": 1000 * (plan.image_tokens(patches) + 64),
        }
    return costs
