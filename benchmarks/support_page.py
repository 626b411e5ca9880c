"""docs/support.md, which several commands write: each replaces its own level-2 sections and leaves
the others alone.
"""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "support.md"


def replace_section(heading: str, text: str, page: Path = PAGE) -> None:
    """Write `text` (without its heading) as the section "## heading" of the page, at the end where
    the page lacks it.

    A section ends at the next heading of level 1 or 2. heading "": what stands before the first
    section. Raises ValueError for a heading that is more than one line, or for text with headings
    of these levels after its first line.
    """
    if "\n" in heading or heading.startswith("#"):
        raise ValueError(f"the heading is {heading!r}, but must be one line of words without #")
    lines = text.strip("\n").splitlines()
    if any(re.match(r"##? ", line) for line in lines[0 if heading else 1 :]):
        raise ValueError(
            f"the text of section {heading!r} holds a heading of level 1 or 2; use ### inside a"
            " section"
        )
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    introduction, *sections = re.split(r"^(?=## )", old, flags=re.M)
    if not heading:
        introduction = text
    else:
        new = f"## {heading}\n\n{text}"
        names = [section.split("\n", 1)[0].removeprefix("## ").strip() for section in sections]
        place = names.index(heading) if heading in names else len(sections)
        sections[place : place + 1] = [new]
    parts = [part.strip("\n") for part in (introduction, *sections)]
    page.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
