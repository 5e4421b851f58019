"""Progress of long phases: a bar with pace and remaining time on a terminal, a line every 15 seconds in a log."""

from __future__ import annotations

import contextlib
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from latent_grpo.common import main_loop
from latent_grpo.common.secrets import redacted
from latent_grpo.common.terminal_text import TextConsole, visible

WHOLE_LINE = re.compile(r"\[(yellow|red|green)\](.*)\[/\]", re.DOTALL)
LOG_EVERY_S = 15.0
RECENT_S = 120.0  # the pace is that of the last two minutes, or of the last RECENT advances if they took longer
RECENT = 8
Advance = Callable[..., None]
"""Called as `advance(completed, note="")`; a fraction is the share of the running step that is done."""


class LastingConsole(TextConsole):
    """A console that stops printing when its reader is gone (Ctrl-C also ends `| tee log`), so a run can still save."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


@dataclass(slots=True)
class Pace:
    """The pace of a phase and the time that it still takes, from its whole steps, however long each of them is.

    `total` steps, called `unit` (a plural). `now()` is a clock in seconds.
    """

    total: int
    unit: str
    now: Callable[[], float] = time.monotonic
    done: float = 0.0
    note: str = ""
    _whole: deque[tuple[float, int]] = field(default_factory=deque)  # (when, steps) of the advances that count

    def advance(self, completed: float, note: str = "") -> None:
        """Notes that `completed` steps are done. The first call says how many were done before the phase."""
        self.done, self.note = completed, note
        if not self._whole or int(completed) > self._whole[-1][1]:
            self._whole.append((self.now(), int(completed)))
        while len(self._whole) > RECENT + 1 and self._whole[-1][0] - self._whole[1][0] > RECENT_S:
            self._whole.popleft()

    @property
    def seconds_each(self) -> float | None:
        """Seconds that a step takes; None before one has been taken."""
        if len(self._whole) < 2:
            return None
        (began, before), (ended, after) = self._whole[0], self._whole[-1]
        return (ended - began) / (after - before)

    @property
    def left_s(self) -> float | None:
        """Seconds until the phase ends; None before a step has been taken."""
        each = self.seconds_each
        if each is None:
            return None
        ended, after = self._whole[-1]
        return max((self.total - after) * each - (self.now() - ended), 0.0)

    @property
    def rate(self) -> str:
        """`12 steps/s`, `43 s/step` or `2.1 min/step`; empty before a step has been taken."""
        each = self.seconds_each
        if each is None:
            return ""
        if each <= 1:
            return f"{1 / max(each, 1e-9):,.3g} {self.unit}/s"
        return f"{duration(each)}/{self.unit.removesuffix('s')}"

    @property
    def left(self) -> str:
        """The time that is left, in words; empty where it is not known or nothing is left."""
        left = self.left_s
        return "" if left is None or self.done >= self.total else f"{duration(left)} left"


def duration(seconds: float) -> str:
    """A duration in the unit that suits it: `8.2 s`, `43 s`, `2.1 min`, `3.4 h`."""
    for limit, size, unit in ((100, 1, "s"), (6_000, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.{int(seconds < 10 * size)}f} {unit}"
    return f"{seconds / 3600:.1f} h"


def end_of(seconds: float, now: datetime | None = None) -> str:
    """The local time in `seconds` from now: `14:32`, or `Nov 29 03:10` on another day."""
    now = now or datetime.now()
    end = now + timedelta(seconds=seconds)
    return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%b %d %H:%M}"


class StepShare:
    """How much of a running step is done. The parts of a step weigh what they took in the step before.

    A part says how much of it is done; of one that cannot (`None`) it follows from the time. Before a first step is
    done nothing is known, and the share is 0.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._took: dict[str, float] = {}  # part -> seconds, in the order of a step
        self._part, self._began = "", 0.0

    def learn(self, **seconds: float) -> None:
        """Notes what the parts of a step that is done took, in their order."""
        self._took, self._part = seconds, ""

    def at(self, part: str, share: float | None) -> tuple[float, str]:
        """Returns the share of the step that is done, below 1, and a note: `learner 12 s`, `rollout 40%`."""
        if part != self._part:
            self._part, self._began = part, self._now()
        elapsed, parts = self._now() - self._began, list(self._took)
        note = f"{part} {duration(elapsed)}" if share is None else f"{part} {share:.0%}"
        if part not in parts or not sum(self._took.values()):
            return 0.0, note
        whole = self._took[part]
        within = min(elapsed, whole) if share is None else share * whole
        before = sum(self._took[name] for name in parts[: parts.index(part)])
        return min((before + within) / sum(self._took.values()), 0.99), note


def first_step_line(
    name: str, seconds: float, left: int, parts: Mapping[str, float], now: datetime | None = None
) -> str:
    """Says what the first step took, in all and in its `parts`, and when `left` more of them will have ended."""
    shares = ", ".join(f"{part} {duration(of_part)}" for part, of_part in parts.items())
    shares = f" ({shares})" if shares else ""
    if not left:
        return f"{name}: the step took {duration(seconds)}{shares}"
    end = f"{duration(left * seconds)}, until {end_of(left * seconds, now)}"
    return f"{name}: the first step took {duration(seconds)}{shares}; {left:,} more at this pace take {end}"


class Reporter:
    """The output of a run: `say` prints a line, and `phase` shows the progress of a long piece of work.

    `now()` is the clock of the progress, in seconds.
    """

    def __init__(self, console: Console | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self.console = console or LastingConsole(highlight=False, soft_wrap=True)
        self._now = now

    def say(self, text: str) -> None:
        """Prints lines as plain text; `[yellow]...[/]` around the whole, or red or green, is their colour.

        Whatever data they quote is text: neither markup nor a control sequence for the terminal. Secrets are redacted.
        """
        main_loop.passed()
        whole = WHOLE_LINE.fullmatch(text)
        style, shown = (whole[1], redacted(whole[2])) if whole else ("", redacted(text))
        self.console.print(Text("\n".join(map(visible, shown.split("\n"))), style))

    @contextlib.contextmanager
    def phase(self, name: str, total: int, unit: str = "steps") -> Iterator[Advance]:
        """Shows the progress of `total` steps, called `unit`, while the block runs."""
        shown = self._bar if self.console.is_terminal else self._lines
        with shown(name, Pace(total, unit, self._now)) as advance:
            yield advance

    @contextlib.contextmanager
    def _bar(self, name: str, pace: Pace) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description:<14}", markup=False),
            BarColumn(bar_width=24),
            _PaceColumn(pace),
            TimeElapsedColumn(),
            _LeftColumn(pace),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=pace.total, note="")

            def advance(completed: float, note: str = "") -> None:
                main_loop.passed()
                pace.advance(completed, note)
                progress.update(task, completed=completed, note=note)

            yield advance

    @contextlib.contextmanager
    def _lines(self, name: str, pace: Pace) -> Iterator[Advance]:
        started = shown = self._now()
        self.say(f"{name}: {pace.total:,} {pace.unit}")

        def advance(completed: float, note: str = "") -> None:
            nonlocal shown
            main_loop.passed()
            pace.advance(completed, note)
            now = self._now()
            if now - shown < LOG_EVERY_S and completed < pace.total:
                return
            shown = now
            parts = (f"{int(completed):,}/{pace.total:,}", pace.rate, pace.left, note)
            self.say(f"{name}: {' · '.join(part for part in parts if part)}")

        yield advance
        self.say(f"{name}: done after {duration(self._now() - started)}")


class _PaceColumn(ProgressColumn):
    """Steps done, of all, and their pace."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed):,}/{self._pace.total:,} {self._pace.rate}".rstrip())


class _LeftColumn(_PaceColumn):
    """The time that is left, which also falls while a long step runs."""

    def render(self, task: Task) -> Text:
        return Text(self._pace.left)
