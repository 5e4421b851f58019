"""The record of a run's recoveries, one line each in `recoveries.jsonl`, and the limit on them.

A run that loses a learner rank (`deploy.run.recovery`) or its controller (`deploy.supervisor`) goes on from its last
checkpoint by itself, at most `max_recoveries` times within an hour, whichever process saw the loss. Needs neither torch
nor Ray.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from latent_grpo.common.errors import MetricsError, RunError
from latent_grpo.common.files import read_text
from latent_grpo.common.metrics import FILE as METRICS
from latent_grpo.common.metrics import read_metrics

FILE = "recoveries.jsonl"
WITHIN_S = 3600.0


@dataclass(frozen=True, slots=True)
class Recovery:
    """A recovery that has begun. `began` is in seconds since 1970."""

    began: float
    cause: str
    lineage: int  # that it makes
    reached: int | None  # the last step of the lineage that ended; None: its metrics are damaged

    def over(self, step: int) -> str:
        """Says what it has cost, now that the run goes on after step `step`."""
        seconds = time.time() - self.began
        if self.reached is None:
            again = "how many steps are done again is unknown, since the metrics are damaged"
        elif self.reached > step:
            again = f"{self.reached - step} step(s) are done again"
        else:
            again = "no finished step is lost"
        return f"recovered within {seconds:.0f} s: the run goes on after step {step}; {again}"


def begin(folder: Path, cause: str, *, lineage: int, limit: int, kind: str = "train") -> Recovery:
    """Records a recovery that makes `lineage`; `kind` is that of the metrics whose last step counts as reached.

    Raises RunError where `limit` (`max_recoveries`) recoveries have begun within the last hour.
    """
    now, file = time.time(), folder / FILE
    try:
        recent = sum(1 for began in _begun(file) if began > now - WITHIN_S)  # also ahead of a clock that was put back
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{cause}, and {file} cannot be read ({error}): the run does not recover") from error
    if recent >= limit:
        raise RunError(
            f"{cause}. The run has recovered {recent} time(s) within an hour, and max_recoveries allows {limit}; "
            f"`latent-grpo train --resume {folder}` continues from the last checkpoint"
        )
    reached: int | None = 0
    if (folder / METRICS).exists():  # else no step has ended yet
        try:
            reached = max((int(row["step"]) for row in read_metrics(folder, kind=kind)), default=0)
        except MetricsError:  # damage that the resume will name, or put up with
            reached = None
    recovery = Recovery(now, cause, lineage, reached)
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(recovery)) + "\n")
    except OSError as error:
        raise RunError(f"{cause}, and {file} cannot be written ({error.strerror}): the run does not recover") from error
    return recovery


def _begun(file: Path) -> Iterator[float]:
    """Yields when the recorded recoveries began; a torn line (the disk was full) is left out."""
    for line in read_text(file).splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            yield float(json.loads(line)["began"])
