"""docs/support.md is written by several commands, and none touches what another wrote."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from support_page import replace_section


def test_a_section_is_replaced_where_it_stands_and_added_where_it_is_missing(tmp_path):
    page = tmp_path / "page.md"
    for heading, text in (
        ("A", "one\n"),
        ("B", "two\n\n### inside\n"),
        ("", "# Title\n\nwords"),
        ("A", "ONE"),
    ):
        replace_section(heading, text, page)
    assert page.read_text() == "# Title\n\nwords\n\n## A\n\nONE\n\n## B\n\ntwo\n\n### inside\n"
    replace_section("B", "TWO", page)
    replace_section("C", "three", page)
    assert page.read_text() == "# Title\n\nwords\n\n## A\n\nONE\n\n## B\n\nTWO\n\n## C\n\nthree\n"


@pytest.mark.parametrize(
    ("heading", "text"), [("## A", "one"), ("A\nB", "one"), ("A", "one\n## B\ntwo")]
)
def test_headings_that_would_break_the_page_are_refused(tmp_path, heading, text):
    with pytest.raises(ValueError, match="heading"):
        replace_section(heading, text, tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()
