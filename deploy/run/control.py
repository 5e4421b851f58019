"""The number of a run's workers while it goes on: as somebody asks, from any terminal that sees the run's folder, or
as the run itself finds (`deploy.run.autoscale`).

    latent-grpo scale RUN --workers N ──► RUN/control/ID.request.json ──► the run, at its next look at its workers
                                      ◄── RUN/control/ID.reply.json   ◄──

Files need no port and no token: who may write into the run's folder may ask. On a cluster the folder is on shared
storage (docs/cluster.md), so every node reaches the run, a job too.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.files import read_text, write_atomically
from latent_grpo.deploy.run.autoscale import Autoscaler
from latent_grpo.deploy.run.folder import RunFolder, in_use, keep_workers

FOLDER = "control"
REQUEST, TAKEN, REPLY = ".request.json", ".taken.json", ".reply.json"
LOOK_EVERY_S = 0.5
PATIENCE = 20  # steps after which autoscaling gives back workers that have found no place
MOST = 4096  # workers that a request may ask for
log = logging.getLogger(__name__)
ANSWER_S = 60.0  # a run that saves a checkpoint answers afterwards


@dataclass(frozen=True, slots=True)
class ScaleRequest:
    """A number of rollout workers that somebody wants. `at_once`: leaving workers do not finish their groups."""

    workers: int
    at_once: bool
    by: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The run's answer, in one sentence."""

    accepted: bool
    sentence: str


class Scalable(Protocol):
    """What the run scales (`rollout_workers.pool.RolloutPool`)."""

    @property
    def size(self) -> int:
        """The number of workers that serve."""

    @property
    def wanted(self) -> int:
        """The number of workers that are to serve."""

    @property
    def busy_s(self) -> float:
        """Seconds that all workers have worked so far, together."""

    @property
    def weights_s(self) -> float:
        """Seconds until the last weights had reached the slowest worker."""

    def resize(self, workers: int, *, at_once: bool = False) -> None:
        """Scales to so many workers and returns at once; with `at_once` leavers do not finish their groups."""


def request_scale(run: str | Path, workers: int, at_once: bool = False, answer_s: float = ANSWER_S) -> Reply:
    """Asks a run for a number of workers and waits for its answer.

    Raises ConfigError where no run goes on in the folder, or where it does not answer: then nothing was changed.
    """
    path = Path(run)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{run}: it has no config.json; give the folder of a run, such as runs/quickstart-...")
    if in_use(path) is None:
        if (path / "model" / "config.json").is_file():
            raise ConfigError(f"{run}: the run has ended; there is nothing to scale")
        resume = f"latent-grpo train --resume {run} rollout.workers={workers}"
        raise ConfigError(f"{run}: the run has stopped; `{resume}` goes on with that number")
    stem = path / FOLDER / f"{time.time_ns()}-{secrets.token_hex(4)}"
    stem.parent.mkdir(exist_ok=True)
    request, reply = Path(f"{stem}{REQUEST}"), Path(f"{stem}{REPLY}")
    by = f"{getpass.getuser()} on {socket.gethostname()}"
    write_atomically(request, json.dumps(asdict(ScaleRequest(workers, at_once, by))))
    end, taken = time.monotonic() + answer_s, False
    while time.monotonic() < end + (answer_s if taken else 0.0):
        taken = not request.exists()
        if reply.exists():
            try:
                answer = Reply(**json.loads(read_text(reply)))
            except (OSError, ValueError, TypeError) as error:
                raise ConfigError(f"{reply}: not the answer of a run ({error}); see in its log what it did") from error
            reply.unlink()
            return answer
        if in_use(path) is None:
            break
        time.sleep(0.2)
    try:
        request.unlink()
    except FileNotFoundError:
        raise ConfigError(
            f"{run}: the run has taken the request and did not answer; its log says how many workers it has"
        ) from None
    raise ConfigError(
        f"{run}: the run did not answer within {answer_s:g} s, and nothing was changed: it is starting, saving or "
        "ending. Ask again"
    )


class Control:
    """The run's side. `room` returns how many workers the cluster has room for now, beside the run's ranks.

    A cluster may grow, so `grows` decides whether a number beyond the room is accepted.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        say: Callable[[str], None],
        *,
        room: Callable[[], int],
        grows: bool,
    ):
        self._folder, self._config, self._say, self._room, self._grows = folder, config, say, room, grows
        self._requests = folder.path / FOLDER
        self._looked_at = 0.0
        self._requests.mkdir(exist_ok=True)
        for left in (*self._requests.glob(f"*{TAKEN}"), *self._requests.glob(f"*{REPLY}")):  # of a session that ended
            left.unlink(missing_ok=True)

    def serve(self, pool: Scalable) -> None:
        """Answers the requests that have come. Cheap; called again and again."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S or not self._requests.is_dir():
            return
        self._looked_at = now
        for path in sorted(self._requests.glob(f"*{REQUEST}")):
            stem = str(path).removesuffix(REQUEST)
            try:
                os.replace(path, f"{stem}{TAKEN}")  # from here on the asker waits for the answer
                request = ScaleRequest(**json.loads(read_text(Path(f"{stem}{TAKEN}"))))
                reply = self._scale(pool, request)
            except FileNotFoundError:  # it was taken back
                continue
            except (ValueError, TypeError, OSError) as error:
                reply = Reply(False, f"the request cannot be read or kept: {error}")
            try:
                write_atomically(Path(f"{stem}{REPLY}"), json.dumps(asdict(reply)))
                Path(f"{stem}{TAKEN}").unlink(missing_ok=True)
            except OSError as error:  # a run does not end because nobody can be answered
                log.warning("a request in %s could not be answered: %s", self._requests, error)

    def _scale(self, pool: Scalable, request: ScaleRequest) -> Reply:
        wanted, least, most = request.workers, self._config.rollout.min_workers, self._config.rollout.max_workers
        if type(wanted) is not int or not 1 <= wanted <= MOST:
            return Reply(False, f"expected a whole number of workers from 1 to {MOST}, got {wanted!r}")
        room = self._room()
        if most is not None and wanted > most:
            return Reply(False, f"{wanted} is above rollout.max_workers ({most}), up to which the run scales itself")
        if wanted < least:
            return Reply(False, f"{wanted} is below rollout.min_workers ({least})")
        if wanted > room and not self._grows:
            return Reply(False, f"this machine has room for {room} worker(s) beside the learner, got {wanted}")
        before = pool.wanted
        if wanted == before and not request.at_once:
            return Reply(True, f"the run has {before} worker(s) already")
        pool.resize(wanted, at_once=request.at_once)
        keep_workers(self._folder, self._config, wanted)
        self._say(f"workers: {before} -> {wanted} (asked for by {request.by})")
        if wanted > before:
            late = max(wanted - max(room, before), 0)
            how = f"; {late} of them start when the cluster has room" if late else ""
            return Reply(True, f"{before} -> {wanted} workers; the new ones load the current weights first{how}")
        leave = "their groups go to others" if request.at_once else "those that leave finish their groups"
        return Reply(True, f"{before} -> {wanted} workers; {leave}")


class Scaling:
    """What each step says of its workers, and the run's own changes of their number (`rollout.max_workers`)."""

    def __init__(self, config: RunConfig, pool: Scalable, say: Callable[[str], None]):
        least, most = config.rollout.min_workers, config.rollout.max_workers
        overlaps = config.max_staleness > 0
        self._scaler = None if most is None else Autoscaler(least, most, overlaps=overlaps)
        self._without_room = 0  # steps in a row in which fewer workers served than were wanted
        self._pool, self._say, self._busy_s = pool, say, pool.busy_s

    def begins(self) -> None:
        """A step begins; what workers did since the last one ended, such as an evaluation, is not its work."""
        self._busy_s = self._pool.busy_s

    def after(self, step_s: float, waited_s: float) -> dict[str, float]:
        """Returns the step's metrics; both times are in seconds, the latter the learner's wait for rollouts."""
        pool, busy_s = self._pool, self._pool.busy_s - self._busy_s
        self._busy_s += busy_s
        serving, wanted = pool.size, pool.wanted
        self._without_room = self._without_room + 1 if serving < wanted else 0
        if self._scaler is not None and serving and self._without_room >= PATIENCE:
            self._say(f"workers: {wanted} -> {serving} (the others have found no place for {PATIENCE} steps)")
            pool.resize(serving)
        elif self._scaler is not None:
            workers = self._scaler.after(step_s, waited_s, busy_s, serving=serving, wanted=wanted)
            if workers != wanted:
                share = waited_s / step_s if step_s else 0.0
                self._say(f"workers: {wanted} -> {workers} (the learner waits {share:.0%} of a step for rollouts)")
                pool.resize(workers)
        share = busy_s / (serving * step_s) if serving and step_s else 0.0
        return {
            "rollout/workers": float(serving),
            "rollout/busy_share": min(share, 1.0),
            "rollout/weights_s": pool.weights_s,
        }
