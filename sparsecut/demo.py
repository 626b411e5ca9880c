"""The demo: plain fusion, two controls and SparseCut, trained alike on the picture world, and one page about them.

The controls stand beside the claim because they explain much of it: `hires_channels` has the same fine views but no
shortcuts, `sparsecut_input` the same encoder layers but all of them added to the input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

from .recipe import Recipe, dump_recipe, load_recipe

ARMS = {
    "plain (LLaVA)": ("llava", "one coarse view, the last block but one, into the input"),
    "hi-res at the input": ("hires_channels", "control: the same block, with four fine views, into the input"),
    "same taps at the input": ("sparsecut_input", "control: SparseCut's blocks and views, all into the input"),
    "SparseCut": ("sparsecut", "several blocks, coarse and fine, each before a decoder layer of its own"),
}
ORDER = ("SparseCut", "same taps at the input", "hi-res at the input", "plain (LLaVA)")  # the longest runs first
WORKERS = 2
LEVELS = ("high", "mid", "low")
PICTURES = {"train": 6000, "test": 600}


def run(out: str | Path = "runs/demo", *, seed: int = 0, quick: bool = False, say=print) -> Path:
    """Draw pictures, train and evaluate every arm (two at a time), print some answers and write out/report.html.

    seed: draws the pictures, starts the fusion and orders the batches. quick: a small part of everything, to see that it
    runs; its figures mean nothing. Arms that are finished in `out` are kept. Returns the report's path; raises ValueError
    where `out` holds a demo of another seed or size, ChildProcessError with the end of an arm's log where one fails.
    """
    from .demo_report import answer_aloud, write_page

    out, start = Path(out), time.monotonic()
    recipes = {name: arm_recipe(out, method, seed, quick) for name, (method, _) in ARMS.items()}
    check_folder(out, recipes)
    draw_pictures(out, seed, quick, say)
    train_arms(recipes, say)
    minutes = (time.monotonic() - start) / 60
    page = write_page(out, recipes, ARMS, minutes)
    answer_aloud(out, recipes, say)
    say(f"\n{minutes:.1f} minutes in all. The report with pictures, intervals and costs: {page}")
    return page


def arm_recipe(out: Path, method: str, seed: int, quick: bool) -> Recipe:
    """One arm's recipe: the demo's, with its own fusion and output. Every arm normalises its taps, so that only fusion differs."""
    with_paths = ["stages.0.data", "stages.1.data", "evaluate.data"]
    changes = [f"{place}.images={out / 'data'}" for place in with_paths]
    for place, name in zip(with_paths, ("train_captions", "train", "test"), strict=True):
        changes.append(f"{place}.path={out / 'data' / name}.json")
    changes += [f"output={out / method}", f"seed={seed}", f"fusion={{method: {method}, norm: true}}"]
    if quick:
        changes += ["stages.0.args.max_steps=3", "stages.1.args.max_steps=4", "evaluate.data.keep=42"]
    return load_recipe(str(files("sparsecut") / "demo.yaml"), changes)


def check_folder(out: Path, recipes: dict[str, Recipe]) -> None:
    """Raise ValueError where `out` holds arms of another demo, whose results would be taken for this one's."""
    for name, recipe in recipes.items():
        before = Path(recipe.output) / "recipe.yaml"
        if before.is_file() and load_recipe(before) != recipe:
            raise ValueError(
                f"{out} holds the arm {name!r} of a demo with another seed, size or recipe ({before}); choose another folder "
                "with --out, or remove this one"
            )


def draw_pictures(out: Path, seed: int, quick: bool, say) -> None:
    """The training and test pictures of the demo, unless they are there."""
    from .world import write_split

    done = out / "data" / "drawn.json"
    sizes = {split: 64 if quick else number for split, number in PICTURES.items()}
    if done.is_file() and json.loads(done.read_text()) == {**sizes, "seed": seed}:
        return
    say(f"drawing {sizes['train']} training and {sizes['test']} test pictures ...")
    write_split(out / "data", "train", sizes["train"], 12, seed=seed)
    write_split(out / "data", "test", sizes["test"], 7, seed=seed)
    done.write_text(json.dumps({**sizes, "seed": seed}))


def train_arms(recipes: dict[str, Recipe], say) -> None:
    """Run every arm in a process of its own on one thread, `WORKERS` at a time, and show how far each is."""
    waiting, running, shown = [n for n in ORDER if not _result(recipes[n]).is_file()], {}, time.monotonic()
    for name in ORDER:
        if name not in waiting:
            say(f"{name}: already finished, kept ({_result(recipes[name])})")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        while waiting or running:
            while waiting and len(running) < WORKERS:
                name = waiting.pop(0)
                folder = Path(recipes[name].output)
                folder.mkdir(parents=True, exist_ok=True)
                dump_recipe(recipes[name], folder / "recipe.yaml")
                command = [sys.executable, "-m", "sparsecut.demo", str(folder / "recipe.yaml")]
                with (folder / "output.txt").open("w") as log:
                    running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                say(f"{name}: started")
            time.sleep(0.5)
            for name in [n for n, process in running.items() if process.poll() is not None]:
                _finish(name, running.pop(name), recipes[name], say)
            if running and time.monotonic() - shown > 15:
                shown = time.monotonic()
                say("  " + "   ".join(f"{name}: {progress_of(recipes[name])}" for name in running))
    finally:
        for process in running.values():
            process.terminate()


def _finish(name: str, process, recipe: Recipe, say) -> None:
    if process.returncode:
        tail = "\n".join((Path(recipe.output) / "output.txt").read_text().splitlines()[-12:])
        raise ChildProcessError(
            f"the arm {name!r} stopped with exit code {process.returncode}; the end of its log:\n{tail}"
        )
    result = json.loads(_result(recipe).read_text())
    levels = ", ".join(f"{level} {100 * result['levels'][level]['accuracy']:.0f} %" for level in LEVELS)
    say(f"{name}: finished, average {100 * result['mean_over_levels']:.1f} % ({levels})")


def progress_of(recipe: Recipe) -> str:
    """Where a running arm is: its stage, step and loss, from the log it writes."""
    for stage in reversed(recipe.stages):
        log = Path(recipe.output) / stage.name / "log.jsonl"
        if log.is_file() and (lines := log.read_text().splitlines()):
            last, total = json.loads(lines[-1]), stage.args["max_steps"]
            if stage is recipe.stages[-1] and last["step"] == total:
                return "answering"
            return f"{stage.name} {last['step']}/{total} loss {last['loss']:.2f}"
    return "loading"


def _result(recipe: Recipe) -> Path:
    return Path(recipe.output) / "eval" / "result.json"


def run_arm(path: str) -> None:
    """Train and evaluate one arm by its recipe; what each of the demo's processes does."""
    import torch

    from .evaluation import evaluate_recipe
    from .training import train

    torch.set_num_threads(1)
    recipe = load_recipe(path)
    model, processor = train(recipe)
    facts = {
        "parameters": {part: sum(p.numel() for p in tensors) for part, tensors in model.parts().items()},
        "image_tokens": processor.num_image_tokens,
        "views": processor.num_views,
        "depths": [model.config.vision_depth, model.config.language_depth],
        "plan": model.plan.to_dict(),
    }
    (Path(recipe.output) / "facts.json").write_text(json.dumps(facts))
    evaluate_recipe(recipe, model, processor)


if __name__ == "__main__":
    run_arm(sys.argv[1])
