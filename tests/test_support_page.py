"""docs/support.md is written by several commands, and none touches what another wrote."""

import pytest
from helpers.benchmark_modules import import_benchmark

grid = import_benchmark("grid")
support_page = import_benchmark("support_page")
find_section, replace_section = support_page.find_section, support_page.replace_section


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


def test_rows_that_are_measured_again_leave_the_others_as_they_are(tmp_path):
    page = tmp_path / "page.md"
    section = grid.SECTIONS[1]
    width = 1 + len(section.columns)
    rows = {
        "qwen2": grid.Row(["yes"] * width, []),
        "llama": grid.Row(["yes", "no"] + ["yes"] * (width - 2), ["- `llama`, gradients: none."]),
        "gone": grid.Row(["yes"] * width, []),
    }
    grid.write_section(section, rows, page)
    again = grid.read_rows(section, page)
    assert again == {name: rows[name] for name in ("llama", "qwen2")}
    again["llama"] = grid.Row(["yes"] * width, [])
    grid.write_section(section, again, page)
    text = find_section(section.heading, page)
    assert "2 of 2 families" in text and "- `llama`" not in text
    assert text.index("`llama`") < text.index("`qwen2`")
    page.write_text(page.read_text().replace(grid.VERSIONS["torch"], "1.0"))
    with pytest.raises(SystemExit, match=r"grid\.py decoders"):
        grid.read_rows(section, page)
