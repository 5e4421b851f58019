"""Weights by torch.distributed: learner rank 0 and a worker are a process group of two, by gloo or NCCL.

    worker: receive ── question (store) ──► rank 0: a thread for each worker
                    ◄── bytes (group) ───── of a copy, so that the learner's next step goes on meanwhile

The groups have a store of their own and know nothing of the ranks' default group, which is DeepSpeed's. They are
pairs and not one group of all, since in pairs nobody waits for anybody: a worker asks when it is ready; one that joins
late asks for the same buckets as the others; one that dies, stands still or leaves breaks its own group alone, so a
change of membership rebuilds nothing else. The price is that rank 0 sends every byte once for each worker: where many
workers share nodes, the object store, which fetches once a node, sends less.

Every bucket has a deadline at both ends (`weights.timeout_s`). The end that misses it gives the group up. A worker then
makes a new one and asks again, unless Ray says that the learner is dead. What arrives is verified by its fingerprints
like that of every transport.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.distributed

from latent_grpo.common.config import WeightsConfig
from latent_grpo.common.errors import RunError
from latent_grpo.common.fingerprint import copy_with_fingerprint
from latent_grpo.common.network import address_of, own_address, serve_store
from latent_grpo.common.shared_memory import BucketGone, layout
from latent_grpo.common.weights import BucketManifest, NamedTensor, TensorBytes

log = logging.getLogger(__name__)
dist: Any = torch.distributed  # whose types lack stores, groups and their methods
PAUSES_S = (1.0, 2.0, 4.0)  # before another group is tried for a bucket; Ray learns of a death meanwhile
IDLE_S = 3600.0  # after which rank 0 ends a group that asks for nothing; the worker then makes another
GONE = -1  # instead of a bucket's size
FIRST, NEXT = "first", "next"  # questions of a group


class LinkLost(RunError):
    """Weights that did not reach a worker though the learner lives."""


@dataclass(frozen=True, slots=True)
class CollectiveBucket:
    """Bucket `number` of the sender that `token` names, whose store listens at `address` and `port`."""

    address: str
    port: int
    token: str
    number: int
    backend: str
    interface: str | None
    timeout_s: float
    alive: Any  # a Ray object of the sender's, by which Ray says if that is dead; None without Ray


class CollectiveTransport:
    """Implements :class:`transport.WeightTransport` between any nodes."""

    name = "collective"

    def __init__(self, settings: WeightsConfig | None = None, pauses_s: Sequence[float] = PAUSES_S) -> None:
        self._settings, self._pauses_s = settings or WeightsConfig(), pauses_s
        self.sender: Sender | None = None  # of rank 0
        self._group: tuple[str, Asking] | None = None  # of a worker, with the sender's token
        self._lock = threading.Lock()

    def send(self, bucket: Sequence[NamedTensor]) -> tuple[list[str], CollectiveBucket]:
        """Copies a bucket for those who will ask for it; see :meth:`transport.WeightTransport.send`."""
        with self._lock:
            if self.sender is None:
                self.sender = Sender(self._settings)
                weakref.finalize(self, self.sender.close)
        return self.sender.offer(bucket)

    def keep(self, handles: Collection[CollectiveBucket]) -> None:
        """Takes back the memory of all other buckets; see :meth:`transport.WeightTransport.keep`."""
        if self.sender is not None:
            self.sender.keep(handles)

    def receive(self, handle: CollectiveBucket, bucket: BucketManifest) -> list[TensorBytes]:
        """Asks rank 0 for a bucket; see :meth:`transport.WeightTransport.receive`.

        Raises :class:`LinkLost` where other groups did not get it either, and Ray's error if the learner is dead.
        """
        starts, size = layout([slot.nbytes for slot in bucket.tensors])
        with self._lock:  # a worker may fetch several publications at once
            data = self._asked(handle, size)
        if data.device.type == "cpu":
            array = data.numpy()
            array.flags.writeable = False
            return [array[at : at + slot.nbytes] for at, slot in zip(starts, bucket.tensors, strict=True)]
        return [data[at : at + slot.nbytes] for at, slot in zip(starts, bucket.tensors, strict=True)]

    def _asked(self, handle: CollectiveBucket, size: int) -> torch.Tensor:
        """Returns the bytes [size] of a bucket, by the group that there is or another one."""
        for pause_s in (*self._pauses_s, None):
            try:
                if self._group is None or self._group[0] != handle.token:
                    self._group = handle.token, Asking(handle)
                return self._group[1].ask(handle.number, size)
            except (OSError, RuntimeError) as error:  # torch's are of the latter: a peer is dead, late or not reached
                self._group, reason = None, _first_line(error)
            log.warning("weights: the group with the learner is given up: %s", reason)
            if pause_s is not None:
                time.sleep(pause_s)
            if handle.alive is not None:
                import ray

                ray.get(handle.alive, timeout=handle.timeout_s)  # raises if the learner is dead
        raise LinkLost(
            f"the learner at {handle.address} did not send {size} bytes in {1 + len(self._pauses_s)} attempts, "
            f"each at most {handle.timeout_s:g} s (weights.timeout_s): {reason}; see that the nodes reach each other "
            "(weights.interface), or set weights.transport to object_store"
        )


class Asking:
    """A worker's end of its group. It names it, and rank 0 makes the other end with the first question."""

    def __init__(self, handle: CollectiveBucket) -> None:
        self._handle, self._timeout = handle, timedelta(seconds=handle.timeout_s)
        with socket.create_connection((handle.address, handle.port), handle.timeout_s):
            pass  # a store would try again until its timeout, though nobody listens
        self._store = dist.TCPStore(handle.address, handle.port, timeout=self._timeout)
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._pair: Pair | None = None

    def begin(self, number: int) -> Pair:
        """Asks for a bucket; what the group carries next are its size or GONE, and its bytes."""
        handle = self._handle
        self._store.queue_push(handle.token, f"{self._name} {number} {NEXT if self._pair else FIRST}")
        if self._pair is None:
            own = address_of(handle.interface) if handle.interface else own_address(handle.address, handle.port)
            self._pair = Pair(self._store, self._name, 1, own or handle.address, handle.backend, self._timeout)
        return self._pair

    def ask(self, number: int, size: int) -> torch.Tensor:
        """Returns the bytes [size] of a bucket.

        Raises BucketGone, and RuntimeError for a broken group, which is out of step too where the bucket has another
        size: its bytes are on their way.
        """
        pair = self.begin(number)
        found = pair.word()
        if found == GONE:
            raise BucketGone(f"weights: bucket {number} is not kept any more; publish again")
        if found != size:
            raise RuntimeError(f"bucket {number} has {found} bytes, expected {size}")
        return pair.receive(size)


class Sender:
    """Rank 0's end: what may be asked for, and a thread for each worker that asks."""

    def __init__(self, settings: WeightsConfig) -> None:
        self._settings, self._device = settings, "cuda" if settings.backend == "nccl" else "cpu"
        self._address = address_of(settings.interface) if settings.interface else _node_address()
        self._timeout, self._token = timedelta(seconds=settings.timeout_s), secrets.token_hex(8)
        self._store = serve_store(self._address, 0, self._timeout)
        self._lock = threading.RLock()  # the garbage collector may call `close` in a thread that holds it
        self.offered: dict[int, torch.Tensor] = {}
        self._free: list[torch.Tensor] = []
        self._numbers = 0
        self.serving: dict[str, tuple[SimpleQueue[int | None], threading.Thread]] = {}  # by the group's name
        self._listener = threading.Thread(target=self._listen, name="weights", daemon=True)
        self._listener.start()

    def offer(self, bucket: Sequence[NamedTensor]) -> tuple[list[str], CollectiveBucket]:
        starts, size = layout([tensor.nbytes for _, tensor in bucket])
        buffer, found = self._buffer(size), []
        for (name, tensor), at in zip(bucket, starts, strict=True):
            place = buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            found.append(copy_with_fingerprint(name, tensor.detach(), place))
        with self._lock:
            number, self._numbers = self._numbers, self._numbers + 1
            self.offered[number] = buffer
        return found, CollectiveBucket(
            self._address, self._store.port, self._token, number, self._settings.backend, self._settings.interface,
            self._settings.timeout_s, _sign_of_life(number),
        )  # fmt: skip

    def keep(self, handles: Collection[CollectiveBucket]) -> None:
        """Frees the memory of other buckets, which is written again: fresh pages cost as much as the copy.

        A thread may still send from it to a worker that the pool has given up and killed.
        """
        numbers = {handle.number for handle in handles if handle.token == self._token}
        with self._lock:
            self._free = [self.offered.pop(number) for number in self.offered.keys() - numbers]

    def _buffer(self, size: int) -> torch.Tensor:
        """Returns memory for a bucket, uint8 [size]."""
        with self._lock:
            fitting = [i for i, free in enumerate(self._free) if size <= len(free) <= 2 * size]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: len(self._free[i])))[:size]
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def close(self) -> None:
        """Ends all threads, at the latest at the exit of Python, which aborts if one still waits in torch.

        A thread that sends to a worker that stands still ends with its deadline: torch has no other way to end it.
        """
        self._store.queue_push(self._token, "")
        with self._lock:
            threads = [self._listener, *(thread for _, thread in self.serving.values())]
            for questions, _ in self.serving.values():
                questions.put(None)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(2 * self._timeout.total_seconds())  # it ends a little after its deadline

    def _listen(self) -> None:
        """Hands each question, a group's name and a bucket's number, to the thread of that group."""
        store = dist.TCPStore(self._address, self._store.port, timeout=timedelta(days=7))
        while True:
            try:
                question = store.queue_pop(self._token).decode()
            except dist.DistStoreError:  # nobody has asked for so long
                continue
            if not question:
                return
            name, number, which = question.split()
            with self._lock:
                if which == FIRST:
                    questions = SimpleQueue[int | None]()
                    thread = threading.Thread(
                        target=self._serve, args=(name, questions), name=f"weights to {name}", daemon=True
                    )
                    self.serving[name] = questions, thread
                    thread.start()
                if name in self.serving:  # else the group has been given up, which its worker sees by itself
                    self.serving[name][0].put(int(number))

    def _serve(self, name: str, questions: SimpleQueue[int | None]) -> None:
        """Sends to one worker what it asks for, until it asks no more or something fails."""
        try:
            store = dist.TCPStore(self._address, self._store.port, timeout=self._timeout)
            pair = Pair(store, name, 0, self._address, self._settings.backend, self._timeout)
            while (number := questions.get(timeout=IDLE_S)) is not None:
                self._answer(pair, number)
        except Empty:
            log.debug("weights: worker %s has asked for nothing for %g s", name, IDLE_S)
        except RuntimeError as error:  # torch's, for a worker that is dead, late or not to be reached
            log.warning("weights: the group with worker %s is given up: %s", name, _first_line(error))
        finally:
            with self._lock:
                del self.serving[name]

    def _answer(self, pair: Pair, number: int) -> None:
        with self._lock:
            data = self.offered.get(number)
        pair.tell(GONE if data is None else len(data))
        if data is not None:
            pair.send(data)


class Pair:
    """The process group of a learner's rank 0, which is 0, and a worker, 1. After any error it is broken for good."""

    def __init__(self, store: Any, name: str, rank: int, own: str, backend: str, timeout: timedelta) -> None:
        store = dist.PrefixStore(name, store)
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._timeout = [dist.ProcessGroupGloo.create_device(hostname=own)], timeout
        self._words = dist.ProcessGroupGloo(store, rank, 2, options)
        self._nccl = _nccl_group(dist.PrefixStore("nccl", store), rank, timeout) if backend == "nccl" else None
        self._peer, self._timeout = 1 - rank, timeout

    def receive(self, size: int) -> torch.Tensor:
        """Returns the bytes [size] that the other end sends."""
        data = torch.empty(size, dtype=torch.uint8, device="cpu" if self._nccl is None else "cuda")
        if size:
            self._carry((self._nccl or self._words).recv, data)
        return data

    def send(self, data: torch.Tensor) -> None:
        if len(data):
            self._carry((self._nccl or self._words).send, data)

    def tell(self, number: int) -> None:
        self._words.send([torch.tensor([number])], self._peer, 1).wait(self._timeout)

    def word(self) -> int:
        """Returns the number that the other end tells."""
        number = torch.zeros(1, dtype=torch.int64)
        self._words.recv([number], self._peer, 1).wait(self._timeout)
        return int(number)

    def _carry(self, method: Callable[[list[torch.Tensor], int, int], Any], data: torch.Tensor) -> None:
        if self._nccl is None:
            method([data], self._peer, 0).wait(self._timeout)
            return

        def carried() -> None:
            work = method([data], self._peer, 0)
            while not work.is_completed():  # its own wait would only make a stream wait
                time.sleep(0.001)

        try:
            finish_within(self._timeout.total_seconds(), carried)
        except TimeoutError:
            self._nccl.abort()
            raise RuntimeError(f"NCCL did not carry a bucket within {self._timeout.total_seconds():g} s") from None


def finish_within(seconds: float, call: Callable[[], None]) -> None:
    """Makes a call in a thread of its own, since NCCL connects in its first one, which may wait for a peer for ever.

    Raises what `call` raises, and TimeoutError for one that goes on, which is left to itself.
    """
    done = Future[None]()

    def make() -> None:
        try:
            call()
            done.set_result(None)
        except BaseException as error:  # raised again below, in the thread that asked
            done.set_exception(error)

    threading.Thread(target=make, name="nccl", daemon=True).start()
    done.result(seconds)


def unavailable(settings: WeightsConfig) -> str | None:
    """Returns why these settings cannot be had with this build of torch, or None."""
    if not dist.is_available() or not dist.is_gloo_available():
        return "this build of torch has no gloo"
    if settings.backend == "nccl" and not dist.is_nccl_available():
        return "weights.backend is nccl, and this build of torch has no NCCL"
    return None


def _nccl_group(store: Any, rank: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 10 * timeout  # of torch's watchdog, which ends the process: this group's own deadline is first
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address()) if ray.is_initialized() else "127.0.0.1"


def _sign_of_life(number: int) -> Any:
    import ray

    return ray.put(number) if ray.is_initialized() else None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
