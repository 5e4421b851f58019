"""The errors that end a command with one line instead of a traceback. All of them derive from one base class."""

from __future__ import annotations

import re
from typing import ClassVar

_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def one_line(text: str) -> str:
    """Returns a text in one line: what would break it, in the name of a file or a task, is shown escaped (`\\n`)."""
    return _BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class LatentGRPOError(Exception):
    """An expected error. The message says what was received, what is allowed and what to do.

    Each text that it is made with is one line of the message: `ConfigError(*faults)` has a line for every fault.
    """

    exit_code: ClassVar[int] = 1
    """Exit code of the command that the error ends: 1 for a failure of a run, 2 for a fault in the user's input.

    A place that the command names and that cannot be written (`--output`, `--to`, `runs_folder`) is input.
    """

    def __str__(self) -> str:
        lines = self.args if all(isinstance(line, str) for line in self.args) else (super().__str__(),)
        return "\n".join(map(one_line, lines))


class ConfigError(LatentGRPOError, ValueError):
    """A setting, a file or an argument that cannot work. The message says what to change."""

    exit_code = 2


class RunError(LatentGRPOError, RuntimeError):
    """A run that cannot continue. The message names the part that failed and what to do."""


class MetricsError(RunError):
    """A metric sink that cannot work, or a record that cannot be written."""


class RayLost(RunError):
    """The Ray that a run works with is gone or stuck. Another process may go on from the run's last checkpoint."""
