"""`sparsecut cost`: what plans cost at a size, counted or measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from ..config.paths import check_writable_folder
from ..config.places import (
    DEPTHS,
    check_backbone_place,
    check_model_files,
    check_size_place,
)
from ..schema import UserError, read_json_file, write_text_file
from .app import (
    Device,
    File,
    MethodOptions,
    Number,
    Text,
    app,
    argument,
    echo,
    find_device,
    option,
)
from .completion import complete_plan
from .early_checks import check_spec


def _check_parent(file: Path | None) -> Path | None:
    if file is not None:
        check_writable_folder(file.parent)
        if file.is_dir():
            raise UserError(f"--json is {file}, but that is a folder; name a file in it")
        is_written = file.is_file() and file.stat().st_size > 0
        if is_written and not _holds_costs(file):
            raise UserError(
                f"--json is {file}, which holds something else than costs and would be replaced;"
                " name a new file"
            )
    return file


def _holds_costs(file: Path) -> bool:
    """Whether this command wrote a file."""
    try:
        plans = read_json_file(file).values()
    except UserError:
        return False
    return all(isinstance(numbers, dict) and "count" in numbers for numbers in plans)


@app.command()
def cost(
    plans: Annotated[
        list[str] | None,
        argument(
            "Methods' names, files with plans or names of `sparsecut recipes`; ratios are to the"
            " first. With --base the default is what upgrade makes: sparsecut, narrow projectors.",
            "PLAN...",
            complete_plan,
        ),
    ] = None,
    vision: Annotated[
        str, option("Encoder: a known size's name, folder, hub name, or shapes.")
    ] = "clip-l-336",
    language: Annotated[
        str, option("Language model: a known size's name, folder, hub name, or shapes.")
    ] = "llama-7b",
    text_tokens: Annotated[
        int, option("Text tokens of the prompt, beside its one image.", min=1)
    ] = 64,
    view_size: Annotated[
        Number, option("Pixels of a view, where the encoder takes other sizes than its own.", min=1)
    ] = None,
    base: Annotated[
        Text,
        option("Count upgrades of this pretrained VLM instead. Loads it."),
    ] = None,
    method_options: MethodOptions = None,
    measure: Annotated[
        bool, option("Also time each on this machine, with random weights.", "--measure")
    ] = False,
    device: Device = None,
    json_file: Annotated[
        File,
        option(
            "File for all numbers, also those of a training step.",
            "--json",
            callback=_check_parent,
        ),
    ] = None,
) -> None:
    """Count what plans cost at a size: parameters, FLOPs, memory. Loads no weights but --base."""
    specs = _read_plans(plans or [], method_options or [], is_upgrade=base is not None)
    for spec in specs.values():
        check_spec(spec, None if base else vision, None if base else language)
    if base is not None:
        if view_size is not None:
            raise UserError(
                f"--view-size is {view_size}, but a pretrained VLM has views of its own; leave out"
                " --view-size or --base"
            )
        if measure:
            raise UserError(
                "--measure times models of random weights, not a pretrained VLM; leave out"
                " --measure or --base"
            )
        numbers = _count_upgrades(base, specs)
    else:
        configs = _read_configs(vision, language)
        is_written = json_file is not None
        numbers = _count_plans(*configs, specs, text_tokens, view_size, training=is_written)
        if measure:
            settings = {"view_size": view_size, "device": find_device(device)}
            _measure_plans(numbers, *configs, specs, text_tokens, **settings)

    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_text_file(json_file, json.dumps(numbers, indent=2) + "\n")
        echo(f"wrote {json_file}")


def _read_plans(plans: list[str], options: list[str], *, is_upgrade: bool) -> dict:
    """What `build` or `upgrade` takes for every plan, by the name that was typed."""
    from .plan_argument import UPGRADE_METHOD, read_plan, read_upgrade_plan

    if is_upgrade:
        return {plan: read_upgrade_plan(plan, options) for plan in plans or [UPGRADE_METHOD]}
    if not plans:
        raise UserError(
            "no plan was given; name methods or files with plans, for example sparsecut llava, or a"
            " pretrained VLM with --base"
        )
    return {plan: read_plan(plan, options) for plan in plans}


def _read_configs(vision: str, language: str) -> tuple:
    """The configurations of both parts."""
    for name, part in ((vision, "vision"), (language, "language")):
        check_size_place(name, part)
        if name not in DEPTHS[part]:
            check_backbone_place(name, part)
    from ..profiling.sizes import read_backbone_config

    return read_backbone_config(vision, "vision"), read_backbone_config(language, "language")


def _count_plans(
    vision_config,
    language_config,
    specs: dict,
    text_tokens: int,
    view_size: int | None,
    *,
    training: bool,
) -> dict:
    """Print the counted cost of plans, and return it as plain values by plan.

    A training step is counted for the file alone: the table does not show it.
    """
    from ..profiling.counting import PlanCounter, format_costs

    counts = {}
    numbers = {}
    counter = PlanCounter(vision_config, language_config, view_size=view_size)
    for name, spec in specs.items():
        counted = counter.count(spec, num_text_tokens=text_tokens, training=training)
        counts[name] = counted
        numbers[name] = {"count": counted.to_dict()}

    echo(format_costs(counts))
    return numbers


def _measure_plans(
    numbers: dict, vision_config, language_config, specs: dict, text_tokens: int, **settings
) -> None:
    """Print measured times of plans, and add them to the plans' numbers."""
    from ..profiling import timing

    models = timing.random_models(vision_config, language_config, specs, **settings)
    measured = timing.measure_all(models, num_text_tokens=text_tokens)
    echo(f"\n{timing.format_measurements(measured)}")

    for name, measurement in measured.items():
        numbers[name]["measured"] = measurement.to_dict()


def _count_upgrades(base: str, specs: dict) -> dict:
    """Print what upgrading a pretrained VLM costs, and return it as plain values by plan."""
    check_model_files(base, "base")
    from ..profiling.upgraded import count_upgrades, format_upgrade_cost

    counts = count_upgrades(base, specs)
    for name, counted in counts.items():
        echo(f"{name}\n{format_upgrade_cost(counted)}")
    return {name: {"count": counted.to_dict()} for name, counted in counts.items()}
