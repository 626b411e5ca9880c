"""Pages of the documentation site that are made from the code: plans, commands, Python names.

mkdocs runs the functions `on_...` (mkdocs.yml names this file under `hooks`). The others make
Markdown and need no mkdocs.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DEPTHS = (24, 32)  # CLIP-L and a 7B language model
DEPTHS_13B = (24, 40)
README_SECTION = re.compile(r"^\[[^\]]+\]\(\.\./README\.md#([\w-]+)\)$", re.M)
PAGE_NAME = re.compile(r"\[(?:docs/)?([\w-]+)\.md\]")
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def plans_page() -> str:
    """Every method: its docstring, its drawing, and the command that draws it."""
    from sparsecut.methods import METHODS

    intro = (
        "# Plans, drawn\n\nEvery method, at an encoder of 24 blocks and a language model of 32"
        " layers (40 for the 13B form). Encoder layers are on the left and decoder layers on the"
        " right, both from the bottom up. Those with a number are read or written."
        " [Add your own](add-a-method.md), or write a plan [in full](recipes.md#fusion)."
    )
    sections = [_describe_method(name, method) for name, method in METHODS.items()]
    return "\n\n".join([intro, *sections]) + "\n"


def _describe_method(name: str, method) -> str:
    from sparsecut.drawing import summarize
    from sparsecut.methods import make_plan
    from sparsecut.reports.plan_drawing import draw_plan

    depths = DEPTHS_13B if name == "official_13b" else DEPTHS
    plan = make_plan(name, *depths)
    docstring = inspect.getdoc(method).split("\n\nArgs:")[0]
    text = docstring.replace("docs/older-results.md", "[results](older-results.md)")
    drawing = f'<div class="plan">{draw_plan(plan, *depths)}</div>'
    command = f"    sparsecut show {name} --vision-depth {depths[0]} --language-depth {depths[1]}"
    return "\n\n".join([f"## {name}", text, summarize(plan), drawing, command])


def commands_page() -> str:
    """Every command with its arguments and options, from the command line's own help."""
    intro = (
        "# Commands\n\nMade from the command line's own help: `sparsecut --help`, `sparsecut"
        " COMMAND --help`. Errors end with what to do. `--traceback` shows where one arose."
    )
    sections = [_describe_command(words, command) for words, command in list_commands()]
    return "\n\n".join([intro, *sections]) + "\n"


def _describe_command(words: str, command) -> str:
    arguments = [get_metavar(p) for p in command.params if is_argument(p)]
    usage = " ".join([words, *arguments, "[OPTIONS]"])
    parts = [f"## {words}", _join_lines(command.help), f"    {usage}"]
    rows = [_make_row(p) for p in command.params if p.name != "help"]
    if rows:
        header = "| argument or option | meaning | default |\n|---|---|---|\n"
        parts.append(header + "\n".join(rows))
    return "\n\n".join(parts)


def list_commands() -> list[tuple[str, object]]:
    """Every command with its words, such as "sparsecut shapes draw"."""
    import typer

    from sparsecut.cli.main import app

    commands: list[tuple[str, object]] = []

    def walk(words: str, command) -> None:
        if isinstance(command, typer.core.TyperGroup):
            for name in command.list_commands(None):
                walk(f"{words} {name}", command.commands[name])
        elif not command.hidden:
            commands.append((words, command))

    walk("sparsecut", typer.main.get_command(app))
    return commands


def api_page() -> str:
    """The public names, as mkdocstrings directives."""
    import sparsecut
    from sparsecut.evaluation import tasks

    parts = [
        "# Python\n\nThe public names of `import sparsecut`. Everything else can be reached through"
        " its module, and may change."
    ]
    parts += [_describe_public_name(name) for name in sparsecut.__all__]
    parts.append(
        "## Scores of benchmarks\n\nThey equal the benchmarks' own scripts"
        " ([the tasks](benchmarks.md))."
    )
    parts += [f"::: sparsecut.evaluation.tasks.{name}" for name in tasks.__all__]
    return "\n\n".join(parts) + "\n"


def _describe_public_name(name: str) -> str:
    import sparsecut

    if name == "METHODS":
        return (
            "## METHODS\n\nA dict from a method's name to its function of two depths"
            " ([all of them, drawn](plans.md))."
        )
    options = "{inherited_members: false}"
    if name.startswith("SparseCut"):  # further members are Hugging Face's
        options = "{members: false, show_bases: true}"
    return f"::: sparsecut.{sparsecut._HOMES[name]}.{name}\n    options: {options}"


GENERATED = {"plans.md": plans_page, "commands.md": commands_page, "api.md": api_page}


def insert_readme_sections(markdown: str) -> str:
    """Replace a line that only links to a section of the README by that section."""
    return README_SECTION.sub(lambda match: get_readme_section(match[1]), markdown)


def get_readme_section(anchor: str) -> str:
    """A section of the README by its anchor, with links as from docs/.

    Raises:
        ValueError: There is no such section.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for section in re.split(r"^(?=## )", text, flags=re.M)[1:]:
        heading = section.splitlines()[0].removeprefix("## ")
        if heading.lower().replace(" ", "-") == anchor:
            return section.strip().replace("](docs/", "](")
    raise ValueError(f"the README has no section #{anchor}")


def name_links_by_title(markdown: str) -> str:
    """Replace file names of docs/ as link texts by the titles of these pages."""

    def get_title(match: re.Match) -> str:
        page = DOCS / f"{match[1]}.md"
        if not page.is_file():
            return match[0]
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        return f"[{title}]"

    return PAGE_NAME.sub(get_title, markdown)


def on_files(files, config):
    """mkdocs: add the generated pages to the files."""
    from mkdocs.structure.files import File

    for name, make_page in GENERATED.items():
        files.append(File.generated(config, name, content=make_page()))
    return files


def on_page_markdown(markdown, page, config, files):
    """mkdocs: insert README sections, and turn links to files outside of docs/ into code."""
    markdown = name_links_by_title(insert_readme_sections(markdown))
    return OUTSIDE.sub(r"`\1`", markdown)


def is_argument(param) -> bool:
    """Whether a parameter of a command is positional."""
    return param.param_type_name == "argument"


def get_metavar(argument) -> str:
    """An argument as the usage line shows it, such as `[PLAN...]`."""
    name = argument.metavar or argument.name.upper()
    if argument.nargs == -1 and not name.endswith("..."):
        name = f"{name}..."
    return name if argument.required else f"[{name}]"


def _join_lines(text: str | None) -> str:
    return " ".join((text or "").split())


def _make_row(param) -> str:
    names = get_metavar(param) if is_argument(param) else ", ".join(param.opts)
    meaning = _join_lines(getattr(param, "help", ""))
    for character, escaped in (("|", "\\|"), ("*", "\\*"), ("<", "&lt;")):
        meaning = meaning.replace(character, escaped)
    return f"| `{names}` | {meaning} | {_show_default(param)} |"


def _show_default(param) -> str:
    if param.required:
        return "required"
    default = param.default
    is_unset = callable(default) or "Sentinel" in type(default).__name__
    if default is None or default is False or default in ((), []) or is_unset:
        return ""
    return f"`{default}`"
