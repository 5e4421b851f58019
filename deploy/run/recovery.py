"""Recovery from the loss of a learner rank, within the process that runs the loop.

Rollout workers keep their engines; what they were generating belongs to a lineage that has ended, and is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from latent_grpo.common.errors import RayLost
from latent_grpo.deploy.run import link, recoveries
from latent_grpo.deploy.run.session import Run
from latent_grpo.learner.group import RankLost

Result = TypeVar("Result")


def recovering(run: Run, work: Callable[[], Result]) -> Result:
    """Returns what `work` returns, and does it again from its last state when it loses a rank.

    `work` makes its own learner and closes it. Raises RunError beyond `max_recoveries`.
    """
    while True:
        try:
            return work()
        except RankLost as error:
            limit, lineage = run.config.max_recoveries, run.lineage + 1
            run.recovery = recoveries.begin(run.folder.path, str(error), lineage=lineage, limit=limit)
            run.reporter.say(f"[yellow]{error!s}; all ranks start again from the last state[/]")
            run.pool.discard()
            run.next_lineage()
            run.reservation.await_room()
        except RayLost as error:
            link.tell(crashed=f"has lost its Ray: {error}")  # now: to leave a Ray that is stuck may take for ever
            raise


def recovered(run: Run, step: int) -> None:
    """Says what a recovery has cost, if one ends here. `step` is the last of the state that the run goes on from."""
    if run.recovery is not None:
        run.reporter.say(f"[green]{run.recovery.over(step)}[/]")
        run.recovery = None
