"""What the runs of a study have in common: images, checked plans, costs, and cached features."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from ..config.recipe import Recipe, Source
from ..data.kept_records import keep_records
from ..plan import Plan
from ..schema import UserError, read_json_file, write_text_file
from ..waits import show_step
from .inputs import check_inputs, list_sources
from .study import Study
from .study_parts import DrawnImages
from .text_baseline import write_text_baseline

LARGE_SIZE = ("clip-l-336", "llama-7b")  # the size that costs are also counted at

Log = Callable[[str], None]


def prepare(study: Study, log: Log) -> None:
    """Make what runs have in common: images, checked plans, costs, and the encoder's features."""
    from ..methods import make_plan

    if study.pictures is not None:
        draw_images(study, log)
    recipes = _list_recipes(study)
    recipe = recipes[0]
    model, processor = _build_widest(study, recipe)
    with keep_records():
        records = _read_sources(recipes)
    examples = list(chain.from_iterable(records.values()))
    check_inputs(Path(study.output), recipes, examples, model, processor, log)

    _write_text_baseline(study, recipe, records)
    plans = {}
    for name in study.arms:
        spec = study.get_fusion(name)
        plans[name] = make_plan(spec, model.config.vision_depth, model.config.language_depth)

    write_costs(study, plans, model.config, log)
    if recipe.feature_cache is not None:
        _cache_features(recipe.feature_cache, list(plans.values()), model, processor, examples, log)


def _build_widest(study: Study, recipe: Recipe):
    """Build a model of the study's backbones that needs every view, and its processor."""
    import torch

    from ..building import build
    from ..config.yaml_io import expand_path

    vision = expand_path(recipe.model.vision)
    language = expand_path(recipe.model.language)
    tiles = _find_tiles(study, vision, language)
    plan = {"method": "hires_channels", "tiles": tiles}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a row for images may be drawn: equal backbones have equal hashes
        return build(vision, language, plan, **recipe.model.get_build_settings())


def _list_recipes(study: Study) -> list[Recipe]:
    """The recipe of the first run of every budget: variants and seeds read the same data.

    Where images are drawn, dev runs read others.
    """
    first_runs = {}
    for run in study.list_test_runs():
        first_runs.setdefault(run.budget, run)
    runs = list(first_runs.values())
    if study.pictures is not None:
        runs += study.list_dev_runs()[:1]
    return [study.get_recipe(run) for run in runs]


def _read_sources(recipes: Sequence[Recipe]) -> dict[Source, list]:
    """All records of training and evaluation, of streams where features are cached."""
    from ..data.examples import read_source

    records: dict[Source, list] = {}
    for recipe in recipes:
        for source in list_sources(recipe):
            is_read = recipe.feature_cache or not source.streaming
            if is_read and source not in records:
                records[source] = read_source(source, [])
    return records


def _write_text_baseline(study: Study, recipe: Recipe, records: dict[Source, list]) -> None:
    """Answer the test questions by the commonest answer to their text, as far as it is known."""
    trained = []
    for stage in recipe.stages:
        for source in stage.data:
            trained += records.get(source, [])
    asked = [example for source in recipe.evaluate.data for example in records.get(source, [])]
    if trained and asked:
        write_text_baseline(Path(study.output), trained, asked)


def _cache_features(
    folder: str, plans: Sequence[Plan], model, processor, examples: list, log: Log
) -> None:
    """Encode every image of training and evaluation once, with the views that any plan reads."""
    from ..data.feature_cache import build_feature_cache, get_tap_views

    views: dict[int, int] = {}
    for plan in plans:
        for tap, number in get_tap_views(plan, model.config.vision_depth).items():
            views[tap] = max(number, views.get(tap, 0))

    if max(views.values()) == 1:
        processor.tiles = 0
    build_feature_cache(folder, model, processor, examples, views, log=log)


def _find_tiles(study: Study, vision, language) -> int:
    """The one number of fine views per side that the variants have."""
    from ..building import read_depths
    from ..methods import make_plan

    depths = read_depths(vision, language)
    variants: dict[int, str] = {}
    for name in study.arms:
        plan = make_plan(study.get_fusion(name), *depths)
        if plan.tiles:
            variants[plan.tiles] = name

    if len(variants) > 1:
        raise UserError(
            f"the variants {' and '.join(variants.values())} have"
            f" {' and '.join(map(str, variants))} tiles, but features are cached for one grid of"
            " fine views; make two studies of them"
        )

    return next(iter(variants), 2)


def draw_images(study: Study, log: Log) -> None:
    """Draw the training and test images of a study of the built-in shapes, unless they exist."""
    from ..shapes import write_split

    images = study.pictures
    data = Path(study.output) / "data"
    record = data / "drawn.json"
    settings = asdict(images)
    if study.rates is not None:
        settings["dev"] = study.rates.dev
    if record.is_file():
        drawn = read_json_file(record)
        if drawn == settings:
            return

    log(f"drawing {images.train:,} training and {images.ask:,} {images.split} images ...")
    common = {"seed": images.seed, "size": images.size}
    write_split(data, "train", images.train, images.train_questions, **common)
    write_split(data, images.split, images.ask, images.questions, **common)
    if study.rates is not None:
        _draw_dev_part(data / "rates", images, study.rates.dev)
    write_text_file(record, json.dumps(settings))


def _draw_dev_part(folder: Path, images: DrawnImages, fraction: float) -> None:
    """Draw the images that rates are chosen with, none of which is trained on or evaluated."""
    from ..shapes import write_split

    number = max(1, round(fraction * images.train))
    seed = images.seed if images.split != "dev" else images.seed + 1
    write_split(folder, "dev", number, images.questions, seed=seed, size=images.size)


def write_costs(study: Study, plans: dict, config, log: Log) -> None:
    """Count every plan that costs.json does not hold yet.

    Args:
        study: The study.
        plans: Variant to its plan.
        config: A configuration with the study's encoder and language model.
        log: Takes lines about the progress.
    """
    from ..profiling.counting import PlanCounter

    path = Path(study.output) / "costs.json"
    costs = read_json_file(path) if path.is_file() else {}
    log(f"counting what {len(plans)} plans cost ...")
    here = PlanCounter(config.vision_config, config.text_config, view_size=config.view_size)
    large = PlanCounter(*_read_large_configs())

    with show_step("counting what plans cost", len(plans)) as step:
        for name, plan in step.count(plans.items()):
            if name in costs and costs[name]["plan"] == plan.to_dict():
                continue
            costs[name] = {
                "plan": plan.to_dict(),
                "here": here.count(plan).to_dict(),
                "large": _count_at_large_size(large, study.get_fusion(name)),
            }
            write_text_file(path, json.dumps(costs, indent=1))


def _read_large_configs() -> tuple:
    from ..profiling.sizes import read_backbone_config

    vision, language = LARGE_SIZE
    return read_backbone_config(vision, "vision"), read_backbone_config(language, "language")


def _count_at_large_size(counter, spec: str | dict) -> dict | None:
    """The cost of a method at the large size, or None where it has no plan there."""
    from ..methods import make_plan

    if isinstance(spec, dict) and "method" not in spec:
        return None  # a plan in full is meant for these depths, and is another one at others
    try:
        vision, language = counter.configs
        plan = make_plan(spec, vision.num_hidden_layers, language.num_hidden_layers)
        return counter.count(plan).to_dict()
    except UserError:  # a method of fixed layers, such as official_13b
        return None
