"""Progress of long phases: a bar with rate and remaining time on a terminal, a line every 15 seconds in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_EVERY_S = 15.0
Advance = Callable[..., None]
"""Called as `advance(completed, note="")`."""


class LastingConsole(Console):
    """A console that stops printing when its reader is gone (Ctrl-C also ends `| tee log`), so a run can still save."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class Reporter:
    """The output of a run: `say` prints a line, and `phase` shows the progress of a long piece of work."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or LastingConsole(highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text)

    @contextlib.contextmanager
    def phase(self, name: str, total: int, unit: str = "steps") -> Iterator[Advance]:
        shown = self._bar if self.console.is_terminal else self._lines
        with shown(name, total, unit) as advance:
            yield advance

    @contextlib.contextmanager
    def _bar(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        started = time.monotonic()
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total, note="", rate="")
            first: list[int] = []

            def advance(completed: int, note: str = "") -> None:
                first.append(completed) if not first else None
                progress.update(task, completed=completed, note=note, rate=_rate(completed - first[0], started, unit))

            yield advance

    @contextlib.contextmanager
    def _lines(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        started = shown = time.monotonic()
        first: list[int] = []
        self.say(f"{name}: {total:,} {unit}")

        def advance(completed: int, note: str = "") -> None:
            nonlocal shown
            first.append(completed) if not first else None
            now = time.monotonic()
            if now - shown < LOG_EVERY_S and completed < total:
                return
            shown = now
            done = completed - first[0]
            left = (now - started) / done * (total - completed) if done else 0.0
            rate = _rate(done, started, unit)
            self.say(f"{name}: {completed:,}/{total:,} · {rate} · {left:,.0f} s left" + (f" · {note}" if note else ""))

        yield advance
        self.say(f"{name}: done after {time.monotonic() - started:,.1f} s")


def _rate(done: int, started: float, unit: str) -> str:
    return f"{done / max(time.monotonic() - started, 1e-9):.3g} {unit}/s"
