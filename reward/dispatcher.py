"""The one thread of a pool: hands cases to grader processes, collects verdicts, ends and replaces processes.

            submit()                      grade / load
  callers ──────────► queue ──► dispatcher ──────────► grader processes
          ◄────────── job.done           ◄──────────
                                            verdict, end of pipe, or a deadline that passes

It alone touches processes and pipes, so they need no locks. It waits in one place (`select`), never longer than to the
nearest deadline; every process that was asked something has one. What ends a wait: a verdict; the end of a process; the
time limit of a case, after which the process is killed; `stop`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from latent_grpo.reward.framing import FrameError
from latent_grpo.reward.grader import Grader
from latent_grpo.reward.verifier import Definitions, Grade, UnknownVerifierError

logger = logging.getLogger(__name__)

Key = tuple[str, str, str]
"""(kind, response text, gold)"""

_MAX_CASES_PER_REQUEST = 16
_MAX_FAILED_STARTS = 3
_REAP_INTERVAL_S = 0.02
_STOP_GRACE_S = 2.0
_LOGGED_FAILURES = 20
_NEVER = float("inf")


class GraderStartError(RuntimeError):
    """Grader processes end before they can grade; the cause is on standard error."""


@dataclass(slots=True, eq=False)
class Job:
    """One call of `grade_many`: its verdicts by key, complete when `done` is set, unless `error` is."""

    verdicts: dict[Key, Grade] = field(default_factory=dict)
    remaining: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """End the call with an exception; verdicts that still arrive are ignored."""
        if not self.done.is_set():
            self.error = error
            self.done.set()


@dataclass(slots=True, eq=False)
class _Case:
    key: Key
    job: Job
    failures: int = 0  # a process that ended under it, or an exception of the verifier
    memory_retried: bool = False


class Dispatcher:
    """See the module. Every public method may be called from any thread."""

    def __init__(
        self,
        *,
        processes: int,
        time_limit_s: float,
        memory_limit_bytes: int,
        start_limit_s: float,
        definitions: Definitions,
    ) -> None:
        self._processes = processes
        self._time_limit_s = time_limit_s
        self._memory_limit_bytes = memory_limit_bytes
        self._start_limit_s = start_limit_s
        self._definitions = definitions
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._inbox: deque[_Case] = deque()
        self._new_kinds: list[str] = []
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.counters: Counter[str] = Counter()
        # From here on: the thread's own.
        self._selector = selectors.DefaultSelector()
        self._queue: deque[_Case] = deque()
        self._retries: deque[_Case] = deque()  # cases for a process that has graded nothing yet
        self._kinds: list[str] = []
        self._graders: list[Grader] = []
        self._ending: list[Grader] = []
        self._failed_starts = 0
        self._not_before = 0.0

    # --- for the callers' threads
    # ---------------------------------------------------------------------------------------

    def start(self, kinds: list[str]) -> None:
        """Begin to start the processes and to load these verifiers in each; returns at once."""
        with self._lock:
            self._check_open()
            self._new_kinds += kinds
            self._ensure_thread()
        self._wake()

    def submit(self, keys: list[Key]) -> Job:
        """Queue cases; the job's `done` is set when all have verdicts."""
        job = Job(remaining=len(keys))
        with self._lock:
            self._check_open()
            self._inbox.extend(_Case(key, job) for key in keys)
            self._ensure_thread()
        self._wake()
        return job

    def wait(self, job: Job) -> None:
        """Block until the job is done; raises its error. Ends too if the thread should die."""
        while not job.done.wait(1.0):
            if self._thread is None or not self._thread.is_alive():
                job.fail(RuntimeError("The verifier pool's thread has ended: it was closed, or the process forked."))
        if job.error is not None:
            raise job.error

    def stop(self) -> None:
        """End every process and the thread, and fail what is queued. Safe to call twice, and in a forked copy."""
        if os.getpid() != self._owner:  # the lock may have been held when the process forked
            return
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            thread = self._thread
        if thread is None:
            self._release()
            return
        self._wake()
        if thread is not threading.current_thread():
            thread.join(_STOP_GRACE_S + 10.0)

    def process_ids(self) -> list[int]:
        """Ids of the processes that are alive or being started."""
        return [grader.pid for grader in list(self._graders)]

    def _check_open(self) -> None:
        if self._stopping:
            raise RuntimeError("The verifier pool is closed; make a new one.")

    def _ensure_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="verifier-pool", daemon=True)
            self._thread.start()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"x")

    # --- the thread
    # -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: Exception = RuntimeError("The verifier pool was closed while cases were being graded.")
        try:
            self._selector.register(self._wake_read, selectors.EVENT_READ, None)
            while self._take_inbox():
                self._replace_missing()
                self._assign()
                for selected, events in self._selector.select(self._timeout()):
                    if selected.data is None:
                        with contextlib.suppress(BlockingIOError):
                            os.read(self._wake_read, 4096)
                    elif selected.data in self._graders:
                        self._attend(selected.data, events)
                self._enforce_deadlines()
                self._ending = [grader for grader in self._ending if not grader.reap()]
        except Exception as crash:  # whatever happens here must reach the callers, who wait
            logger.exception("The verifier pool's thread failed.")
            error = RuntimeError(f"The verifier pool failed: {type(crash).__name__}: {crash}")
        finally:
            self._shut_down(error)

    def _take_inbox(self) -> bool:
        with self._lock:
            self._queue.extend(self._inbox)
            self._inbox.clear()
            kinds, self._new_kinds = self._new_kinds, []
            stopping = self._stopping
        if (self._queue or kinds) and self._not_before == _NEVER:
            self._not_before = 0.0
        self._kinds += [kind for kind in dict.fromkeys(kinds) if kind not in self._kinds]
        return not stopping

    def _replace_missing(self) -> None:
        if time.monotonic() < self._not_before:
            return
        while len(self._graders) < self._processes:
            try:
                grader = Grader(time_limit_s=self._time_limit_s, memory_limit_bytes=self._memory_limit_bytes)
            except OSError as error:  # no memory, processes or descriptors left; that may pass
                self._start_failed(str(error))
                return
            self._graders.append(grader)
            self.counters["processes_started"] += 1
            self._selector.register(grader.replies_fd, selectors.EVENT_READ, grader)

    def _assign(self) -> None:
        for grader in [grader for grader in self._graders if grader.idle]:
            case = self._next_case(fresh=grader.graded == 0)
            if case is None:
                missing = next((kind for kind in self._kinds if kind not in grader.loaded), None)
                if missing is not None:
                    self._load(grader, missing)
                continue
            kind = case.key[0]
            if kind not in grader.loaded:
                (self._retries if case.failures or case.memory_retried else self._queue).appendleft(case)
                self._load(grader, kind)
                continue
            cases = [case]
            # A case that has ended a process travels alone; others share a request, so that the pipe is not the cost.
            room = min(_MAX_CASES_PER_REQUEST, len(self._queue) // (2 * self._processes) + 1)
            while not case.failures and len(cases) < room and self._queue and self._queue[0].key[0] == kind:
                cases.append(self._queue.popleft())
            grader.grade(cases, time.monotonic() + self._time_limit_s)
            self._watch(grader)
        if self._retries and all(grader.graded for grader in self._graders):
            idle = next((grader for grader in self._graders if grader.idle), None)
            if idle is not None:
                self._discard(idle)

    def _next_case(self, *, fresh: bool) -> _Case | None:
        for queue in (self._retries, self._queue) if fresh else (self._queue,):
            while queue:
                case = queue.popleft()
                if not case.job.done.is_set():
                    return case
        return None

    def _load(self, grader: Grader, kind: str) -> None:
        if kind not in self._kinds:
            self._kinds.append(kind)
        grader.load(kind, *self._definitions.resolve(kind), time.monotonic() + self._start_limit_s)
        self._watch(grader)

    def _watch(self, grader: Grader) -> None:
        """Keep watching for room in the pipe as long as a request has not wholly left."""
        watched = grader.requests_fd in self._selector.get_map()
        if grader.sending and not watched:
            self._selector.register(grader.requests_fd, selectors.EVENT_WRITE, grader)
        elif watched and not grader.sending:
            self._selector.unregister(grader.requests_fd)
            if grader.cases:
                grader.deadline = time.monotonic() + self._time_limit_s  # the case could not begin before

    def _attend(self, grader: Grader, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            grader.flush()
            self._watch(grader)
            return
        try:
            replies = grader.receive()
        except FrameError as error:
            self._lost(grader, f"it sent bytes that are no reply ({error})")
            return
        if replies is None:
            grader.reap(1.0)
            self._lost(grader, f"it ended by itself with exit status {grader.exit_status}")
            return
        for reply in replies:
            if grader not in self._graders:
                return
            self._take_reply(grader, reply)

    def _take_reply(self, grader: Grader, reply: dict[str, Any]) -> None:
        if grader.loading is not None:
            kind, grader.loading, grader.deadline = grader.loading, None, None
            self._failed_starts = 0
            if "loaded" in reply:
                grader.loaded.add(kind)
            else:
                self._kinds = [known for known in self._kinds if known != kind]
                self._fail_kind(kind, UnknownVerifierError(str(reply.get("load_error"))))
            return
        case = grader.cases.popleft()
        fresh, grader.graded = grader.graded == 0, grader.graded + 1
        grader.deadline = time.monotonic() + self._time_limit_s if grader.cases else None
        try:
            verdict = Grade(*reply["grade"])
        except (KeyError, TypeError, ValueError) as error:
            self._failed(case, str(reply.get("error", error)), retry_on=self._queue)
            return
        if verdict.reason != "out_of_memory":
            self._finish(case, verdict)
            return
        self._discard(grader)
        if fresh or case.memory_retried:
            self._finish(case, verdict)
        else:  # other cases may have filled the process; the verdict needs one that is empty
            case.memory_retried = True
            self._retries.append(case)

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for grader in list(self._graders):
            if grader.deadline is None or now < grader.deadline:
                continue
            if grader.loading is not None:
                self._lost(grader, f"verifier {grader.loading!r} did not load within {self._start_limit_s:g} s")
                continue
            if grader.stopped:
                self._lost(grader, f"it was stopped (SIGSTOP) and gave no verdict within {self._time_limit_s:g} s")
                continue
            case = grader.cases.popleft()
            self._discard(grader)
            self._finish(case, Grade(0.0, "timeout"))

    def _lost(self, grader: Grader, cause: str) -> None:
        """A process ended, or must end, for another reason than its case's limits."""
        self.counters["processes_lost"] += 1
        case = grader.cases.popleft() if grader.cases else None
        starting = not grader.loaded
        self._discard(grader)
        if case is not None:
            self._failed(case, cause, retry_on=self._retries)
        elif starting:
            self._start_failed(cause)

    def _start_failed(self, cause: str) -> None:
        """Wait before the next start, longer each time; after some in a row fail the callers instead."""
        if self._not_before == _NEVER:
            return
        self._failed_starts += 1
        self._not_before = time.monotonic() + 0.1 * 2 ** min(self._failed_starts, 8)
        if self._failed_starts >= _MAX_FAILED_STARTS and not any(grader.loaded for grader in self._graders):
            self._failed_starts, self._not_before = 0, _NEVER  # until there is new work
            error = GraderStartError(
                f"{_MAX_FAILED_STARTS} grader processes in a row ended before they could grade: {cause}. "
                "Their output is on this process's standard error; if it says MemoryError, raise "
                f"memory_limit_bytes (now {self._memory_limit_bytes})."
            )
            for waiting in [*self._queue, *self._retries]:
                waiting.job.fail(error)
            self._queue.clear()
            self._retries.clear()

    def _failed(self, case: _Case, cause: str, *, retry_on: deque[_Case]) -> None:
        case.failures += 1
        self.counters["failures"] += 1
        if self.counters["failures"] <= _LOGGED_FAILURES:
            outcome = "it is tried once more" if case.failures < 2 else "it stays ungraded"
            logger.warning("Grading a %r case failed, %s: %s", case.key[0], outcome, cause)
        if case.failures < 2:
            retry_on.append(case)
        else:
            self._finish(case, Grade(None, "ungraded"))

    def _finish(self, case: _Case, verdict: Grade) -> None:
        job = case.job
        if job.done.is_set():
            return
        job.verdicts[case.key] = verdict
        job.remaining -= 1
        if job.remaining == 0:
            job.done.set()

    def _fail_kind(self, kind: str, error: Exception) -> None:
        for queue in (self._queue, self._retries):
            for case in queue:
                if case.key[0] == kind:
                    case.job.fail(error)

    def _discard(self, grader: Grader) -> None:
        """Kill a process; cases it has not begun go back to the head of the queue."""
        self._graders.remove(grader)
        for descriptor in (grader.replies_fd, grader.requests_fd):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
        self._queue.extendleft(reversed(grader.cases))
        grader.kill()
        if not grader.reap():
            self._ending.append(grader)

    def _timeout(self) -> float | None:
        """Seconds until something has to be done even if nothing arrives; None: nothing is under way."""
        moments = [grader.deadline for grader in self._graders if grader.deadline is not None]
        if len(self._graders) < self._processes and self._not_before < _NEVER:
            moments.append(self._not_before)
        if self._ending:
            moments.append(time.monotonic() + _REAP_INTERVAL_S)
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _shut_down(self, error: Exception) -> None:
        with self._lock:
            self._stopping = True
            self._queue.extend(self._inbox)
            self._inbox.clear()
        for grader in self._graders:
            self._queue.extend(grader.cases)
            grader.finish() if grader.idle else grader.kill()
        for case in [*self._queue, *self._retries]:
            case.job.fail(error)
        deadline = time.monotonic() + _STOP_GRACE_S
        for grader in [*self._graders, *self._ending]:
            if not grader.reap(max(0.0, deadline - time.monotonic())):
                grader.kill()
                grader.reap(5.0)
        self._graders, self._ending = [], []
        self._release()

    def _release(self) -> None:
        self._selector.close()
        for descriptor in (self._wake_read, self._wake_write):
            os.close(descriptor)
