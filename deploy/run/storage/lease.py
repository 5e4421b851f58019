"""The lease of a remote run: of several drivers, on any machines, one writes into it.

Each writer has an object of its own below `.latent-grpo/writers/`, which it writes anew every `RENEW_S`. `pyarrow.fs`
has no conditional write, and none is needed: whoever begins writes its object first and then lists. A store's list
shows what was written before it, so of two that begin at once, one at least sees the other, and whoever sees another
withdraws. Both may then be refused, but never both go on. Times are the store's own: its clock says when an object was
written. A holder begins no write and no removal once its lease may have run out, by its own clock, which has to run as
fast. What remains is a request that was begun in time and arrives too late: one may take a minute and the library's own
tries, more than `MARGIN_S`. A file that arrives so shows in its hash, and an index as a run that another machine has
continued.
"""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from latent_grpo.deploy.run.folder import LEASE_S, RENEW_S, this_machine
from latent_grpo.deploy.run.storage.index import WRITERS
from latent_grpo.deploy.run.storage.store import NotThere, StorageError, Store, WrittenElsewhere

log = logging.getLogger(__name__)
MARGIN_S = 15.0  # before a lease runs out its holder begins to write nothing more
RELEASE_S = 5.0  # for a renewal that is under way when the lease is given back


class Lease:
    """The right to write into a remote run from the local folder `folder`. `seconds` is how long it lasts unrenewed."""

    def __init__(self, store: Store, folder: Path, *, seconds: float = LEASE_S, look_every_s: float = 2.0):
        self._store, self._seconds, self._look_every_s = store, seconds, look_every_s
        self._place = {"machine": this_machine(), "folder": str(folder.resolve())}
        self._holder = {"host": socket.gethostname(), "pid": os.getpid(), **self._place}
        self._name = f"{WRITERS}/{secrets.token_hex(8)}.json"
        self._renewed_at = -float("inf")
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = False
        """Whether another writer has taken the run over."""

    @property
    def valid(self) -> bool:
        """Whether nobody else can have it: it was renewed, and there is time left."""
        left = self._renewed_at + self._seconds - time.monotonic()
        return not self.lost and not self._over.is_set() and left > min(MARGIN_S, self._seconds / 4)

    def take(self) -> None:
        """Takes the lease, also one that ran out, and renews it from then on.

        Waits until that of a machine that is gone has run out. Raises WrittenElsewhere where another writer renews its
        own, and StorageError.
        """
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        seen: dict[str, float] = {}
        while True:
            began = self._put()
            if not (others := self._others()):
                break
            self._store.remove(self._name)  # two that wait must not see each other
            if new := [name for name, (_, written) in others.items() if seen.get(name, written) != written]:
                raise _in_use(self._store, others[new[0]][0])
            if seen and others.keys() - seen.keys():
                raise _in_use(self._store, others[(others.keys() - seen.keys()).pop()][0])
            seen = {name: written for name, (_, written) in others.items()}
            time.sleep(self._look_every_s)
        self._renewed_at = began  # not before nobody else was found: until then it gives no right
        self._over.clear()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def release(self, *, wait_s: float = RELEASE_S) -> None:
        """Gives the lease back, if the store can be reached; else it runs out. From then on it is not valid."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(wait_s)
            if self._thread.is_alive():  # its renewal would come after the removal
                log.warning("the lease was not given back, since the store does not answer, and runs out by itself")
                return
        try:
            self._store.remove(self._name)
        except StorageError as error:
            log.warning("the lease was not given back and runs out by itself: %s", error)

    def _put(self) -> float:
        """Writes this lease, and returns when it began to: the lease lasts from then on."""
        began, content = time.monotonic(), json.dumps(self._holder).encode()
        self._store.write(self._name, io.BytesIO(content), len(content))
        return began

    def _others(self) -> dict[str, tuple[str, float]]:
        """Returns other leases that may be held: who holds each, and when it was renewed. Removes those that ended."""
        listed, found = self._store.listed(WRITERS), {}
        own = listed.get(self._name)
        for name, entry in listed.items():
            if name == self._name:
                continue
            holder = _holder(self._store, name)
            if holder is None:
                continue
            dead = own is not None and own.written - entry.written > self._seconds
            if dead or all(holder.get(key) == value for key, value in self._place.items()):  # or the lock has decided
                self._store.remove(name)
            else:
                found[name] = (f"process {holder.get('pid')} on {holder.get('host')}", entry.written)
        return found

    def _renew(self) -> None:
        while not self._over.wait(min(RENEW_S, self._seconds / 4)) and self.valid:  # one that ran out is taken anew
            try:
                if self._name not in self._store.listed(WRITERS):
                    self.lost = True
                    return
                self._renewed_at = self._put()
            except StorageError as error:  # told by the upload, which meets the same
                log.debug("the lease was not renewed: %s", error)


def held_by(store: Store, *, seconds: float = LEASE_S) -> str | None:
    """Returns who writes into a remote run now, or None. By this machine's clock: whoever only reads writes nothing."""
    for name, entry in store.listed(WRITERS).items():
        if time.time() - entry.written < seconds and (holder := _holder(store, name)) is not None:
            return f"process {holder.get('pid')} on {holder.get('host')} writes into {store.url}"
    return None


def _holder(store: Store, name: str) -> dict[str, object] | None:
    """Returns who wrote a lease; None where it is gone by now."""
    try:
        found = json.loads(store.read(name))
    except NotThere:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _in_use(store: Store, holder: str) -> WrittenElsewhere:
    return WrittenElsewhere(
        f"{store.url} is written by {holder}: two runs would overwrite each other there. Wait for it to end, or "
        "stop it (it saves a checkpoint) and run this command again; of two that began at once, run one again"
    )
