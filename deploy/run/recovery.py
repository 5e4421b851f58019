"""Recovery from the loss of a learner rank, within the process that runs the loop.

Rollout workers keep their engines; what they were generating belongs to a lineage that has ended, and is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from latent_grpo.common.errors import ConfigError, RayLost, RunError
from latent_grpo.common.interrupts import interrupt_left
from latent_grpo.deploy.run import link, recoveries
from latent_grpo.deploy.run.session import Run
from latent_grpo.learner.group import RankLost

Result = TypeVar("Result")


def recovering(run: Run, work: Callable[[], Result], *, kind: str = "train") -> Result:
    """Returns what `work` returns, and does it again from its last state when it loses a rank.

    `work` makes its own learner and closes it; `kind` is that of the metrics of its steps. Raises RunError beyond
    `max_recoveries`, and the interrupt that came before the loss: a run that is to end does not recover.
    """
    while True:
        try:
            return work()
        except RankLost as error:
            if (interrupt := interrupt_left()) is not None:
                run.reporter.say(f"[red]{error}[/]")
                raise interrupt from error
            limit, lineage, before = run.config.max_recoveries, run.lineage + 1, run.recovery
            now = recoveries.begin(run.folder.path, str(error), lineage=lineage, limit=limit, kind=kind)
            run.recovery = now if before is None else replace(before, lineage=lineage)  # one that is not over goes on
            run.reporter.say(f"[yellow]{error!s}; all ranks start again from the last state[/]")
            run.pool.discard()
            run.next_lineage()
            try:
                run.reservation.await_room()
            except ConfigError as lacking:
                raise RunError(str(lacking)) from error
            except RayLost as lost:
                _tell(lost)
                raise
        except RayLost as lost:
            _tell(lost)
            raise


def _tell(lost: RayLost) -> None:
    """Tells the supervisor now: to leave a Ray that is stuck may take for ever."""
    link.tell(crashed=f"has lost its Ray: {lost}")


def recovered(run: Run, step: int) -> None:
    """Says what a recovery has cost, if one ends here. `step` is the last of the state that the run goes on from."""
    if run.recovery is not None:
        run.reporter.say(f"[green]{run.recovery.over(step)}[/]")
        run.recovery = None
