"""Evaluations between a run's start and its end: at once, or beside the steps (`evaluation.blocking`).

    step S done ─► checkpoint of S ─► a worker is lent, with the weights of S ─► its groups are counted as they come
                                      the others and the learner go on          ─► figures of step S, whenever

An evaluation that was not finished when a run ended is made up when the run goes on: from the checkpoint of its step,
whose name stays `protected` while it lasts, since later checkpoints hold other weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.types import GroupRequest
from latent_grpo.deploy.controller import Controller, gather
from latent_grpo.deploy.evaluation.evaluate import Asking, Wish, evaluate, evaluating
from latent_grpo.deploy.evaluation.scores import TaskResult
from latent_grpo.deploy.run.progress import Advance, Reporter
from latent_grpo.deploy.run.session import Run
from latent_grpo.learner.checkpoint import Checkpoint, CheckpointError, list_checkpoints, verify_checkpoint

Found = Callable[[int, list[TaskResult]], None]
"""Called with the step of an evaluation and its results."""
STATE_KEY = "evaluating"  # of a checkpoint's state: the step of the evaluation that was going on


class Lender(Protocol):
    """What an evaluation beside the steps needs from the workers (`rollout_workers.pool.RolloutPool`)."""

    def lend(self) -> bool:
        """Takes a worker out of training; False: none can be spared."""

    def submit_lent(self, requests: list[GroupRequest]) -> None:
        """Queues groups for the lent worker."""

    def end_loan(self) -> None:
        """Returns the worker to training."""


class Restorable(Protocol):
    """What making up an evaluation needs from the learner (`learner.learner.LearnerGroup`)."""

    def load(self, folder: str | Path) -> None:
        """Reads the learner's state from a checkpoint's folder."""

    def publish(self, version: int) -> Any:
        """Returns the current weights as this policy version."""


class InterimEvaluations:
    """The evaluations of a run's loop. `found` is called between two steps, in the order of the evaluations' steps.

    `keep(step)` writes the checkpoint of a step that was just done, unless it is there.
    """

    def __init__(self, run: Run, controller: Controller, found: Found, keep: Callable[[int], None]) -> None:
        self.step: int | None = None  # of the evaluation that goes on, or whose results were not handed over
        self._run, self._controller, self._found, self._keep = run, controller, found, keep
        self._asking: Asking[list[TaskResult]] | None = None
        self._results: list[TaskResult] | None = None
        self._order: dict[str, int] = {}  # uid -> place among the groups asked for together
        self._groups: dict[int, pa.RecordBatch] = {}
        self._arrived: Callable[[int], None] = lambda count: None
        self._told = False

    @property
    def state(self) -> dict[str, int]:
        """What a checkpoint that is written now must say of it."""
        return {} if self.step is None else {STATE_KEY: self.step}

    @property
    def protected(self) -> tuple[str, ...]:
        """The names of checkpoints that must not be removed while it goes on."""
        root = self._run.folder.checkpoints
        return () if self.step is None else tuple(path.name for path in checkpoints_of(root, self.step))

    def begin(self, step: int) -> None:
        """Evaluates the weights after `step`, which the workers have now. None may go on (:meth:`finish`)."""
        lender = None if self._run.config.evaluation.blocking else self._lender()
        if lender is None:
            self._found(step, evaluate(self._run, self._controller.gather, step, tag_of(step)))
            return
        self._keep(step)
        self.step = step
        self._asking = evaluating(self._run, step, tag_of(step), _Unseen(self._run.reporter.console))
        self._controller.beside = self.take
        self._go_on(partial(next, self._asking))

    def look(self) -> None:
        """Hands over the results of an evaluation that has ended. It is called between two steps."""
        if self.step is not None and self._results is not None:
            step, results = self.step, self._results
            self.step = self._results = None
            self._found(step, results)

    def finish(self) -> None:
        """Waits for the evaluation that goes on, and hands over its results."""
        if self._asking is not None:
            self._run.reporter.say(f"waiting for the evaluation of step {self.step}")
            self._controller.attend(lambda: self._asking is None)
        self.look()

    def take(self, uid: str, group: pa.RecordBatch) -> bool:
        """Takes a group that has arrived, and asks for more once all are there; False if it is none of its own."""
        place = self._order.get(uid)
        if place is None or self._asking is None:
            return False
        self._groups[place] = group
        self._arrived(len(self._groups))
        if len(self._groups) == len(self._order):
            self._go_on(partial(self._asking.send, [self._groups[i] for i in range(len(self._order))]))
        return True

    def _go_on(self, next_wish: Callable[[], Wish]) -> None:
        try:
            requests, self._arrived = next_wish()
        except StopIteration as ended:
            self._results, self._asking, self._controller.beside = ended.value, None, None
            self._order, self._groups = {}, {}
            self._workers.end_loan()
            return
        self._order, self._groups = {request.group_uid: i for i, request in enumerate(requests)}, {}
        self._workers.submit_lent(requests)

    def _lender(self) -> Lender | None:
        """Lends a worker; without one to spare it says once that evaluations stop the steps."""
        if self._run.workers is not None and self._run.workers.lend():
            return self._run.workers
        if not self._told:
            self._told = True
            self._run.reporter.say(
                "[yellow]evaluation.blocking is false and fewer than two rollout workers serve: the learner waits for "
                "this evaluation, as for each one that begins while there is one worker[/]"
            )
        return None

    @property
    def _workers(self) -> Lender:
        if self._run.workers is None:
            raise RuntimeError("an evaluation beside the steps needs a pool of workers")
        return self._run.workers


def owed(run: Run, state: dict[str, Any]) -> int | None:
    """Returns the step whose evaluation a run that goes on from this checkpoint's `state` must make up, or None."""
    step, every = state["step"], run.config.evaluation.every
    due = 0 < step < run.config.steps and every > 0 and step % every == 0
    wanted = state.get(STATE_KEY, step if due else None)
    measured = {row["step"] for row in read_metrics(run.folder.path, kind="evaluation")}
    return None if wanted in measured else wanted


def make_up(run: Run, learner: Restorable, step: int, latest: Checkpoint, found: Found) -> None:
    """Evaluates an earlier checkpoint, that of `step`; afterwards the learner holds the `latest` one again."""
    folder = next(iter(reversed(checkpoints_of(run.folder.checkpoints, step))), None)
    try:
        if folder is None:
            raise CheckpointError("it is not there")
        verify_checkpoint(folder)
    except CheckpointError as error:
        run.reporter.say(
            f"[yellow]the evaluation of step {step} was not finished and cannot be made up; its checkpoint: {error}[/]"
        )
        return
    run.reporter.say(f"the evaluation of step {step} was not finished and is made up, from {folder.name}")
    learner.load(folder / "learner")
    run.pool.publish(learner.publish(step))
    results = evaluate(run, partial(gather, run.pool), step, tag_of(step))
    learner.load(latest.path / "learner")
    found(step, results)


def checkpoints_of(root: Path, step: int) -> list[Path]:
    """Returns the folders of a step's checkpoints, the newest one last."""
    return [path for at, path in list_checkpoints(root) if at == step]


def tag_of(step: int) -> str:
    """Returns the name under which an evaluation after a step is kept."""
    return f"step-{step}"


class _Unseen(Reporter):
    """Shows no progress: the steps' is on the screen."""

    @contextlib.contextmanager
    def phase(self, name: str, total: int, unit: str = "steps") -> Iterator[Advance]:
        yield lambda completed, note="": None
