"""The rollout pool, the driver's side of the workers: dispatch, weights, health, replacement and scaling.

    wanted ──► starting (no place yet) ──► starting (makes its engine) ──► serves ──► leaves
                     ▲                              │ fails                  │ is lost
                     └──────── started again ◄──────┴────────────────────────┘

`poll` is the only place that waits, and it waits for all workers together: groups, weight updates, heartbeats and
starts. So a start or a loss never holds up the workers that are well. Groups that a lost worker had not delivered are
dispatched again, so losing a worker costs only throughput; the buffer recognises a group that arrives twice.

A group waits in the pool until a worker has room for it, so that a worker that joins finds work at once. A worker
that joins gets the current publication before its first group, so it never samples on old weights.

Every wait has a deadline, measured by a clock that runs only while the driver looks (`common.seen_time`). A worker that
misses one is killed and replaced; `rollout.max_restarts` bounds how often within an hour.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import ObjectLostError, OwnerDiedError, RayActorError, RayError

from latent_grpo.common.config import ConfigError, DeadlineConfig, RolloutConfig
from latent_grpo.common.errors import RunError
from latent_grpo.common.interrupts import check_interrupt
from latent_grpo.common.ray_calls import ensure_own_node
from latent_grpo.common.ray_errors import NO_PROCESS, NODE_GONE, UNAVAILABLE, in_short, made_badly
from latent_grpo.common.schema import groups_of
from latent_grpo.common.seen_time import SeenTime
from latent_grpo.common.shared_memory import BucketGone
from latent_grpo.common.stacks import ProcessAddress, ask_for_stacks
from latent_grpo.common.types import GroupRequest
from latent_grpo.common.weights import Publication
from latent_grpo.rollout_workers.engine import RequestRefused
from latent_grpo.rollout_workers.loan import Loan
from latent_grpo.rollout_workers.member import Member, Starting, WorkerActor
from latent_grpo.rollout_workers.worker import RolloutWorker

logger = logging.getLogger(__name__)

SHOWN = 4  # workers whose stacks are shown at once
INTERRUPT_POLL_S = 0.5  # seconds between checks for an interrupt
AHEAD = 1.25  # samples given to a worker, in multiples of those that it decodes side by side
RESTARTS_WITHIN_S = 3600.0
TOGETHER_S = 60.0  # within which the workers of a lost node are missed
LONGEST_PAUSE_S = 30.0  # before another attempt to start a worker
DEATHS_AT_START = 3  # of processes, one after another and before any worker served: the next one would die too
ANSWER_S = 60.0  # for Ray to hand over what has arrived


class RolloutPoolError(RunError):
    """The pool cannot continue; the message names the stage, the worker and its last event."""


class RolloutPool:
    """A pool of workers made by `factory(name)`, which runs inside the actor. Use it as a context manager.

    `places` are Ray scheduling strategies of reserved places, which workers take first. The pool begins once
    `rollout.min_workers` serve; the others join later. With `wait` false it returns while all of them start, and
    :meth:`begin` waits. `on_poll` is called with every poll and may resize the pool.
    """

    def __init__(
        self,
        factory: Callable[[str], RolloutWorker],
        config: RolloutConfig,
        deadlines: DeadlineConfig,
        *,
        places: Sequence[Any] = (),
        env_vars: dict[str, str] | None = None,
        heartbeat_s: float = 2.0,
        clock: SeenTime | None = None,
        on_poll: Callable[[RolloutPool], None] = lambda pool: None,
        wait: bool = True,
    ):
        resources = config.resources
        self._actor_class: Any = ray.remote(WorkerActor)  # Ray's own types lose it here
        self._actor_options = {
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "resources": resources.custom or None,
            "max_concurrency": 8,  # results, a heartbeat, and updates that wait for their bytes
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(resources.threads), **(env_vars or {})}},
        }
        self._factory, self._config, self._deadlines = factory, config, deadlines
        self._places, self._heartbeat_s, self._clock = places, heartbeat_s, clock or SeenTime()
        self._names = (f"worker-{i}" for i in itertools.count())
        self._starting: dict[str, Starting] = {}
        self._members: dict[str, Member] = {}
        self._publication: Publication | None = None
        self._waiting: deque[GroupRequest] = deque()  # until a worker has room for them
        self._loan: Loan | None = None
        self._lost_at: deque[float] = deque()  # within the last hour, by the machine's clock
        self._failed_starts = 0  # since a worker was last started with success
        self._start_again_at = 0.0  # by the pool's clock
        self._on_poll = on_poll
        self._busy_before = 0.0  # seconds that workers have worked that are gone
        self._weights_s = 0.0
        self._enough_at = 0.0  # when the pool last had `min_workers`, by its clock
        self._node_seen_at = 0.0  # when this process' node was last asked for, by the pool's clock
        self._wanted = config.workers
        self._served = False  # a worker has served: others can
        self._nodes_lost: dict[str, float] = {}  # when a first worker's loss was counted, by the pool's clock
        self.restarts = 0
        try:
            self._start_missing()
            if wait:
                self.begin()
        except BaseException:  # also for an interrupt: no half-started worker may remain
            self.close()
            raise

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """The number of workers that serve."""
        return sum(1 for member in self._members.values() if not member.leaving)

    @property
    def wanted(self) -> int:
        """The number of workers that are to serve; the pool starts what is missing."""
        return self._wanted

    @property
    def busy_s(self) -> float:
        """Seconds that all workers of this pool have worked so far, together, as their last heartbeats say."""
        return self._busy_before + sum(m.status.busy_s for m in self._members.values() if m.status is not None)

    @property
    def weights_s(self) -> float:
        """Seconds until the weights that were sent last had reached the slowest worker so far; nobody waits for it."""
        return self._weights_s

    def process_ids(self) -> dict[str, int]:
        """The process id of each worker on its node, by the worker's name, for monitoring."""
        return {name: member.process.pid for name, member in self._members.items()}

    @property
    def outstanding(self) -> int:
        """The number of groups submitted and not delivered."""
        lent = 0 if self._loan is None else len(self._loan.waiting)
        return len(self._waiting) + lent + sum(len(member.groups) for member in self._members.values())

    # --- what the controller calls -------------------------------------------------------------------------------

    def publish(self, publication: Publication) -> None:
        """Sends weights to every worker; returns at once, and `poll` handles the outcome.

        Groups that were submitted before keep the old weights: those that wait in the pool are handed out first.
        """
        self._dispatch(everything=True)
        self._publication, self._weights_s = publication, 0.0
        now = self._clock.look()
        for member in self._members.values():
            if self._loan is None or not self._loan.keeps(member):
                member.send(publication, now)

    def submit(self, requests: list[GroupRequest]) -> None:
        """Spreads groups over the workers, each to the one with the fewest samples left."""
        self._waiting.extend(requests)
        self._dispatch()

    def lend(self) -> bool:
        """Takes the last worker out of training: until `end_loan` it keeps the present weights, for `submit_lent`.

        Groups that it has already are made first. Returns False, and does nothing, where fewer than two workers serve.
        Raises :class:`RolloutPoolError` before the first `publish`, and while a worker is lent.
        """
        if self._publication is None or self._loan is not None:
            raise RolloutPoolError("a worker is lent once the pool has weights, and one at a time")
        serving = self._serving()
        if len(serving) < 2:
            return False
        self._loan = Loan(self._publication, serving[-1].name)
        return True

    def submit_lent(self, requests: list[GroupRequest]) -> None:
        """Gives groups to the worker that is lent; `poll` returns them among the others."""
        if self._loan is None:
            raise RolloutPoolError("no worker is lent; call lend first")
        self._loan.submit(requests)
        self._dispatch()

    def end_loan(self) -> None:
        """Takes the worker that was lent back into training, with the current weights."""
        self._loan = None
        now = self._clock.look()
        for member in self._members.values():
            if self._publication is not None and member.version != self._publication.manifest.version.version:
                member.send(self._publication, now)
        self._dispatch()

    def discard(self) -> None:
        """Forgets every group that was submitted; none of them is delivered any more, and no worker is lent."""
        self._waiting.clear()
        self._loan = None
        now = self._clock.look()
        for member in self._members.values():
            member.discard(now)

    def resize(self, workers: int, *, at_once: bool = False) -> None:
        """Scales to `workers` and returns at once. New workers start with the current weights.

        Leaving workers finish their groups; with `at_once` they end, and their groups go to others.
        """
        if workers < 1:
            raise RolloutPoolError(f"the pool needs at least one worker, got {workers}")
        self._wanted = workers
        for member in self._members.values():  # one that was about to leave need not be started again
            member.leaving = member.leaving and self.size + len(self._starting) >= workers
        spare = self.size + len(self._starting) - workers
        for starting in list(self._starting.values())[: max(spare, 0)]:
            del self._starting[starting.name]
            ray.kill(starting.actor)
            spare -= 1
        # those without a reserved place first: nobody else can use that
        for member in sorted(self._serving(), key=lambda m: (m.place is not None, m.load))[: max(spare, 0)]:
            member.leaving = True
        for member in [m for m in self._members.values() if m.leaving and at_once]:
            self._hand_on(member)
        self._release_leavers()
        self._start_missing()

    def begin(self) -> None:
        """Waits until `rollout.min_workers` serve, or all where there are fewer. Raises what `wait_for` raises."""
        self.wait_for(min(self._config.min_workers, self._wanted))

    def wait_for(self, workers: int) -> None:
        """Waits until so many workers serve. Raises what `poll` raises, and RolloutPoolError after its deadlines."""
        while self.size < workers:
            self._start_missing()
            if arrived := self._poll(INTERRUPT_POLL_S):
                raise RolloutPoolError(f"{len(arrived)} group(s) arrived while nothing was to be generated")
            check_interrupt()

    def poll(self, timeout_s: float) -> list[pa.RecordBatch]:
        """Returns complete groups that have arrived; waits at most `timeout_s` for the first.

        Raises :class:`RolloutPoolError` when more workers were lost than `rollout.max_restarts` allows, when fewer than
        `rollout.min_workers` are left and there is no room for others within `deadlines.place_s`, or when new weights
        are refused; RayLost when there is no room because this process' own node is dead; ConfigError when a worker
        finds a setting wrong.
        """
        arrived = self._poll(timeout_s)
        self._on_poll(self)
        self._dispatch()
        return arrived

    def close(self) -> None:
        """Stops every worker and frees its resources. Idempotent."""
        for member in self._members.values():
            member.actor.stop.remote()
        present: list[Member | Starting] = [*self._members.values(), *self._starting.values()]
        for worker in present:
            ray.kill(worker.actor)
        self._members.clear()
        self._starting.clear()

    # --- one look at all workers ---------------------------------------------------------------------------------

    def _poll(self, timeout_s: float) -> list[pa.RecordBatch]:
        by_ref: dict[Any, Member | Starting] = {}  # of references and streams
        for member in self._members.values():
            by_ref[member.stream] = member
            by_ref.update((ref, member) for ref in (member.heartbeat, *(f.ref for f in member.fetching)) if ref)
        by_ref.update((starting.answer, starting) for starting in self._starting.values())
        if not by_ref:  # the pause before another attempt to start the only worker
            time.sleep(min(timeout_s, INTERRUPT_POLL_S))
        ready, _ = ray.wait(list(by_ref), num_returns=1, timeout=timeout_s, fetch_local=False) if by_ref else ([], [])
        if ready:  # also take whatever else has arrived by now
            ready, _ = ray.wait(list(by_ref), num_returns=len(by_ref), timeout=0, fetch_local=False)
        now = self._clock.look(timeout_s)
        arrived: list[pa.RecordBatch] = []
        for ref in ready:
            worker = by_ref[ref]
            if isinstance(worker, Starting):
                self._advance(worker, now)
            elif worker.name in self._members:  # else it was lost while an earlier reference was handled
                self._receive(worker, ref, arrived, now)
        self._watch(now)
        self._release_leavers()
        self._start_missing()
        return arrived

    def _receive(self, member: Member, ref: Any, arrived: list[pa.RecordBatch], now: float) -> None:
        ticket = next((fetch.ticket for fetch in member.fetching if fetch.ref is ref), -1)
        try:
            if ref is member.stream:
                batch = ray.get(next(member.stream), timeout=ANSWER_S)
                if batch.num_rows == 0:  # the answer to `discard`
                    member.discards -= 1
                elif not member.discards:
                    for uid, group in groups_of(batch):
                        member.groups.pop(uid, None)
                        arrived.append(group)
            elif member.heartbeat is not None and ref is member.heartbeat:
                member.heard(ray.get(ref, timeout=ANSWER_S), now)
            else:
                sent_at = next(fetch.sent_at for fetch in member.fetching if fetch.ref is ref)
                member.fetching = [fetch for fetch in member.fetching if fetch.ref is not ref]
                ray.get(ref, timeout=ANSWER_S)
                self._weights_s = max(self._weights_s, now - sent_at)
        except RayError as error:
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, RequestRefused):
                raise RolloutPoolError(f"rollout {member.name} refused its work: {cause}") from error
            if isinstance(cause, ConfigError):  # weights that cannot reach it by the transport that is set
                raise ConfigError(f"rollout {member.name}: {cause}") from error
            if isinstance(cause, (ObjectLostError, OwnerDiedError, BucketGone)) and ref is not member.stream:
                member.skip(ticket)  # the learner that held the weights is gone; the worker is well
            else:
                self._lose(member, in_short(error))
        except StopIteration:
            self._lose(member, "its stream of results ended")

    def _watch(self, now: float) -> None:
        """Sends heartbeats, and gives up workers that do not answer, or that have work and make no progress."""
        overdue: dict[str, str] = {}
        for member in self._members.values():
            if member.heartbeat is None and now - member.heartbeat_sent_at >= self._heartbeat_s:
                member.heartbeat, member.heartbeat_sent_at = member.actor.status.remote(), now
            if why := member.overdue(now, self._deadlines.rollout_s, self._deadlines.weights_s):
                overdue[member.name] = why
        self._show_stacks({name: self._members[name].process for name in overdue})
        for name, why in overdue.items():
            self._lose(self._members[name], why)
        limit = self._deadlines.start_s
        for starting in list(self._starting.values()):
            if starting.process is not None and now - starting.placed_at > limit:
                self._show_stacks({starting.name: starting.process})
                why = f"it did not start within {limit:g} s (deadlines.start_s)"
                self._fail(starting, why, final=not self._served)
        placed = self.size + sum(1 for s in self._starting.values() if s.process)
        if placed >= min(self._config.min_workers, self._wanted):
            self._enough_at = now
            return
        if now - self._node_seen_at >= self._heartbeat_s:  # it is not always this process that a dead raylet ends
            self._node_seen_at = now
            ensure_own_node()
        if now - self._enough_at > self._deadlines.place_s:
            raise RolloutPoolError(
                f"{placed} rollout worker(s) have a place in the cluster for {now - self._enough_at:.0f} s "
                f"(deadlines.place_s = {self._deadlines.place_s:g}), and rollout.min_workers is "
                f"{self._config.min_workers}; {self._needs(waited=True)}"
            )

    def _show_stacks(self, processes: dict[str, ProcessAddress]) -> None:
        shown = list(processes)[:SHOWN]
        if shown:
            for name, stacks in zip(shown, ask_for_stacks([processes[name] for name in shown]), strict=True):
                logger.warning("rollout %s makes no progress: %s", name, stacks)

    def _needs(self, *, waited: bool = False) -> str:
        resources, free = self._config.resources, ray.available_resources()
        needs = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
        kinds = [f"{amount:g} {kind} ({free.get(kind, 0):g} free)" for kind, amount in needs.items() if amount]
        said = f"each needs {' and '.join(kinds) or 'nothing'}"
        if waited and all(free.get(kind, 0) >= amount for kind, amount in needs.items()):
            said += f"; {NO_PROCESS}"
        return said

    # --- groups --------------------------------------------------------------------------------------------------

    def _serving(self) -> list[Member]:
        return [member for member in self._members.values() if not member.leaving]

    def _dispatch(self, *, everything: bool = False) -> None:
        """Hands out waiting groups, to each worker no more than it is about to decode, or with `everything` all."""
        shares: dict[str, list[GroupRequest]] = {}
        serving, now = self._serving(), self._clock.look()
        if self._loan is not None:
            self._loan.dispatch(self._members, now)
            current = None if self._publication is None else self._publication.manifest.version.version
            serving = [m for m in serving if not self._loan.keeps(m) and m.version == current]
        loads = {member.name: member.load for member in serving}
        most = self._config.max_rows * AHEAD
        while self._waiting and loads:
            name = min(loads, key=lambda n: loads[n])
            samples = len(self._waiting[0].sample_indices)
            if loads[name] and loads[name] + samples > most and not everything:
                break
            shares.setdefault(name, []).append(self._waiting.popleft())
            loads[name] += samples
        for name, share in shares.items():
            self._members[name].submit(share, now)

    def _hand_on(self, member: Member) -> None:
        """Takes a worker's groups from it, for others."""
        for uid, request in reversed(member.groups.items()):
            lent = self._loan is not None and uid in self._loan.uids
            (self._loan.waiting if self._loan is not None and lent else self._waiting).appendleft(request)
        member.groups.clear()

    # --- workers that come and go --------------------------------------------------------------------------------

    def _start_missing(self) -> None:
        """Starts the workers that are missing, all at once and beside the others."""
        missing = self._wanted - self.size - len(self._starting)
        if missing <= 0 or self._clock.seconds < self._start_again_at:
            return
        present: list[Member | Starting] = [*self._members.values(), *self._starting.values()]
        taken = {worker.place for worker in present}
        free = [place for place in range(len(self._places)) if place not in taken]
        for _ in range(missing):
            name, place = next(self._names), free.pop(0) if free else None
            strategy = "DEFAULT" if place is None else self._places[place]
            options = self._actor_options | {"scheduling_strategy": strategy}
            actor = self._actor_class.options(**options).remote(self._factory, name)
            self._starting[name] = Starting(name, actor, place)

    def _advance(self, starting: Starting, now: float) -> None:
        """Takes the answer of a starting worker: it has a place, or its engine is made and it serves."""
        try:
            answer = ray.get(starting.answer, timeout=ANSWER_S)
        except RayError as error:
            if isinstance(cause := getattr(error, "cause", None), ConfigError):  # for example an unusable model
                raise ConfigError(f"rollout worker: {cause}") from error
            why = in_short(error)
            lost = isinstance(error, RayActorError) and not made_badly(error)  # its process or node is gone
            hopeless = not lost or (why != NODE_GONE and self._failed_starts + 1 >= DEATHS_AT_START)
            self._fail(starting, why, final=not self._served and hopeless)
            return
        if starting.process is None:
            starting.process, starting.placed_at, starting.answer = answer, now, starting.made
            return
        del self._starting[starting.name]
        self._failed_starts, self._start_again_at = 0, 0.0
        member = Member(starting.name, starting.actor, starting.process, starting.place, now)
        self._members[member.name] = member
        self._served = True
        if self._publication is not None:
            member.send(self._publication, now)

    def _fail(self, starting: Starting, why: str, *, final: bool) -> None:
        """Gives up a worker that could not start. Another one is started after a pause, unless this is `final`."""
        del self._starting[starting.name]
        ray.kill(starting.actor)
        if final:  # no other worker shows that one can start: the next attempt would end in the same way
            raise RolloutPoolError(f"rollout {starting.name} failed to start: {why}; {self._needs()}")
        self._failed_starts += 1
        pause = min(2.0 ** (self._failed_starts - 1), LONGEST_PAUSE_S)
        self._start_again_at = self._clock.seconds + pause
        logger.warning("rollout %s failed to start: %s; another one is started in %g s", starting.name, why, pause)
        self._count_restart(f"rollout {starting.name} failed to start: {why}")

    def _lose(self, member: Member, why: str) -> None:
        """Gives up a worker; its groups go to the others, and another worker is started."""
        logger.warning(
            "rollout %s lost (process %d: %s); last event: %s; %d group(s) go to other workers",
            member.name, member.process.pid, why, member.last_event, len(member.groups),
        )  # fmt: skip
        self._remove(member)
        self._hand_on(member)
        ray.kill(member.actor)
        node, now = member.process.node_id, self._clock.seconds
        with_others = now - self._nodes_lost.get(node, -TOGETHER_S) < TOGETHER_S  # Ray may not know yet that it is gone
        counted = with_others and why in (NODE_GONE, UNAVAILABLE)
        if not with_others and why in (NODE_GONE, UNAVAILABLE):
            self._nodes_lost[node] = now
        what = f"rollout {member.name} was lost ({why}; last event: {member.last_event})"
        self._count_restart(what, counts=not counted)

    def _count_restart(self, what: str, *, counts: bool = True) -> None:
        """Counts a loss; of the workers that a node takes with it, the first alone `counts` towards the limit."""
        now = time.monotonic()
        self.restarts += 1
        if not counts:
            return
        self._lost_at.append(now)
        while now - self._lost_at[0] > RESTARTS_WITHIN_S:
            self._lost_at.popleft()
        if len(self._lost_at) > self._config.max_restarts:
            raise RolloutPoolError(
                f"{what}. Within an hour {len(self._lost_at)} worker(s) were lost or failed to start, and "
                f"rollout.max_restarts allows {self._config.max_restarts}; read the worker's log"
            )

    def _release_leavers(self) -> None:
        for member in [m for m in self._members.values() if m.leaving and not m.groups]:
            self._remove(member)
            ray.kill(member.actor)

    def _remove(self, member: Member) -> None:
        del self._members[member.name]
        self._busy_before += member.status.busy_s if member.status is not None else 0.0
