"""Text that a model or a data set wrote, made safe to print: a terminal obeys control characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment


class TextConsole(Console):
    """The console of every command: what it prints is text, whoever wrote it.

    Strings hold no markup unless a call says `markup=True`, and no control character reaches the terminal.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields rich's segments; those that move its own cursor stay as they are."""
        for text, style, control in super().render(renderable, options):
            if not (control or text.isprintable()):
                text = "\n".join(map(visible, text.split("\n")))
            yield Segment(text, style, control)


def visible(text: str) -> str:
    """Makes a model's text safe for a terminal and readable in one line.

    Control characters, and those that reorder text, are shown as symbols and never sent.
    """
    return "".join(_visible_character(c) for c in text)


def visible_token(text: str) -> str:
    """Makes a single token safe and its spaces visible."""
    return visible(text).replace(" ", "␣") or "∅"


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
