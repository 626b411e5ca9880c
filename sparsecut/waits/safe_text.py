"""Text from anywhere, made safe for a terminal."""

from __future__ import annotations

import re

DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # of text, left or right
CONTROLS = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029{DIRECTIONS}]")
CONTROLS_AND_LINES = re.compile(f"[\t\n]|{CONTROLS.pattern}")


def escape_controls(text: str, *, keep_lines: bool = True) -> str:
    """Make text safe for a terminal: characters that would control it are written as escapes.

    These are the control characters, so all of ANSI's and OSC's sequences, and those that change
    the direction of text or end lines invisibly. Text in files stays as it is.

    Args:
        text: The text, which may come from anywhere.
        keep_lines: Keep line ends and tabs; without it they are escaped too, for cells and labels.
    """
    if keep_lines:
        text = text.replace("\r\n", "\n")
    pattern = CONTROLS if keep_lines else CONTROLS_AND_LINES
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
