"""Facts that every report page must have, read from its HTML."""

import re
import xml.dom.minidom
from html.parser import HTMLParser

SMALLEST_TEXT = 11  # CSS pixels
VOID_TAGS = {"meta", "link", "img", "br"}


class Outline(HTMLParser):
    """Counts the elements of a page, and remembers tables and drawings outside scrolling boxes."""

    def __init__(self, page: str):
        super().__init__()
        self.open_elements: list[tuple[str, str]] = []
        self.counts: dict[str, int] = {}
        self.verdicts: list[str] = []
        self.not_scrolling: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        classes = dict(attributes).get("class") or ""
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag in ("table", "svg") and not any("scroll" in c for _, c in self.open_elements):
            self.not_scrolling.append(tag)
        if "verdict" in classes.split():
            self.verdicts.append("")
        if tag not in VOID_TAGS:
            self.open_elements.append((tag, classes))

    def handle_startendtag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        opened, _ = self.open_elements.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data):
        if self.open_elements and "verdict" in self.open_elements[-1][1].split():
            self.verdicts[-1] += data


def check_page(page: str) -> Outline:
    """Assert what holds for every page, and return its outline."""
    outline = Outline(page)
    assert not outline.open_elements
    assert not outline.not_scrolling
    assert len(outline.verdicts) == 1
    assert outline.verdicts[0].endswith(".")
    assert outline.counts.get("script", 0) == outline.counts.get("link", 0) == 0
    assert not re.search(r'(src|href)="(?!data:|#)', page), "a page needs no other file"
    assert not re.search(r"url\((?!#)", page), "a page needs no other file"
    assert get_font_sizes(page)
    assert min(get_font_sizes(page)) >= SMALLEST_TEXT
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        check_drawing(drawing)
    return outline


def get_font_sizes(page: str) -> list[float]:
    """All sizes of text in a page's styles and drawings, in pixels; other units are refused."""
    declarations = re.findall(r"font(?:-size)?:([^;}\"]+)", page)
    sizes = []
    for declaration in declarations:
        [size] = re.findall(r"([\d.]+)px", declaration)
        sizes.append(float(size))
    return sizes + [float(size) for size in re.findall(r'font-size="([\d.]+)"', page)]


def check_drawing(drawing: str) -> None:
    """Assert that a drawing is well formed, drawn at its own size, and shows something."""
    element = xml.dom.minidom.parseString(drawing).documentElement
    left, top, width, height = element.getAttribute("viewBox").split()
    assert (left, top) == ("0", "0")
    assert float(element.getAttribute("width")) == float(width)
    assert float(element.getAttribute("height")) == float(height)
    assert element.getAttribute("role") == "img"
    assert element.getAttribute("aria-label")
    assert drawing.count("<path") + drawing.count("<rect") > 2
    assert "#010203" not in drawing
