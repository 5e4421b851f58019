"""The writer of dumps: a thread that puts each step's trajectories on disk while training continues.

    step done ──► queue (dump.queue steps) ──► thread: trajectories and learner records, fsync, rename ──► retention

Training waits only when the queue is full. A dump that cannot be written (a full disk) stops the run: the failure is
raised at the next step, at the next checkpoint, or at the end, whichever comes first. A checkpoint is made after the
dumps of its steps are on the disk, so a resumed run never has a hole in its dumps.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from latent_grpo.common import main_loop
from latent_grpo.common.config import DumpConfig
from latent_grpo.common.learner_record import filtered_records
from latent_grpo.common.schema import CORRECT, TrajectoryBatch, concat, take_rows
from latent_grpo.common.store import DumpError, LearnerStore, TrajectoryStore

POLL_S = 0.1
LEAVE_S = 10.0  # how long queued dumps may still be written after an error or an interrupt

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDump:
    """The dump of one step.

    `reasons` says for each group why it was filtered, or None if it was trained on. `records` holds the learner
    records of the groups trained on, in their order, or None if the learner took no part in the step.
    """

    step: int
    groups: tuple[pa.RecordBatch, ...]
    reasons: tuple[str | None, ...]
    records: pa.RecordBatch | None
    purpose: str = "training"


class DumpWriter:
    """Writes the dumps of a run in a thread. Use it as a context manager and call `submit` from one thread.

    Training waits at most `deadline_s` seconds for the disk. Raises :class:`DumpError`.
    """

    def __init__(
        self,
        trajectories: TrajectoryStore,
        records: LearnerStore,
        config: DumpConfig,
        lineage: int,
        deadline_s: float,
    ):
        self.trajectories, self.records = trajectories, records
        self._config, self._lineage, self._deadline_s = config, lineage, deadline_s
        self._retention = Retention(config, (self.trajectories, self.records))
        self._queue: queue.Queue[StepDump | None] = queue.Queue(config.queue)
        self._failure: BaseException | None = None
        self._submitted = self._written = 0  # dumps
        self._thread = threading.Thread(target=self._work, name="dumps", daemon=True)
        self._thread.start()

    def __enter__(self) -> DumpWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            try:
                self.flush()
            finally:
                self._end(POLL_S)
        else:
            self._end(LEAVE_S)

    def submit(self, dump: StepDump) -> float:
        """Queues a step's dump; returns the seconds that the caller waited because the queue was full."""
        began = time.perf_counter()
        self._wait(lambda: not self._queue.full())
        waited = time.perf_counter() - began
        self._queue.put_nowait(dump)
        self._submitted += 1
        return waited

    def flush(self, seconds: float | None = None) -> None:
        """Waits until every dump submitted before is on the disk, for at most `seconds` (default: the deadline).

        It may be called from any thread.
        """
        submitted = self._submitted
        self._wait(lambda: self._written >= submitted, seconds)

    def _wait(self, done: Callable[[], bool], seconds: float | None = None) -> None:
        seconds = self._deadline_s if seconds is None else seconds
        deadline = time.monotonic() + seconds
        while True:
            if self._failure is not None:
                raise self._failure
            if done():
                return
            if time.monotonic() > deadline:
                raise DumpError(
                    errno.ETIMEDOUT,
                    f"the disk did not write the dump of a step within {seconds:g} s (deadlines.dump_s); it hangs "
                    "or is too slow",
                    str(self.trajectories.folder),
                )
            main_loop.passed()
            time.sleep(POLL_S / 50)

    def _end(self, seconds: float) -> None:
        """Ends the thread, which first writes the queued dumps as far as it can within `seconds`."""
        deadline = time.monotonic() + seconds
        while self._queue.unfinished_tasks and self._failure is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if self._queue.unfinished_tasks and self._failure is None:
            log.warning("%d dump(s) were not written before the end of the run", self._queue.unfinished_tasks)
        if not self._queue.full():
            self._queue.put_nowait(None)
        self._thread.join(seconds)

    # --- the thread ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (dump := self._queue.get()) is not None:
            try:
                self._write(dump)
                self._written += 1
            except BaseException as error:  # for the training thread, which raises it
                self._failure = error
                return
            finally:
                self._queue.task_done()

    def _write(self, dump: StepDump) -> None:
        batch, records = concat(dump.groups), None
        if dump.records is not None or (dump.purpose == "training" and None not in dump.reasons):
            records = learner_records_of(dump)
        if dump.purpose == "training" and self._config.which == "failures":
            rows = failures(batch)
            batch, records = take_rows(batch, rows), None if records is None else take_rows(records, rows)
        self.trajectories.write(dump.step, batch, dump.purpose, self._lineage)
        if records is not None:
            self.records.write(dump.step, records, dump.purpose, self._lineage)
        if dump.purpose == "training":
            self._retention.apply(dump.step)


def learner_records_of(dump: StepDump) -> pa.RecordBatch:
    """Returns one learner record per trajectory of the dump, in its order."""
    parts, taken = [], 0
    for group, reason in zip(dump.groups, dump.reasons, strict=True):
        if reason is not None:
            parts.append(filtered_records(group, reason))
        elif dump.records is None:
            raise ValueError(f"step {dump.step}: a group was trained on, but the dump has no learner records")
        else:
            parts.append(dump.records.slice(taken, group.num_rows))
            taken += group.num_rows
    return concat(parts)


def failures(batch: pa.RecordBatch) -> np.ndarray:
    """Returns the rows that did not end by themselves, or that the verifier did not call `correct`."""
    view = TrajectoryBatch(batch)
    correct = np.array([reason == CORRECT for reason in view.strings("grade_reason")], dtype=bool)
    return np.flatnonzero(~(view.valid & correct))


class Retention:
    """Removes the oldest dumped training steps (`dump.keep_steps`, `dump.keep_bytes`), but never the newest one."""

    def __init__(self, config: DumpConfig, stores: tuple[TrajectoryStore, LearnerStore]):
        self._config, self._stores = config, stores
        self._sizes: dict[int, int] = {}
        if self._bounded:
            for store in stores:
                for step, size in store.sizes().items():
                    self._sizes[step] = self._sizes.get(step, 0) + size

    @property
    def _bounded(self) -> bool:
        return self._config.keep_steps is not None or self._config.keep_bytes is not None

    def apply(self, written: int) -> None:
        """Removes old steps until the limits hold; `written` is the step that was just dumped."""
        if not self._bounded:
            return
        self._sizes[written] = sum(store.size(written) for store in self._stores)
        # later steps were abandoned when a resumed run returned to an earlier checkpoint: they are removed first
        abandoned = sorted((step for step in self._sizes if step > written), reverse=True)
        for step in (*abandoned, *sorted(step for step in self._sizes if step < written)):
            if not self._exceeded():
                return
            for store in self._stores:
                store.remove(step)
            del self._sizes[step]

    def _exceeded(self) -> bool:
        steps, size = self._config.keep_steps, self._config.keep_bytes
        too_many = steps is not None and len(self._sizes) > steps
        return too_many or (size is not None and sum(self._sizes.values()) > size)
