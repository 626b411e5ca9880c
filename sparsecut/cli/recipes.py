"""`sparsecut recipes`: what ships with the package, listed, printed and copied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import typer.core

from ..config.paths import check_writable_folder
from ..config.shipped import FOLDERS, USES, Shipped, find_shipped, list_shipped
from ..schema import UserError, nearest, read_text_file, write_text_file
from .app import SETTINGS, App, File, app, argument, echo, option
from .completion import complete_long_name

TITLES = {"recipe": "recipes", "study": "studies", "plan": "plans", "deepspeed": "DeepSpeed"}


class RecipesGroup(typer.core.TyperGroup):
    """Says how what ships is printed, where its name stands in the place of `show`."""

    def resolve_command(self, ctx, args):
        """As typer's own; `UserError` where the command is the name of something that ships."""
        name = args[0]
        if self.get_command(ctx, name) is None and find_shipped(name, list(FOLDERS)) is not None:
            raise UserError(
                f"`recipes` has no command {name!r}; print what ships with `sparsecut recipes show"
                f" {name}`, or copy it with --copy FILE"
            )
        return super().resolve_command(ctx, args)


recipes_app = App(
    cls=RecipesGroup,
    help="Recipes, studies, plans and DeepSpeed settings that ship with the package.",
    **{**SETTINGS, "no_args_is_help": False},
)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback(invoke_without_command=True)
def list_all(context: typer.Context) -> None:
    """List recipes, studies, plans and DeepSpeed settings that ship with the package."""
    if context.invoked_subcommand is not None:
        return
    for kind in FOLDERS:
        shipped = list_shipped(kind)
        echo(f"{TITLES[kind]}, for `{USES[kind]}`")
        width = max(len(one.name) for one in shipped)
        for one in shipped:
            echo(f"  {one.name:{width}}  {_describe(one)}")
        echo()
    echo("`sparsecut recipes show NAME` prints one, and `--copy FILE` makes it yours.")


def _describe(one: Shipped) -> str:
    facts = one.describe() if one.kind != "deepspeed" else {"what": _describe_stage(one.name)}
    more = [f"{key}: {facts[key]}" for key in ("takes", "needs") if key in facts]
    return " ".join([facts["what"], *(f"[{text}]" for text in more)])


def _describe_stage(name: str) -> str:
    shared = {"zero2": "optimizer states and gradients", "zero3": "weights as well"}
    return f"Every process holds a part: {shared[name]}."


@recipes_app.command("show")
def show_one(
    name: Annotated[
        str,
        argument(
            "A name of `sparsecut recipes`, such as tiny or study/shapes.",
            complete=complete_long_name,
        ),
    ],
    copy: Annotated[File, option("A new file to write it to, which can then be changed.")] = None,
) -> None:
    """Print a recipe, study, plan or setting that ships with the package, or copy it."""
    shipped = find_shipped(name, list(FOLDERS))
    if shipped is None:
        names = [one.long_name for one in list_shipped()]
        raise UserError(
            f"nothing that ships with the package is named {name}{nearest(name, names)}; there are"
            f" {', '.join(names)}"
        )
    text = read_text_file(shipped.path)
    if copy is None:
        echo(text, nl=False)
        return
    file = _check_new_file(copy, shipped.path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_file(file, text)
    echo(f"wrote {file}")


def _check_new_file(file: Path, source: Path) -> Path:
    if file.is_dir():
        file = file / source.name
    if file.exists():
        raise UserError(f"--copy is {file}, which exists and would be replaced; name a new file")
    if file.suffix != source.suffix:
        raise UserError(f"--copy is {file}, but what is copied is a {source.suffix} file; name one")
    check_writable_folder(file.parent)
    return file
