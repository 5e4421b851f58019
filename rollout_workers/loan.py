"""Groups that a worker of their own makes with weights that stay, while the others go on (an evaluation, mostly)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from latent_grpo.common.types import GroupRequest
from latent_grpo.common.weights import Publication
from latent_grpo.rollout_workers.member import Member


@dataclass(slots=True)
class Loan:
    """What a pool has lent: one worker at a time, and the weights that it keeps.

    Where that worker is lost or leaves, another one takes its place and loads those weights again.
    """

    publication: Publication
    holder: str  # the name of the worker
    waiting: deque[GroupRequest] = field(default_factory=deque)  # until there is a holder
    uids: set[str] = field(default_factory=set)  # of all groups that were asked for

    def submit(self, requests: Iterable[GroupRequest]) -> None:
        """Takes groups for the lent worker; they wait until it has room."""
        for request in requests:
            self.uids.add(request.group_uid)
            self.waiting.append(request)

    def keeps(self, member: Member) -> bool:
        """Whether this worker must not get other weights now."""
        return member.name == self.holder or not self.uids.isdisjoint(member.groups)

    def dispatch(self, members: dict[str, Member], now: float) -> None:
        """Hands what waits to the holder, which is the last of those that serve if the one before is gone."""
        serving = [member for member in members.values() if not member.leaving]
        if not self.waiting or not serving:
            return
        holder = next((member for member in serving if member.name == self.holder), serving[-1])
        self.holder = holder.name
        if holder.version != self.publication.manifest.version.version:
            holder.send(self.publication, now)
        holder.submit(list(self.waiting), now)
        self.waiting.clear()
