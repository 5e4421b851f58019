"""Text that a model or a data set wrote, made safe to print: a terminal obeys control characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_JOINERS = "\u200c\u200d"  # ordinary in Persian, Hindi and emoji; they neither control nor reorder


class TextConsole(Console):
    """The console of every command: what it prints is text, whoever wrote it.

    Strings hold no markup unless a call says `markup=True`, and no control character reaches the terminal.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Returns rich's text of a string, such as a table's cell, made safe before rich measures and wraps it."""
        kept = "\n\t"  # rich breaks lines at one and expands the other
        return super().render_str("".join(c if c in kept else visible(c) for c in text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields rich's segments; those that move its own cursor stay as they are.

        What came as a `Text` is laid out by now, so a character takes one column: a cell with more would be cut.
        """
        for text, style, control in super().render(renderable, options):
            if not (control or text.isprintable()):
                text = "".join(c if c == "\n" else _in_one_column(visible(c)) for c in text)
            yield Segment(text, style, control)


def visible(text: str) -> str:
    """Makes a model's text safe for a terminal and readable in one line.

    Control characters, and those that reorder text, are shown as symbols and never sent.
    """
    return "".join(c if c in _JOINERS else _visible_character(c) for c in text)


def visible_token(text: str) -> str:
    """Makes a single token safe and its spaces visible."""
    return "".join(map(_visible_character, text)).replace(" ", "␣") or "∅"


def _in_one_column(symbol: str) -> str:
    return symbol if len(symbol) == 1 else "\ufffd"


def _visible_character(c: str) -> str:
    if c == "\n":
        return "⏎"
    if c == "\t":
        return "⇥"
    if ord(c) < 0x20:
        return chr(0x2400 + ord(c))
    if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨{ord(c):04X}⟩"
    return c
