"""Runs a study: pictures and encoder states once, then every run in one of several processes, then
the report.

Written to the study's output folder:

    study.yaml                     the study as it ran; running it again goes on where it stopped
    data/, states/                 the world's pictures, if it asks for them, and the encoder's
    states of all pictures costs.json                     what each arm costs, at the study's own
    size and at a large one runs/BUDGET/ARM/SEED/          one run: what training writes, eval/ with
    its answers, facts.json; running and failed.txt report.html, .md, .json        the comparison

Any number of processes, also of several machines on one disk, may work on a folder: a run belongs to whoever creates its file
`running`. A run whose process is gone is taken over.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

from ..data.jsonl import read_json_lines
from ..schema import UserError
from .study import Run, Study, dump_study, load_study, narrowed

LARGE = "clip-l-336", "llama-7b"  # the size that costs are also told at


def run_study(study: Study, *, workers: int = 2, arms=(), seeds=(), log=print) -> Path:
    """Do what is left of a study; returns its folder.

    arms, seeds: only these now. Raises ValueError where the folder holds another study or an arm
    cannot be built (before anything is trained), ChildProcessError naming the runs that failed,
    when all others are done.
    """
    out = Path(study.output)
    check_folder(study, out)
    part = narrowed(study, arms, seeds)
    out.mkdir(parents=True, exist_ok=True)
    dump_study(study, out / "study.yaml")
    prepare(study, log)
    todo = [run for run in part.runs() if not run.finished(out)]
    log(
        f"{len(part.runs())} runs: {len(part.runs()) - len(todo)} finished, {len(todo)} to do in"
        f" {workers} processes"
    )
    for run in todo:
        (run.folder(out) / "failed.txt").unlink(missing_ok=True)
    if todo:
        _supervise(part, out, min(workers, len(todo)), log)
    if failed := [run for run in part.runs() if (run.folder(out) / "failed.txt").is_file()]:
        tail = (failed[0].folder(out) / "failed.txt").read_text().strip().splitlines()[-1]
        names = ", ".join(f"{r.budget}/{r.arm}/{r.seed}" for r in failed)
        raise ChildProcessError(
            f"{len(failed)} runs failed ({names}); the first says: {tail}; mend it and run again,"
            " the others are kept"
        )
    return out


def check_folder(study: Study, out: Path) -> None:
    """Raise ValueError where `out` holds a study with other data or training, or with another
    meaning of an arm.
    """
    if not (out / "study.yaml").is_file():
        return
    before = load_study(out / "study.yaml")
    changed = [
        name for name in ("recipe", "pictures") if getattr(before, name) != getattr(study, name)
    ]
    changed += [
        f"arms.{a}" for a, spec in before.arms.items() if a in study.arms and study.arms[a] != spec
    ]
    both = [name for name in before.budgets if name in study.budgets]
    changed += [f"budgets.{b}" for b in both if before.budgets[b].change != study.budgets[b].change]
    if changed:
        raise UserError(
            f"{out} holds another study (it differs in {', '.join(changed)}), whose results would"
            " be taken for this one's; choose another folder (output=...) or remove this one"
        )


def prepare(study: Study, log) -> None:
    """Everything runs have in common: pictures, the plans checked, costs, and the encoder's
    states.
    """
    from ..building import build
    from ..config.yaml_io import expand_path
    from ..data.examples import read_source
    from ..data.feature_cache import prepare_states, views_of
    from ..evaluation.evaluator import evaluation_examples
    from ..methods import make_plan

    out = Path(study.output)
    if study.pictures is not None:
        draw_pictures(study, log)
    recipes = {arm: study.recipe_of(Run(study.main, arm, study.seeds[0])) for arm in study.arms}
    first = next(iter(recipes.values()))
    vision, language = expand_path(first.model.vision), expand_path(first.model.language)
    widest, processor = build(
        vision, language, {"method": "hires_channels", "tiles": _tiles(study, vision, language)}
    )
    depths = widest.config.vision_depth, widest.config.language_depth
    plans = {arm: make_plan(spec, *depths) for arm, spec in study.arms.items()}
    write_costs(
        {arm: (plans[arm], study.arms[arm]) for arm in plans},
        widest.config,
        out / "costs.json",
        log,
    )
    if first.states is None:
        return
    views: dict[int, int] = {}
    for plan in plans.values():
        for tap, num in views_of(plan, depths[0]).items():
            views[tap] = max(num, views.get(tap, 0))
    examples = [
        e for stage in first.stages for source in stage.data for e in read_source(source, [])
    ]
    examples += evaluation_examples(first)
    if max(views.values()) == 1:
        processor.tiles = 0
    prepare_states(first.states, widest, processor, examples, views, log=log)


def _tiles(study: Study, vision, language) -> int:
    """The one number of fine views per side that the arms have."""
    from ..building import depths_of
    from ..methods import make_plan

    depths = depths_of(vision, language)
    tiles = {
        plan.tiles: arm
        for arm, spec in study.arms.items()
        if (plan := make_plan(spec, *depths)).tiles
    }
    if len(tiles) > 1:
        raise UserError(
            f"the arms {' and '.join(tiles.values())} have {' and '.join(map(str, tiles))} tiles,"
            " but states are kept for one grid of fine views; make two studies of them"
        )
    return next(iter(tiles), 2)


def draw_pictures(study: Study, log) -> None:
    """The training and test pictures of a study of the built-in world, unless they are there."""
    from ..shapes import write_split

    p, data = study.pictures, Path(study.output) / "data"
    done, settings = data / "drawn.json", json.loads(json.dumps(study.to_dict()["pictures"]))
    if done.is_file() and json.loads(done.read_text()) == settings:
        return
    log(f"drawing {p.train:,} training and {p.ask:,} {p.split} pictures ...")
    size = {} if p.size == "small" else {"size": p.size}
    write_split(data, "train", p.train, p.train_questions, seed=p.seed, **size)
    write_split(data, p.split, p.ask, p.questions, seed=p.seed, **size)
    done.write_text(json.dumps(settings))


def write_costs(plans: dict, config, path: Path, log) -> None:
    """Count every plan that is not counted yet, at the study's size and, if it is a method and
    scales, at the large one.
    """
    from ..methods import make_plan
    from ..profiling.counting import backbone_config, count

    known = json.loads(path.read_text()) if path.is_file() else {}
    large = [
        backbone_config(name, part)
        for name, part in zip(LARGE, ("vision", "language"), strict=True)
    ]
    large_depths = large[0].num_hidden_layers, large[1].num_hidden_layers
    log(f"counting what {len(plans)} plans cost ...")
    for arm, (plan, spec) in plans.items():
        if arm in known and known[arm]["plan"] == plan.to_dict():
            continue
        known[arm] = {
            "plan": plan.to_dict(),
            "here": count(config.vision_config, config.text_config, plan).to_dict(),
        }
        scales = (
            isinstance(spec, str) or "method" in spec
        )  # a plan in full means these depths, and another plan at others
        try:
            known[arm]["large"] = (
                count(*large, make_plan(spec, *large_depths)).to_dict() if scales else None
            )
        except ValueError:  # a method of fixed layers, such as official_13b
            known[arm]["large"] = None
        path.write_text(json.dumps(known, indent=1))


def _supervise(study: Study, out: Path, workers: int, log) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    asked = [*(f"arm={arm}" for arm in study.arms), *(f"seed={seed}" for seed in study.seeds)]
    command = [sys.executable, "-m", "sparsecut.experiments.runner", str(out), *asked]
    processes, shown, told = (
        [],
        time.monotonic(),
        {run for run in study.runs() if run.finished(out)},
    )
    try:
        for number in range(workers):
            with (out / f"worker-{number}.txt").open("w") as log_file:
                processes.append(
                    subprocess.Popen(
                        command, stdout=log_file, stderr=subprocess.STDOUT, env=environment
                    )
                )
        while any(process.poll() is None for process in processes):
            time.sleep(0.5)
            for run in [run for run in study.runs() if run not in told and run.finished(out)]:
                told.add(run)
                log(
                    f"{len(told)}/{len(study.runs())}  {run.budget} {run.arm} seed {run.seed}:"
                    f" {_scores(run, out)}"
                )
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                if lines := [
                    f"{run.arm} {progress_of(study, run)}"
                    for run in study.runs()
                    if _is_running(run, out)
                ]:
                    log("  " + "   ".join(lines))
    finally:
        for process in processes:
            process.terminate()
    for number, process in enumerate(processes):
        if process.wait() not in (0, -15):
            tail = "\n".join((out / f"worker-{number}.txt").read_text().splitlines()[-12:])
            raise ChildProcessError(
                f"a process of the study stopped with exit code {process.returncode}; the end of"
                f" its log:\n{tail}"
            )


def _scores(run: Run, out: Path) -> str:
    result = json.loads((run.folder(out) / "eval" / "result.json").read_text())
    levels = ", ".join(
        f"{level} {100 * row['accuracy']:.1f}" for level, row in result["levels"].items()
    )
    mean = result["mean_over_levels"] if result["levels"] else result["accuracy"]
    return f"{100 * mean:.1f} %" + (f" ({levels})" if levels else "")


def progress_of(study: Study, run: Run) -> str:
    """Where a running run is: its stage, step and loss, from the log it writes."""
    for stage in reversed(study.recipe_of(run).stages):
        log = run.folder(Path(study.output)) / stage.name / "log.jsonl"
        lines = read_json_lines(log, skip_partial=True) if log.is_file() else []
        if lines:
            last = lines[-1]
            return (
                f"{stage.name} {last['step']}/{stage.args.get('max_steps', '?')} loss"
                f" {last['loss']:.2f}"
            )
    return "loading"


def work(out: Path, arms=(), seeds=()) -> None:
    """Take one run after the other until none is left; what each process of a study does."""
    import torch

    torch.set_num_threads(1)
    study = narrowed(load_study(out / "study.yaml"), arms, seeds)
    for run in study.runs():
        folder = run.folder(out)
        if run.finished(out) or (folder / "failed.txt").is_file() or not claim(folder):
            continue
        try:
            if not run.finished(out):  # it may have been finished between the two looks
                do(study, run)
        except Exception:
            (folder / "failed.txt").write_text(traceback.format_exc())
        finally:
            (folder / "running").unlink(missing_ok=True)


def claim(folder: Path) -> bool:
    """Make a run this process's own; False where a living process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    mark, mine = folder / "running", f"{socket.gethostname()} {os.getpid()}"
    for _ in range(2):
        try:
            with mark.open("x") as file:
                file.write(mine)
            return True
        except FileExistsError:
            if _alive(mark):
                return False
            mark.unlink(missing_ok=True)
    return False


def _alive(mark: Path) -> bool:
    try:
        host, pid = mark.read_text().split()
    except (OSError, ValueError):  # gone just now, or not written yet
        return mark.is_file() and time.time() - mark.stat().st_mtime < 60
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except OSError:
        return False
    return True


def _is_running(run: Run, out: Path) -> bool:
    return (run.folder(out) / "running").is_file() and not run.finished(out)


def do(study: Study, run: Run) -> None:
    """Train and evaluate one run, from the start or from its last whole stage."""
    from ..evaluation.evaluator import evaluate_recipe, evaluation_examples
    from ..training.stages import open_feature_cache, train

    out = Path(study.output)
    recipe, folder = study.recipe_of(run), run.folder(out)
    model, processor = train(recipe, resume=True)
    trained = [read_json_lines(folder / stage.name / "log.jsonl")[-1] for stage in recipe.stages]
    states = open_feature_cache(recipe, model, processor, evaluation_examples(recipe))
    result = evaluate_recipe(recipe, model, processor, resume=True, feature_cache=states)
    facts = {
        "arm": run.arm,
        "budget": run.budget,
        "seed": run.seed,
        "plan": model.plan.to_dict(),
        "depths": [model.config.vision_depth, model.config.language_depth],
        "parameters": {
            part: sum(p.numel() for p in tensors)
            for part, tensors in model.parameter_groups().items()
        },
        "image_tokens": processor.num_image_tokens,
        "views": processor.num_views,
        "train_seconds": sum(line["seconds"] for line in trained),
        "eval_seconds": result["seconds"],
    }
    part = folder / "facts.part"
    part.write_text(json.dumps(facts, indent=1))
    part.replace(folder / "facts.json")
    for stage in recipe.stages[:-1]:  # models on the way would be most of a study's size
        for weights in (folder / stage.name).glob("*.safetensors"):
            weights.unlink()


if __name__ == "__main__":
    pairs = [argument.split("=", 1) for argument in sys.argv[2:]]
    work(
        Path(sys.argv[1]),
        [value for name, value in pairs if name == "arm"],
        [int(value) for name, value in pairs if name == "seed"],
    )
