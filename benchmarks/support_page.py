"""docs/support.md: several commands write it, and each replaces its own level-2 sections only."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
LONGEST_REASON = 200  # characters of an error's message


def format_reason(name: str, column: str, error: Exception) -> str:
    """Describe in one line why a family has a "no" in a column."""
    text = str(error).strip().split("\n")[0].split(";")[0][:LONGEST_REASON].rstrip(". !")
    text = text.replace("|", "/").replace("*", "\\*")  # which Markdown would read as its own
    if not isinstance(error, ValueError | AssertionError):
        text = f"{type(error).__name__}: {text}"
    return f"- `{name}`, {column}: {text}."


def replace_section(heading: str, text: str, page: Path = PAGE) -> None:
    """Write the section "## heading" of the page, at the end where the page has no such section.

    A section ends at the next heading of level 1 or 2.

    Args:
        heading: the heading; "" for the text before the first section.
        text: the section without its heading.
        page: the file.

    Raises:
        ValueError: The heading has several lines, or the text holds headings of level 1 or 2.
    """
    if "\n" in heading or heading.startswith("#"):
        raise ValueError(f"the heading is {heading!r}, but must be one line without #")
    lines = text.strip("\n").splitlines()
    body = lines if heading else lines[1:]  # the page's title
    if any(re.match(r"##? ", line) for line in body):
        raise ValueError(
            f"the text of section {heading!r} holds a heading of level 1 or 2; use ### inside a"
            " section"
        )
    introduction, *sections = _split_page(page)
    if heading:
        headings = [_get_heading(section) for section in sections]
        place = headings.index(heading) if heading in headings else len(sections)
        sections[place : place + 1] = [f"## {heading}\n\n{text}"]
    else:
        introduction = text
    parts = [part.strip("\n") for part in (introduction, *sections)]
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def find_section(heading: str, page: Path = PAGE) -> str:
    """The text of a section without its heading; "" where the page has none."""
    for section in _split_page(page)[1:]:
        if _get_heading(section) == heading:
            return section.partition("\n")[2]
    return ""


def _split_page(page: Path) -> list[str]:
    """What comes before the first section, and the sections."""
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    return re.split(r"^(?=## )", old, flags=re.M)


def _get_heading(section: str) -> str:
    return section.split("\n", 1)[0].removeprefix("## ").strip()
