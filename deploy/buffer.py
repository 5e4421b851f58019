"""The group buffer: admission, filtering and order of groups. It is pure, without Ray, clock or threads.

A *slot* is the right to hold one group that is not trained on yet. There are (max_staleness + 1) x prompts_per_step of
them; one is taken when a prompt is dispatched and freed when its group is trained on, filtered or dropped. Work is
dispatched only while slots are free, and that alone bounds staleness: with as many slots as a batch has groups, nothing
can be generated while the learner trains (synchronous training is `max_staleness: 0` of the one loop).

Batches are formed in prompt order, not arrival order, so long rollouts are not at a disadvantage, and which prompts a
batch holds depends on the content of the groups alone::

    ordinal   0     1     2     3     4        batch of 2, refill:
    state     kept  drop  kept  ----  kept     {0, 2} now; {3, 4} once 3 has arrived

With a `window` of W, at most `prompts_per_step`, a batch need not wait for long rollouts: of the first W +
`prompts_per_step` groups it takes the first ones in prompt order that have arrived. At most W groups are passed over,
and the next batch waits for them. So no group is trained more than W places before its own, nor more than a batch after
it. The price is a bias to what is quick, and that a group passed over is a version older; both are measured.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import pyarrow as pa

from latent_grpo.common.errors import RunError
from latent_grpo.common.types import GroupRequest


class TooManyDispatched(RunError):
    """Dynamic sampling found too few groups with signal (METHOD §4.3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyBatch:
    """The groups of a batch, and all groups generated for it, filtered ones included; both in prompt order."""

    ordinals: tuple[int, ...]
    groups: tuple[pa.RecordBatch, ...]  # rows in sample order
    generated: tuple[pa.RecordBatch, ...]
    reasons: tuple[str | None, ...]  # of `generated`: why it was filtered; None: it is one of `groups`
    next_ordinal: int  # the first prompt that no batch has consumed: the state a checkpoint keeps
    ahead: tuple[int, ...]  # later prompts that batches have consumed, ascending: the rest of that state
    passed: tuple[bool, ...]  # of `groups`: whether the batch before has passed over it
    dropped: Counter[str]  # reason -> groups, since the previous batch


@dataclass(slots=True)
class _Entry:
    request: GroupRequest
    group: pa.RecordBatch | None = None
    dropped: str | None = None

    @property
    def settled(self) -> bool:
        return self.group is not None or self.dropped is not None


@dataclass(slots=True)
class GroupBuffer:
    """Holds the groups between dispatch and training.

    Without `refill` (`dynamic_sampling: drop`) a batch holds the groups with signal among `prompts_per_step` prompts,
    and may be empty. `next_ordinal` and `ahead` are the state of a :class:`ReadyBatch` that a run goes on from.
    """

    prompts_per_step: int
    max_staleness: int
    refill: bool
    max_dispatch_factor: int
    window: int = 0
    next_ordinal: int = 0  # of the next prompt to dispatch
    ahead: Collection[int] = ()
    _entries: dict[int, _Entry] = field(default_factory=dict)  # by ordinal, dispatched and not consumed
    _by_uid: dict[str, int] = field(default_factory=dict)
    _taken: set[int] = field(default_factory=set)  # consumed, beyond the first that is not
    _training: int = 0  # slots held by the batch at the learner
    _held: int = 0  # entries that take a place in a batch (`_counts`); kept up to date, since every poll asks for it
    _ready: int = 0  # of those, the settled ones
    _settled_since_batch: int = 0
    _dropped: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0

    def __post_init__(self) -> None:
        self._taken = set(self.ahead)
        self._skip_taken()

    @property
    def slots(self) -> int:
        """The number of groups that may be under way: (max_staleness + 1) x prompts_per_step."""
        return (self.max_staleness + 1) * self.prompts_per_step

    @property
    def free_slots(self) -> int:
        """The number of prompts that may be dispatched now."""
        return self.slots - self._held - self._training

    @property
    def next_ordinals(self) -> list[int]:
        """The prompts that may be dispatched now, one for each free slot."""
        later = (ordinal for ordinal in itertools.count(self.next_ordinal) if ordinal not in self._taken)
        return list(itertools.islice(later, max(self.free_slots, 0)))

    @property
    def ready_share(self) -> float:
        """The share of the next batch's groups that have arrived."""
        return min(self._ready / self.prompts_per_step, 1.0)

    def dispatched(self, request: GroupRequest) -> int:
        """Takes a slot for the next prompt; returns its ordinal. Raises :class:`TooManyDispatched`."""
        if self.free_slots <= 0:
            raise RuntimeError(f"no free slot: {self.slots} slots are held; dispatch only while free_slots > 0")
        limit = self.max_dispatch_factor * self.prompts_per_step
        if self._settled_since_batch >= limit:
            raise TooManyDispatched(
                f"{self._settled_since_batch} groups were generated for one batch of {self.prompts_per_step} "
                f"(limit {limit} = max_dispatch_factor x prompts_per_step) and too few had signal; dropped: "
                f"{dict(self._dropped)}. The task is too easy or too hard for the model, or all answers get the same "
                "reward; look at the dumped trajectories, or raise group_size"
            )
        ordinal = self.next_ordinal
        self._entries[ordinal] = _Entry(request)
        self._held += 1
        self._by_uid[request.group_uid] = ordinal
        self.next_ordinal += 1
        self._skip_taken()
        return ordinal

    def _skip_taken(self) -> None:
        while self.next_ordinal in self._taken:
            self.next_ordinal += 1

    def arrived(self, group_uid: str, group: pa.RecordBatch | None, reason: str | None = None) -> str | None:
        """Takes a complete, graded group, with the reason why it teaches nothing; returns why it was dropped, or None.

        `group` is None where its records cannot be used: no batch will hold it, nor a dump. A group that is not
        expected is a duplicate (its worker was declared lost and came back, or it was generated before a restart); it
        is counted and ignored.
        """
        ordinal = self._by_uid.get(group_uid)
        entry = self._entries.get(ordinal) if ordinal is not None else None
        if entry is None or entry.settled:
            self.duplicates += 1
            return "duplicate"
        self._settled_since_batch += 1
        entry.group = group
        self._ready += 1
        if reason is not None:
            entry.dropped = reason
            self._dropped[reason] += 1
            if self.refill:  # another one takes its place
                self._held -= 1
                self._ready -= 1
        return reason

    def take_batch(self) -> ReadyBatch | None:
        """Returns the next batch once it is settled which groups it holds, else None.

        Its slots stay held until `trained`.
        """
        if self._ready < self.prompts_per_step:
            return None
        last = max(self._taken, default=-1)  # what is before it was passed over
        chosen: list[int] = []
        missing = 0
        for ordinal, entry in self._entries.items():  # in prompt order, as they were dispatched
            if not self._counts(entry):
                continue
            if entry.settled:
                chosen.append(ordinal)
            else:
                missing += 1
                if ordinal < last or missing > self.window:
                    return None
            if len(chosen) == self.prompts_per_step:
                return self._take(chosen)
        return None

    def _counts(self, entry: _Entry) -> bool:
        """Whether an entry takes a place in a batch: a group that was dropped does not, where others replace it."""
        return entry.dropped is None or not self.refill

    def _take(self, counted: list[int]) -> ReadyBatch:
        """Makes a batch of the prompts that take its places, and of what was dropped before them and all that wait."""
        taken = set(counted)
        left = (o for o, e in self._entries.items() if self._counts(e) and o not in taken)
        before = min(left, default=counted[-1])
        dropped = {o for o in self._entries if o < min(before, counted[-1]) and not self._counts(self._entries[o])}
        consumed = sorted(dropped.union(counted))
        chosen = [o for o in counted if self._entries[o].dropped is None]
        generated = [entry for o in consumed if (entry := self._entries[o]).group is not None]
        passed = [o < max(self._taken, default=-1) for o in chosen]
        groups, reasons = [self._entries[o].group for o in chosen], [e.dropped for e in generated]
        for ordinal in consumed:
            del self._by_uid[self._entries.pop(ordinal).request.group_uid]
        self._held -= len(counted)
        self._ready -= len(counted)
        first = min(self._entries, default=self.next_ordinal)
        self._taken = {ordinal for ordinal in self._taken.union(consumed) if ordinal > first}
        batch = ReadyBatch(
            ordinals=tuple(chosen),
            groups=tuple(groups),
            generated=tuple(e.group for e in generated),
            reasons=tuple(reasons),
            next_ordinal=first,
            ahead=tuple(sorted(self._taken)),
            passed=tuple(passed),
            dropped=self._dropped,
        )
        self._training += len(counted)
        self._settled_since_batch = sum(1 for e in self._entries.values() if e.settled)
        self._dropped = Counter()
        return batch

    def trained(self, batch: ReadyBatch) -> None:
        """Frees the slots of a batch that the learner has finished (or skipped)."""
        self._training -= len(batch.ordinals) if self.refill else self.prompts_per_step
