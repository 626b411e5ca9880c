"""`sparsecut show`: draw a plan."""

from __future__ import annotations

from typing import Annotated

from .app import MethodOptions, Number, app, argument, echo, option
from .completion import complete_plan


@app.command()
def show(
    what: Annotated[
        str,
        argument(
            "A method's name, a recipe or plan (a YAML or JSON file, or a name of `sparsecut"
            " recipes`), or a saved model's folder.",
            complete=complete_plan,
        ),
    ],
    vision_depth: Annotated[
        Number, option("Number of encoder blocks. Default: the model's, else 24.")
    ] = None,
    language_depth: Annotated[
        Number, option("Number of decoder layers. Default: the model's, else 32.")
    ] = None,
    method_options: MethodOptions = None,
    json: Annotated[
        bool, option("Print the plan as JSON, which `build --plan` takes.", "--json")
    ] = False,
) -> None:
    """Draw a plan: which layers are read, how they are mixed, where they are added."""
    from .plan_argument import draw_argument, format_json

    plan, drawing = draw_argument(what, vision_depth, language_depth, method_options or [])
    echo(format_json(plan) if json else drawing)
