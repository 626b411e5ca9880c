"""Commands around finished vision-language models, registered on the command line's app when `cli` is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli import Method, Text, _arg, _opt, app


@app.command()
def upgrade(
    base: Annotated[str, _arg("A finished vision-language model: folder or hub name.", "BASE")],
    out: Annotated[Path, _opt("Folder to write the shortcuts to.")],
    plan: Annotated[
        Text, _opt("A method's name, or a file with a plan; by default sparsecut, its projectors narrow.")
    ] = None,
    option: Method = None,
    whole: Annotated[bool, _opt("Write the base too, so that the folder needs nothing else.", "--whole")] = False,
) -> None:
    """Give a finished vision-language model shortcuts, untrained: it answers exactly as before until they are trained."""
    from .sketch import read_plan, refuse_model_in

    spec = read_plan(plan or "sparsecut", option or []) if plan or option else None
    refuse_model_in(out)
    from .building import save
    from .sketch import describe
    from .upgrade_cost import count_upgrade, describe_cost
    from .upgrading import upgrade

    model, processor = upgrade(base, spec)
    if whole:
        save(model, processor, out)
    else:
        model.save_fusion(out)
    typer.echo(
        f"{describe(model)}\n\n{describe_cost(count_upgrade(model, processor))}\n\nwrote {out}; its shortcuts are untrained"
    )
