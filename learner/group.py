"""The driver's side of a learner's ranks, which are Ray actors: one call for all of them, a deadline on every wait.

A rank that dies breaks the process group of all ranks, so no call is retried: the error names the rank, and the run
starts all ranks again from its last checkpoint (`deploy.train`).
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from latent_grpo.common import main_loop
from latent_grpo.common.config import RunConfig, config_as_json
from latent_grpo.common.errors import ConfigError, RunError
from latent_grpo.common.interrupts import check_interrupt
from latent_grpo.common.ray_calls import alive_nodes, put_within
from latent_grpo.common.ray_errors import NO_PROCESS, in_short
from latent_grpo.common.seen_time import SeenTime
from latent_grpo.common.stacks import ProcessAddress, ask_for_stacks
from latent_grpo.common.transport import choose_transport
from latent_grpo.common.weights import Publication
from latent_grpo.learner.base_rank import RankActor
from latent_grpo.learner.state import LearnerStateMismatch

log = logging.getLogger(__name__)
SHOWN = 4  # ranks whose stacks are shown; in a collective all late ranks look alike
LOOKED_AT_EVERY_S = 1.0  # how often a wait looks, so that time in which the driver is stopped does not count
BESIDE = "beside"  # the group of calls that run while a step goes on
VERDICT_S, VERDICT_ANSWER_S = 30.0, 5.0  # for Ray to find out that a node is gone, and for one question
PEER_DEATH_S = 15.0  # a survivor's broken collective is often reported before the death that caused it


class LearnerError(RunError):
    """The learner cannot continue because a rank died, raised or missed its deadline."""


class RankLost(LearnerError):
    """A rank died or does not answer. Ranks that are started again may do the same work with success."""


class RankLate(RankLost):
    """A rank did not answer within its deadline."""


class RankGroup:
    """All ranks of a learner, each a Ray actor of `rank_class`. Steps run in the background, one at a time.

    `places` are Ray scheduling strategies, one a rank; without them Ray takes any node.
    """

    def __init__(
        self, rank_class: type[RankActor], config: RunConfig, model_folder: str | Path, places: Sequence[Any] = ()
    ):
        self.config = config
        self._step: tuple[list[ray.ObjectRef[Any]], SeenTime] | None = None
        self._published: Publication | None = None  # of the weights that the ranks hold
        self._alive: list[weakref.ref[Publication]] = []  # that may still be sent
        self.transport = choose_transport(config.weights, alive_nodes())
        learner, resources = config.learner, config.learner.resources
        device = {"OMP_NUM_THREADS": str(resources.threads), **config.weights.environment}
        if learner.device == "cpu" or not resources.num_gpus:
            device["DS_ACCELERATOR"] = "cpu"
        # Ray's own types know neither a class that comes as a value nor this option
        actor: Any = ray.remote(concurrency_groups={BESIDE: 1})(rank_class)  # type: ignore[call-overload]
        options = {
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "resources": resources.custom or None,
            "runtime_env": {"env_vars": device},
            "max_restarts": 0,
        }
        strategies = places or ["DEFAULT"] * learner.ranks
        self._ranks: list[Any] = [actor.options(**options, scheduling_strategy=s).remote() for s in strategies]
        self._processes: list[ProcessAddress] = []
        try:
            asked = [rank.whereabouts.remote() for rank in self._ranks]
            self._processes = self._wait(asked, config.deadlines.place_s, "start", "deadlines.place_s")
            (address, port), *_ = self._wait(
                [r.address.remote() for r in self._ranks], config.deadlines.start_s, "start", "deadlines.start_s"
            )
            text, world = config_as_json(config), learner.ranks
            setups = [
                rank.setup.remote(index, world, address, port, text, str(model_folder))
                for index, rank in enumerate(self._ranks)
            ]
            self._wait(setups, config.deadlines.start_s, "load the model", "deadlines.start_s")
        except BaseException as error:  # also for an interrupt: no half-started group may remain
            self.close()
            if isinstance(error, RankLate):  # another start would be as late
                raise LearnerError(str(error)) from error
            raise

    def process_ids(self) -> list[int]:
        """The process id of each rank on its node, for monitoring."""
        return [process.pid for process in self._processes]

    # -- the step

    def _begin(self, method: str, *arguments: object) -> None:
        """Starts a step on every rank and returns at once."""
        if self._step is not None:
            raise LearnerError(f"{method} started before the last step was finished; call finish_step first")
        self._published = None
        refs = [getattr(rank, method).remote(*arguments) for rank in self._ranks]
        self._step = refs, SeenTime()

    def _put(self, value: object) -> ray.ObjectRef[Any]:
        """Puts inputs of a call into the object store."""
        return put_within(value, self.config.deadlines.learner_s, "deadlines.learner_s")

    def finished(self) -> bool:
        """Whether the step is done or has failed; never waits. A missed deadline counts as failed."""
        refs, clock = self._running()
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        late = clock.look(LOOKED_AT_EVERY_S) > self.config.deadlines.learner_s
        return len(ready) == len(refs) or late or any(map(_failed, ready))

    def _finish(self) -> list[Any]:
        """Waits for the step and returns every rank's report."""
        refs, clock = self._running()
        try:
            return self._wait(refs, self.config.deadlines.learner_s, "train", "deadlines.learner_s", clock)
        finally:
            self._step = None

    def _running(self) -> tuple[list[ray.ObjectRef[Any]], SeenTime]:
        if self._step is None:
            raise LearnerError("no step was started; call start_step first")
        return self._step

    # -- weights and state

    def publish(self, version: int) -> Publication:
        """Publishes the current weights by the run's transport; those that are published already are not sent again.

        They live as long as rank 0 and a reference to the publication in this process.
        """
        if self._published is None:
            self._alive = [known for known in self._alive if known() is not None]
            publications = [known() for known in self._alive]
            kept = {handle for p in publications if p is not None for handle in p.buckets}
            refs = [rank.publish.remote(version, self.transport.name, tuple(kept)) for rank in self._ranks]
            self._published = self._wait(refs, self.config.deadlines.weights_s, "publish", "deadlines.weights_s")[0]
        published = self._published.of_version(version)
        self._alive.append(weakref.ref(published))
        return published

    def save(self, folder: str | Path) -> None:
        """Writes every rank's state below `folder`, which all ranks must see."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._all("save", str(folder))

    def copy_state(self) -> Callable[[Path], None]:
        """Copies the state into the ranks' memory; returns a function that writes the copy below a folder.

        It may be called in another thread, once and before the next copy, while the ranks take further steps.
        """
        self._all("copy_state")
        ranks = list(self._ranks)

        def write(folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            refs = [rank.write_copy.options(concurrency_group=BESIDE).remote(str(folder)) for rank in ranks]
            self._wait(refs, self.config.deadlines.learner_s, "write its state", "deadlines.learner_s")

        return write

    def load(self, folder: str | Path) -> None:
        self._published = None
        self._all("load", str(folder))

    def export(self, folder: str | Path) -> None:
        """Writes the policy as a Hugging Face model folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._all("export", str(folder))

    def close(self) -> None:
        """Ends the ranks; may be called twice."""
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []

    def _all(self, method: str, *arguments: object) -> list[Any]:
        refs = [getattr(rank, method).remote(*arguments) for rank in self._ranks]
        return self._wait(refs, self.config.deadlines.learner_s, method, "deadlines.learner_s")

    def _wait(
        self, refs: list[ray.ObjectRef[Any]], seconds: float, doing: str, key: str, clock: SeenTime | None = None
    ) -> list[Any]:
        """Returns the results of all ranks. The first failure ends the wait, since others may hang in a collective.

        `clock` has measured what of the `seconds` is over.
        """
        clock, pending = clock or SeenTime(), list(refs)
        while pending:
            left = max(seconds - clock.seconds, 0.0)
            ready, pending = ray.wait(pending, timeout=min(left, LOOKED_AT_EVERY_S))
            if not ready and clock.look(LOOKED_AT_EVERY_S) <= seconds and left:
                continue
            if not ready:
                late = [index for index, ref in enumerate(refs) if ref in pending]
                shown = late[:SHOWN] if self._processes else []
                for index, stacks in zip(shown, ask_for_stacks([self._processes[i] for i in shown]), strict=True):
                    log.error("learner rank %d, which had to %s: %s", index, doing, stacks)
                needs = self.config.learner.resources
                raise RankLate(
                    f"learner rank(s) {late} did not {doing} within {seconds:g} s ({key})"
                    + ("" if self._processes else f"; each needs {needs.num_cpus:g} CPU and {needs.num_gpus:g} GPU, ")
                    + ("" if self._processes else f"free in the cluster: {_free()}; {NO_PROCESS}")
                )
            if error := _failed(ready[0]):
                cause = getattr(error, "cause", None)
                if isinstance(cause, ConfigError) and not isinstance(cause, LearnerStateMismatch):
                    # a setting that the rank's node cannot have
                    raise ConfigError(f"learner rank {refs.index(ready[0])}: {cause}") from error
                raise self._explained(refs, doing, refs.index(ready[0]), error) from error
        return ray.get(refs, timeout=60)

    def _explained(self, refs: list[ray.ObjectRef[Any]], doing: str, rank: int, error: Exception) -> LearnerError:
        """Names the dead rank behind a survivor's error, if it is reported before all calls end or `PEER_DEATH_S`."""
        end, pending = time.monotonic() + PEER_DEATH_S, list(refs)
        while pending and isinstance(error, RayTaskError):
            ready, pending = ray.wait(pending, timeout=max(end - time.monotonic(), 0.0))
            if not ready:
                break
            other = _failed(ready[0])
            if other is not None and not isinstance(other, RayTaskError):
                rank, error = refs.index(ready[0]), other
        error = self._verdict(rank, error)
        if not isinstance(error, RayTaskError):  # its process, its node or what it has returned is gone
            return RankLost(f"learner rank {rank} died while it had to {doing}: {in_short(error)}")
        return LearnerError(f"learner rank {rank} failed to {doing}: {in_short(error)}")

    def _verdict(self, rank: int, error: Exception) -> Exception:
        """Returns what Ray knows in the end of a rank that does not answer.

        Until then it would give the next rank a place on a node that is gone.
        """
        end = time.monotonic() + VERDICT_S
        while isinstance(error, ActorUnavailableError) and time.monotonic() < end:
            time.sleep(LOOKED_AT_EVERY_S)
            check_interrupt()
            main_loop.passed()
            try:
                ray.get(self._ranks[rank].whereabouts.remote(), timeout=VERDICT_ANSWER_S)
                break  # it answers again, and has lost its step
            except RayActorError as now:
                error = now
            except RayError as late:
                log.debug("learner rank %d does not answer: %s", rank, late)
        return error


def _failed(ref: ray.ObjectRef[Any]) -> Exception | None:
    """Returns the error of a finished call, or None."""
    try:
        ray.get(ref, timeout=60)
    except RayError as error:
        return error
    return None


def _free() -> str:
    return ", ".join(f"{name} {ray.available_resources().get(name, 0):g}" for name in ("CPU", "GPU"))
