"""Grading under limits: a pool of processes that can be killed, behind one blocking call.

    with VerifierPool(processes=2, time_limit_s=5.0) as pool:
        grades = pool.grade_many([("math", response_text, gold), ...])    # the same order as the cases

What needs no limit is decided in the calling process: the kinds `number` and `choice`, and of `math` numbers, words and
identical spellings (`BoxedVerifier.quick_grade`: linear in the text). The rest, and every verifier of the user's,
runs in grader processes that start on first use and stay warm.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

from latent_grpo.reward.answers import BoxedVerifier
from latent_grpo.reward.dispatcher import Dispatcher, Key
from latent_grpo.reward.verifier import REASONS, Definitions, Grade, UnreadableGoldError, judged, load_verifier

logger = logging.getLogger(__name__)

_BUILT_IN_MODULE = "latent_grpo.reward.answers:"
_MIN_MEMORY_BYTES = 64 * 2**20
_MAX_WARNINGS = 20


class VerifierPool:
    """Grades (kind, response text, gold) cases; usable from any thread of the process that made it, Ray actors
    included.

    processes: grader processes, started on first need.
    time_limit_s: wall-clock limit of one case; beyond it the process is killed and the case is `timeout`, reward 0.
    memory_limit_bytes: address-space limit of a process; beyond it the case is `out_of_memory`, reward 0.
    max_response_chars: of a longer response only the end is graded (the last box counts, and it is near the end).
    start_limit_s: how long a process may take to start and import a verifier.
    options: per kind, keyword arguments for the verifier's constructor, e.g. {"number": {"fallback": "last_number"}};
        they must be JSON values.
    definitions: further kinds by name, each {"kind": ..., "options": {...}}; see `reward.verifier.Definitions`.

    A process that ends for another reason than these limits, or a verifier that raises, gets the case once more
    (after a death on a fresh process); if that fails too the verdict is `ungraded` with reward None.
    """

    def __init__(
        self,
        processes: int = 2,
        time_limit_s: float = 5.0,
        memory_limit_bytes: int = 2**30,
        *,
        max_response_chars: int = 200_000,
        start_limit_s: float = 120.0,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        definitions: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        for name, value, least in (
            ("processes", processes, 1),
            ("time_limit_s", time_limit_s, 0.001),
            ("memory_limit_bytes", memory_limit_bytes, _MIN_MEMORY_BYTES),
            ("max_response_chars", max_response_chars, 1),
            ("start_limit_s", start_limit_s, 0.001),
        ):
            if not value >= least:
                raise ValueError(f"VerifierPool: {name} is {value!r}; it must be at least {least}.")
        self._max_response_chars = max_response_chars
        self._definitions = Definitions(definitions, options)
        self._built_in: dict[str, BoxedVerifier | None] = {}
        for kind in [*(options or {}), *(definitions or {})]:
            self._built_in_verifier(kind)  # a wrong kind or option is an error now, and not in the middle of a run
        self._dispatcher = Dispatcher(
            processes=processes,
            time_limit_s=time_limit_s,
            memory_limit_bytes=memory_limit_bytes,
            start_limit_s=start_limit_s,
            definitions=self._definitions,
        )
        self._owner = os.getpid()
        self._reasons: Counter[str] = Counter()
        self._unreadable: set[str] = set()  # golds that were warned of
        self._finalizer = weakref.finalize(self, self._dispatcher.stop)

    def start(self, kinds: Iterable[str] = ("math",)) -> None:
        """Begin to start the processes and to import what these kinds need; returns at once. Optional."""
        self._check_owner()
        wanted = list(kinds)
        for kind in wanted:
            self._definitions.resolve(kind)
        self._dispatcher.start(wanted)

    def grade_many(self, cases: Iterable[tuple[str, str, str]]) -> list[Grade]:
        """The verdicts on (kind, response text, gold) cases, in their order. Equal cases are graded once.

        Blocks until every case has a verdict, which the limits bound. Raises UnknownVerifierError for a kind that
        cannot be loaded, GraderStartError when processes cannot start, RuntimeError when the pool is closed
        meanwhile. A gold that a built-in kind cannot read makes its cases `ungraded`.
        """
        self._check_owner()
        keys = [self._key(index, case) for index, case in enumerate(cases)]
        verdicts: dict[Key, Grade] = {}
        remote: list[Key] = []
        for key in dict.fromkeys(keys):
            verdict = self._quick_grade(key)
            if verdict is None:
                remote.append(key)
            else:
                verdicts[key] = verdict
        if remote:
            job = self._dispatcher.submit(remote)
            try:
                self._dispatcher.wait(job)
            except BaseException:
                job.done.set()  # the caller has gone (Ctrl-C): what is queued for it is dropped
                raise
            verdicts |= job.verdicts
        grades = [verdicts[key] for key in keys]
        self._reasons.update(grade.reason for grade in grades)
        return grades

    def counts(self) -> dict[str, int]:
        """Since the pool was made: verdicts by reason, `processes_started`, `processes_lost` and `failures`."""
        process_counters = ("processes_started", "processes_lost", "failures")
        return {reason: self._reasons[reason] for reason in REASONS} | {
            name: self._dispatcher.counters[name] for name in process_counters
        }

    def process_ids(self) -> list[int]:
        """Ids of the grader processes, for monitoring; empty before the first case that needs one."""
        return self._dispatcher.process_ids()

    def close(self) -> None:
        """End all processes; calls that are waiting raise RuntimeError. Safe to call twice."""
        if os.getpid() == self._owner:
            self._finalizer()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _key(self, index: int, case: tuple[str, str, str]) -> Key:
        if len(case) != 3 or not all(isinstance(part, str) for part in case):
            raise TypeError(f"Case {index} is {case!r:.300}; expected (kind, response text, gold), three strings.")
        kind, response_text, gold = case
        response_text = response_text[-self._max_response_chars :]
        verifier = self._built_in_verifier(kind)
        # The answer alone decides for the built-in kinds: the samples of a group share a grading, and the pipe stays
        # thin.
        return (kind, response_text if verifier is None else verifier.condensed(response_text), gold)

    def _quick_grade(self, key: Key) -> Grade | None:
        kind, response_text, gold = key
        verifier = self._built_in_verifier(kind)
        if verifier is None:
            return None
        try:
            return judged(partial(verifier.quick_grade, response_text), gold)
        except UnreadableGoldError as error:
            self._warn_once(gold, error)
            return Grade(None, "ungraded")

    def _warn_once(self, gold: str, error: UnreadableGoldError) -> None:
        if gold not in self._unreadable and len(self._unreadable) < _MAX_WARNINGS:
            self._unreadable.add(gold)
            logger.warning("%s Its samples stay ungraded.", error)

    def _built_in_verifier(self, kind: str) -> BoxedVerifier | None:
        """The verifier in this process, for a kind that is safe here; None for a user's."""
        if kind not in self._built_in:
            path, options = self._definitions.resolve(kind)
            verifier = load_verifier(path, **options) if path.startswith(_BUILT_IN_MODULE) else None
            self._built_in[kind] = verifier if isinstance(verifier, BoxedVerifier) else None
        return self._built_in[kind]

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError(
                f"This VerifierPool belongs to process {self._owner}, this is {os.getpid()}: a fork does not carry its "
                "thread over. Make a pool in each process."
            )
