"""What the demo says and shows of its finished arms: a table and some answers on screen, and the page."""

from __future__ import annotations

import json
from pathlib import Path

from .plan import Plan
from .recipe import Recipe
from .report import Arm, Sample, write_report

LEVELS = {"high": "high: shape, place", "mid": "mid: texture, count", "low": "low: shade, lines, digit"}
INTRODUCTION = """<p>Four ways to feed the same frozen encoder's features to the same small language model, trained on the same
pictures, questions, order and number of steps, with the same number of image tokens in the prompt. Between plain fusion and
SparseCut stand two controls: one has the fine views but no other layer, the other has the same layers and views but adds them all to
the input. What the controls reach is not owed to the shortcuts.</p>
<p class="note">{pictures} training pictures of the built-in picture world, seed {seed}, one run per arm, {minutes:.1f}
minutes on this machine.
The encoder was deliberately trained so that its top speaks of shape and colour only; how much several layers help depends on
that. <b>One seed is one seed</b>: this page shows that the software works, it is no evidence about the method.</p>"""


def answer_aloud(out: Path, recipes: dict[str, Recipe], say, number: int = 6) -> None:
    """Print the table of scores and some questions with every arm's answer."""
    results = {name: _read(recipe, "eval/result.json") for name, recipe in recipes.items()}
    width = max(map(len, results))
    say(f"\n{'accuracy in per cent':{width}}   average   " + "   ".join(f"{level:>5}" for level in LEVELS))
    for name, result in results.items():
        cells = "   ".join(f"{100 * result['levels'][level]['accuracy']:5.1f}" for level in LEVELS)
        say(f"{name:{width}}   {100 * result['mean_over_levels']:7.1f}   {cells}")
    say("one seed is one seed: other seeds move every figure by some points\n")
    for sample in choose_samples(out, recipes, number):
        answers = ", ".join(f"{arm}: {answer}" for arm, answer in sample.answers.items())
        say(f"{sample.picture.name}: {sample.question}? ({sample.reference})\n    {answers}")


def write_page(out: Path, recipes: dict[str, Recipe], meanings: dict[str, tuple[str, str]], minutes: float) -> Path:
    """Write out/report.html from what the arms left in their folders."""
    arms = [_arm(name, meanings[name][1], recipe) for name, recipe in recipes.items()]
    first = next(iter(recipes.values()))
    pictures = len(json.loads((out / "data" / "train.json").read_text()))
    introduction = INTRODUCTION.format(pictures=f"{pictures:,}", seed=first.seed, minutes=minutes)
    depths = _read(first, "facts.json")["depths"]
    page = out / "report.html"
    title = "SparseCut demo: four ways to feed pictures to a language model"
    write_report(page, title, introduction, arms, choose_samples(out, recipes, 8), tuple(depths))
    return page


def choose_samples(out: Path, recipes: dict[str, Recipe], number: int) -> list[Sample]:
    """Questions spread evenly over the file, kinds in turn, each with every arm's answer: not chosen by who is right."""
    rows = {name: _lines(recipe, "eval/predictions.jsonl") for name, recipe in recipes.items()}
    first = next(iter(rows.values()))
    kinds = sorted({row["group"] for row in first})
    chosen = []
    for i in range(number):
        kind, start = kinds[i % len(kinds)], i * len(first) // number
        chosen.append(next(j for j in [*range(start, len(first)), *range(start)] if first[j]["group"] == kind))
    return [
        Sample(
            picture=out / "data" / first[j]["images"][0],
            question=first[j]["prompt"].rpartition(">")[2].strip(),
            reference=first[j]["reference"],
            answers={name: lines[j]["prediction"] for name, lines in rows.items()},
        )
        for j in chosen
    ]


def _arm(name: str, meaning: str, recipe: Recipe) -> Arm:
    result, facts = _read(recipe, "eval/result.json"), _read(recipe, "facts.json")
    logs = [_lines(recipe, f"{stage.name}/log.jsonl") for stage in recipe.stages]
    parameters = facts["parameters"]
    rows = result["levels"]
    return Arm(
        name=name,
        meaning=meaning,
        plan=Plan.from_dict(facts["plan"]),
        scores={
            words: (rows[level]["accuracy"], *rows[level]["interval"], rows[level]["num_examples"])
            for level, words in LEVELS.items()
        },
        average=result["mean_over_levels"],
        losses=[(line["step"], line["loss"]) for line in logs[-1]],
        facts={
            "image tokens per picture": str(facts["image_tokens"]),
            "encoder passes per picture": str(facts["views"]),
            "fusion parameters": f"{parameters['fusion']:,}",
            "language model parameters": f"{parameters['language']:,}",
            "training seconds": f"{sum(log[-1]['seconds'] for log in logs):.0f}",
            "answering seconds": f"{result['seconds']:.0f}",
        },
    )


def _read(recipe: Recipe, name: str) -> dict:
    return json.loads((Path(recipe.output) / name).read_text())


def _lines(recipe: Recipe, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(recipe.output) / name).read_text().splitlines()]
