"""Recoveries: a run that loses a learner rank, or its controller, goes on from its last checkpoint by itself.

Each is a line of `recoveries.jsonl` in the run's folder, and `max_recoveries` bounds those within an hour, whichever
process made them. Rollout workers keep their engines when a rank is lost; what they were generating belongs to a
lineage that has ended, and is thrown away.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from rich.markup import escape

from latent_grpo.common.errors import RunError
from latent_grpo.common.metrics import read_metrics
from latent_grpo.deploy.run.session import Run
from latent_grpo.learner.group import RankLost

Result = TypeVar("Result")
FILE = "recoveries.jsonl"
WITHIN_S = 3600.0


@dataclass(frozen=True, slots=True)
class Recovery:
    """A recovery that has begun. `began` is in seconds since 1970."""

    began: float
    cause: str
    lineage: int  # that it makes
    reached: int  # the last step of the lineage that ended


def begin(folder: Path, cause: str, *, lineage: int, limit: int, kind: str = "train") -> Recovery:
    """Records a recovery. `kind` is that of the metrics whose last step counts as reached.

    Raises RunError where `limit` (`max_recoveries`) recoveries have begun within the last hour.
    """
    now, file = time.time(), folder / FILE
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    recent = sum(1 for row in rows if row["began"] > now - WITHIN_S)  # times ahead of a clock that was put back, too
    if recent >= limit:
        raise RunError(
            f"{cause}. The run has recovered {recent} time(s) within an hour, and max_recoveries allows {limit}; "
            f"`latent-grpo train --resume {folder}` continues from the last checkpoint"
        )
    steps = [row["step"] for row in read_metrics(folder, kind=kind)]
    recovery = Recovery(now, cause, lineage, max(steps, default=0))
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(recovery)) + "\n")
    return recovery


def recovered(run: Run, step: int) -> None:
    """Says what a recovery has cost, if one ends here. `step` is the last of the state that the run goes on from."""
    if run.recovery is None:
        return
    lost, seconds = max(run.recovery.reached - step, 0), time.time() - run.recovery.began
    again = f"{lost} step(s) are done again" if lost else "no finished step is lost"
    run.reporter.say(f"[green]recovered within {seconds:.0f} s: the run goes on after step {step}; {again}[/]")
    run.recovery = None


def recovering(run: Run, work: Callable[[], Result], *, kind: str = "train") -> Result:
    """Returns what `work` returns, and does it again from its last state when it loses a rank.

    `work` makes its own learner and closes it. Raises RunError beyond `max_recoveries`.
    """
    while True:
        try:
            return work()
        except RankLost as error:
            limit, lineage = run.config.max_recoveries, run.lineage + 1
            run.recovery = begin(run.folder.path, str(error), lineage=lineage, limit=limit, kind=kind)
            run.reporter.say(f"[yellow]{escape(str(error))}; all ranks start again from the last state[/]")
            run.pool.discard()
            run.next_lineage()
            run.reservation.await_room()
