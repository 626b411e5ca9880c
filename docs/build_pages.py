"""Pages of the documentation site that are made from the code: plans drawn, commands, Python names;
and README sections.

mkdocs runs the functions `on_...` (mkdocs.yml names this file under `hooks`); the others give Markdown and need no mkdocs.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEPTHS = 24, 32  # CLIP-L and a 7B language model
README_SECTION = re.compile(r"^\[[^\]]+\]\(\.\./README\.md#([\w-]+)\)$", re.M)
EXPLAINED = re.compile(r"(<p>|[.;)\]]\s)([a-z]\w*(?:, [a-z]\w*)*): ")
PAGE_NAME = re.compile(r"\[docs/([\w-]+)\.md\]|\[([\w-]+)\.md\]")
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def plans_page() -> str:
    """Every method: what its docstring says, its drawing, and its command; at the depths of CLIP-L
    and a 7B model.
    """
    from sparsecut.drawing import summarize
    from sparsecut.methods import METHODS, make_plan
    from sparsecut.reports.plan_drawing import draw_plan

    parts = [
        "# Plans, drawn\n\nEvery way of fusion that has a name, at an encoder of 24 blocks and a"
        " language model of 32 layers (40 for the 13B form). Encoder states are on the left and"
        " decoder layers on the right, both from the bottom up; those with a number are read or"
        " written. [Add your own](add-a-method.md), or write one [in full](recipes.md#fusion)."
    ]
    for name, method in METHODS.items():
        depths = (24, 40) if name == "official_13b" else DEPTHS
        plan = make_plan(name, *depths)
        words = (
            inspect.getdoc(method)
            .replace("\n", " ")
            .replace("docs/results.md", "[results](results.md)")
        )
        drawing = f'<div class="plan">{draw_plan(plan, *depths)}</div>'
        command = (
            f"    sparsecut show {name} --vision-depth {depths[0]} --language-depth {depths[1]}"
        )
        parts.append(
            f"## {name}\n\n{words}\n\n{summarize(plan).splitlines()[0]}\n\n{drawing}\n\n{command}"
        )
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """Every command with its arguments and options, from the command line's own help."""
    parts = [
        "# Commands\n\nMade from the command line's own help: `sparsecut --help`, `sparsecut"
        " COMMAND --help`. Errors end with a sentence that says what to do; `--traceback` shows"
        " where one arose."
    ]
    for words, command in commands():
        usage = " ".join([words, *(_metavar(p) for p in command.params if _is_argument(p))])
        parts.append(f"## {words}\n\n{_one_line(command.help)}\n\n    {usage} [OPTIONS]")
        rows = [_row(p) for p in command.params if p.name != "help"]
        if rows:
            parts.append(
                "| argument or option | says | default |\n|---|---|---|\n" + "\n".join(rows)
            )
    return "\n\n".join(parts) + "\n"


def commands() -> list[tuple[str, object]]:
    """(words, command) of every command, those of groups included: ("sparsecut shapes draw",
    ...).
    """
    import typer

    from sparsecut.cli.main import app

    found = []

    def walk(words: str, command) -> None:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                walk(f"{words} {name}", inner)
        elif not command.hidden:
            found.append((words, command))

    walk("sparsecut", typer.main.get_command(app))
    return found


def api_page() -> str:
    """The public names, as mkdocstrings directives."""
    import sparsecut
    from sparsecut.evaluation import tasks

    parts = [
        "# Python\n\nThe public names of `import sparsecut`. Everything else is reachable through"
        " its module, and may change."
    ]
    for name in sparsecut.__all__:
        if name == "METHODS":
            parts.append(
                "## METHODS\n\nA dict: a method's name to its function of two depths ([all of them,"
                " drawn](plans.md))."
            )
            continue
        home = f"sparsecut.{sparsecut._HOMES[name]}.{name}"
        options = "    options: {inherited_members: false}"
        if name.startswith(
            "SparseCut"
        ):  # Hugging Face classes: what they have besides is Hugging Face's
            options = "    options: {members: false, show_bases: true}"
        parts.append(f"::: {home}\n{options}")
    parts.append(
        "## Scores of benchmarks\n\nWhat the benchmarks' own scripts compute ([the"
        " tasks](benchmarks.md))."
    )
    parts += [f"::: sparsecut.evaluation.tasks.{name}" for name in tasks.__all__]
    return "\n\n".join(parts) + "\n"


GENERATED = {"plans.md": plans_page, "commands.md": commands_page, "api.md": api_page}


def with_readme(markdown: str) -> str:
    """A line that is only a link to a section of the README becomes that section, with links as
    from docs/.
    """
    return README_SECTION.sub(lambda found: readme_section(found[1]), markdown)


def readme_section(anchor: str) -> str:
    """A section of the README by its anchor; ValueError where there is none."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for part in re.split(r"^(?=## )", text, flags=re.M)[1:]:
        if part.splitlines()[0][3:].lower().replace(" ", "-") == anchor:
            return part.strip().replace("](docs/", "](")
    raise ValueError(
        f"the README has no section #{anchor}; name one of its headings, in small letters and with"
        " hyphens"
    )


def with_page_titles(markdown: str) -> str:
    """Links that are called as a file of docs/ get the page's title instead."""

    def title(found) -> str:
        page = ROOT / "docs" / f"{found[1] or found[2]}.md"
        return (
            f"[{page.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}]"
            if page.is_file()
            else found[0]
        )

    return PAGE_NAME.sub(title, markdown)


def with_arguments_apart(html: str) -> str:
    """A docstring's "name: what it means. other: ..." as a line for each name."""

    def apart(found) -> str:
        return (
            f"{found[1]}{'' if found[1] == '<p>' else '<br>'}<code"
            f' class="given">{found[2]}</code>: '
        )

    return EXPLAINED.sub(apart, html)


def on_files(files, config):
    """mkdocs: add the generated pages to the files."""
    from mkdocs.structure.files import File

    for name, make in GENERATED.items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown, page, config, files):
    """mkdocs: put README sections in, and show links to files outside of docs/ as the words
    alone.
    """
    return OUTSIDE.sub(r"`\1`", with_page_titles(with_readme(markdown)))


def on_page_content(html, page, config, files):
    """mkdocs: on the page of Python names every argument that a docstring explains begins a
    line.
    """
    return with_arguments_apart(html) if page.file.src_uri == "api.md" else html


def _metavar(argument) -> str:
    name = argument.metavar or argument.name.upper()
    name = f"{name}..." if argument.nargs == -1 else name
    return name if argument.required else f"[{name}]"


def _is_argument(param) -> bool:
    return param.param_type_name == "argument"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _row(param) -> str:
    names = _metavar(param) if _is_argument(param) else ", ".join(param.opts)
    default = param.default
    shown = (
        ""
        if default is None
        or default is False
        or default in ((), [])
        or callable(default)
        or "Sentinel" in type(default).__name__
        else f"`{default}`"
    )
    if param.required:
        shown = "required"
    help = (
        _one_line(getattr(param, "help", ""))
        .replace("|", "\\|")
        .replace("*", "\\*")
        .replace("<", "&lt;")
    )
    return f"| `{names}` | {help} | {shown} |"
