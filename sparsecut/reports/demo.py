"""What the demo says and shows of its finished arms: a table and some answers on screen, and the
page.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..data.jsonl import read_json_lines
from ..experiments.study import Run, Study
from ..plan import Plan
from .evaluations import Arm, Sample, write_report

LEVELS = {
    "high": "high: shape, place",
    "mid": "mid: texture, count",
    "low": "low: shade, lines, digit",
}
INTRODUCTION = """<p>Four ways to feed the same frozen encoder's features to the same small language model, trained on the same
pictures, questions, order and number of steps, with the same number of image tokens in the prompt. Between plain fusion and
SparseCut stand two controls: one has the fine views but no other layer, the other has the same layers and views but adds them all to
the input. What the controls reach is not owed to the shortcuts.</p>
<p class="note">{pictures} training pictures of the built-in picture world, seed {seed}, one run per arm, {minutes:.1f}
minutes on this machine.
The encoder was deliberately trained so that its top speaks of shape and colour only; how much several layers help depends on
that. <b>One seed is one seed</b>: this page shows that the software works, it is no evidence about the method.</p>"""


def answer_aloud(study: Study, arms: dict[str, tuple[str, str]], log, number: int = 6) -> None:
    """Print the table of scores and some questions with every arm's answer."""
    results = {
        title: json.loads((_folder(study, arm) / "eval" / "result.json").read_text())
        for arm, (title, _) in arms.items()
    }
    width = max(map(len, results))
    log(
        f"\n{'accuracy in per cent':{width}}   average   "
        + "   ".join(f"{level:>5}" for level in LEVELS)
    )
    for name, result in results.items():
        cells = "   ".join(f"{100 * result['levels'][level]['accuracy']:5.1f}" for level in LEVELS)
        log(f"{name:{width}}   {100 * result['mean_over_levels']:7.1f}   {cells}")
    log("one seed is one seed: other seeds move every figure by some points\n")
    for sample in choose_samples(study, arms, number):
        answers = ", ".join(f"{arm}: {answer}" for arm, answer in sample.answers.items())
        log(f"{sample.picture.name}: {sample.question}? ({sample.reference})\n    {answers}")


def write_page(study: Study, arms: dict[str, tuple[str, str]], minutes: float) -> Path:
    """Write report.html from what the arms left in the study's folder."""
    brought = [_arm(study, arm, title, meaning) for arm, (title, meaning) in arms.items()]
    introduction = INTRODUCTION.format(
        pictures=f"{study.pictures.train:,}", seed=study.seeds[0], minutes=minutes
    )
    depths = _facts(study, next(iter(arms)))["depths"]
    page = Path(study.output) / "report.html"
    write_report(
        page, study.title, introduction, brought, choose_samples(study, arms, 8), tuple(depths)
    )
    return page


def choose_samples(study: Study, arms: dict[str, tuple[str, str]], number: int) -> list[Sample]:
    """Questions spread evenly over the file, kinds in turn, each with every arm's answer: not
    chosen by who is right.
    """
    rows = {
        title: read_json_lines(_folder(study, arm) / "eval" / "predictions.jsonl")
        for arm, (title, _) in arms.items()
    }
    first = next(iter(rows.values()))
    kinds = sorted({row["group"] for row in first})
    chosen = []
    for i in range(number):
        kind, start = kinds[i % len(kinds)], i * len(first) // number
        chosen.append(
            next(j for j in [*range(start, len(first)), *range(start)] if first[j]["group"] == kind)
        )
    return [
        Sample(
            picture=Path(study.output) / "data" / first[j]["images"][0],
            question=first[j]["prompt"].rpartition(">")[2].strip(),
            reference=first[j]["reference"],
            answers={name: lines[j]["prediction"] for name, lines in rows.items()},
        )
        for j in chosen
    ]


def _arm(study: Study, arm: str, title: str, meaning: str) -> Arm:
    facts, folder = _facts(study, arm), _folder(study, arm)
    result = json.loads((folder / "eval" / "result.json").read_text())
    rows, parameters = result["levels"], facts["parameters"]
    return Arm(
        name=title,
        meaning=meaning,
        plan=Plan.from_dict(facts["plan"]),
        scores={
            words: (rows[level]["accuracy"], *rows[level]["interval"], rows[level]["num_examples"])
            for level, words in LEVELS.items()
        },
        average=result["mean_over_levels"],
        losses=[
            (line["step"], line["loss"])
            for line in read_json_lines(folder / study.recipe["stages"][-1]["name"] / "log.jsonl")
        ],
        facts={
            "image tokens per picture": str(facts["image_tokens"]),
            "encoder passes per picture": str(facts["views"]),
            "fusion parameters": f"{parameters['fusion']:,}",
            "language model parameters": f"{parameters['language']:,}",
            "training seconds": f"{facts['train_seconds']:.0f}",
            "answering seconds": f"{facts['eval_seconds']:.0f}",
        },
    )


def _folder(study: Study, arm: str) -> Path:
    return Run(study.main, arm, study.seeds[0]).folder(Path(study.output))


def _facts(study: Study, arm: str) -> dict:
    return json.loads((_folder(study, arm) / "facts.json").read_text())
