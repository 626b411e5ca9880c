"""Makes `sparsecut/shapes/final`, the model that ships with the package, from a finished run.

    sparsecut study shapes rates=null --variant sparsecut --seed 1
    python benchmarks/ship_model.py runs/study/shapes/runs/short/sparsecut/1

Weights are rounded to half precision, which halves the files. The configuration still says float32,
so that every machine computes in single precision.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

import sparsecut
from sparsecut.building import save
from sparsecut.config.yaml_io import read_yaml_file
from sparsecut.shipped_model import SHIPPED_FOLDER

COMMAND = "sparsecut study shapes rates=null --variant sparsecut --seed {seed}"
CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: image-text-to-text
---

# The model that ships with SparseCut

`sparsecut chat`, `sparsecut serve --ui` and `sparsecut.load("shapes")` use it. It knows drawn shapes
and the 57 words about them, and nothing else. It shows that the software works; it is no evidence
about the method (docs/older-results.md).

| | |
|---|---|
| made of | the two backbones in `sparsecut/shapes/weights`, the default plan `sparsecut` |
| trained by | `{command}` |
| data | 6,000 drawn images, seed {data_seed}; the example image is not one of them |
| steps | {steps} |
| seed | {seed} |
| versions | torch {torch}, transformers {transformers} |
| files | weights in half precision, rounded after training; computed in single precision |
| licence | Apache-2.0, like the project |

Right answers to {num_examples:,} questions about {split} images, before rounding, in per cent:
{average:.1f} as the mean of the levels; by kind of question {kinds}. Over the five seeds of
[the study](../../../docs/older-results.md) the mean is 83.3.

To make it again: `{command}`, then `python benchmarks/ship_model.py RUN`.
"""


def main(run: Path, folder: Path = SHIPPED_FOLDER) -> None:
    """Write the shipped model from a run of a study, which has `final` and `eval`."""
    model, processor = sparsecut.load(run / "final")
    for part in (model.config, model.config.vision_config, model.config.text_config):
        part._name_or_path = "shapes"
    save(model, processor, folder, code=False)
    weights = folder / "model.safetensors"
    halves = {name: values.half() for name, values in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    (folder / "README.md").write_text(write_card(run), encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"wrote {folder}: {size / 2**20:.2f} MiB")


def write_card(run: Path) -> str:
    """The card of the run's model: how it was trained, and what it reaches."""
    result = json.loads((run / "eval" / "result.json").read_text())
    facts = json.loads((run / "facts.json").read_text())
    study = read_yaml_file(run.parents[3] / "study.yaml")
    stages = study["recipe"]["stages"]
    groups = result["groups"].items()
    return CARD.format(
        command=COMMAND.format(seed=facts["seed"]),
        data_seed=study["pictures"]["seed"],
        split=study["pictures"]["split"],
        steps=" + ".join(f"{s['args']['max_steps']} ({s['name']})" for s in stages),
        seed=facts["seed"],
        num_examples=result["num_examples"],
        average=100 * result["mean_over_levels"],
        kinds=", ".join(f"{name} {100 * scores['accuracy']:.0f}" for name, scores in groups),
        **{name: result["versions"][name] for name in ("torch", "transformers")},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
