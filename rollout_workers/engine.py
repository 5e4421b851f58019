"""The interface of a rollout engine, which is all that workers know of it.

An engine decodes many samples side by side: groups are added at any time, `step` advances every running sample by
one response step, and a group is returned once, when its last sample has finished. Which samples share a batch must
not change any of them (METHOD §2.5).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from latent_grpo.common.errors import RunError
from latent_grpo.common.types import GroupRequest, PolicyVersion, Trajectory

if TYPE_CHECKING:
    from latent_grpo.rollout_workers.requests import SampleRecord


class EngineError(RunError):
    """The engine cannot do what was requested; the message says why and what to change."""


class RequestRefused(EngineError):
    """A request that this engine can never serve; sending it to another engine would not help."""


class LatentEngine(Protocol):
    """Implemented by :class:`~rollout_workers.transformers_engine.TransformersEngine` and the vLLM engine."""

    name: str

    @property
    def version(self) -> PolicyVersion | None:
        """The version of its weights; None until the first `load_weights`, before which it refuses to sample."""

    @property
    def pending(self) -> int:
        """The number of samples that were added and have not finished."""

    def add(self, request: GroupRequest) -> None:
        """Queues a group. Raises :class:`RequestRefused`, and queues nothing, for one that it cannot serve."""

    def step(self) -> list[tuple[Trajectory, ...]]:
        """Advances all running samples by one response step; returns the groups that this step completed.

        Trajectories hold everything but text and grade, in the order of `request.sample_indices`.
        """

    def partial(self, group_uid: str, position: int) -> SampleRecord | None:
        """Returns the record so far of a running sample, by its place in its request; None for any other."""

    def load_weights(
        self, version: PolicyVersion, tensors: Iterable[tuple[str, torch.Tensor]], unchanged: Collection[str] = ()
    ) -> None:
        """Replaces all parameters in place, then verifies the checksum of what it now holds.

        Those named in `unchanged` have the bytes that it was given last; what it still holds it need not load again.
        Raises :class:`EngineError` while samples are pending (unless it was made to take weights in flight), when a
        parameter is missing, unknown or of another shape, and when the checksum differs; after a failure the engine has
        no version and refuses to sample.
        """

    def abort(self) -> None:
        """Drops all pending samples; their groups are never returned."""

    def close(self) -> None:
        """Frees memory and processes. Idempotent."""


def generate(engine: LatentEngine, requests: Iterable[GroupRequest]) -> Iterator[tuple[Trajectory, ...]]:
    """Yields all groups of `requests`, in order of completion."""
    for request in requests:
        engine.add(request)
    while engine.pending:
        yield from engine.step()
