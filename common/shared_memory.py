"""Weights by shared memory: learner rank 0 writes a bucket once, and the workers of its machine map the same pages.

A bucket is anonymous memory (`memfd_create`), which others of the same user open as `/proc/PID/fd/N`. It has no name
in /dev/shm, so nothing is left there, whoever is killed and when: the kernel frees the pages with the last descriptor
and mapping. What a worker has mapped stays valid without the learner.

A worker holds a shared lock on a bucket while it has it mapped. Rank 0 writes into a bucket again if nobody may ask for
it any more (:meth:`SharedMemoryTransport.keep`) and nobody holds the lock: fresh pages cost as much as the copy.
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import secrets
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from latent_grpo.common.errors import ConfigError, LatentGRPOError
from latent_grpo.common.fingerprint import copy_with_fingerprint
from latent_grpo.common.weights import BucketManifest, NamedTensor, TensorBytes

ALIGNMENT = 64  # bytes; every tensor starts on a boundary that any dtype may be viewed at
NAME = "latent-grpo-weights"


class BucketGone(LatentGRPOError):
    """A bucket that does not exist any more: the learner that held it has ended."""


@dataclass(frozen=True, slots=True)
class SharedBucket:
    """Where a bucket lies: in descriptor `fd` of process `pid`, on a machine that `machine` tells from others."""

    machine: str
    pid: int
    fd: int
    token: str  # of the memory's name, since numbers of processes and descriptors are used again


class _Buffer:
    """A bucket's memory in the process that writes it."""

    def __init__(self, size: int) -> None:
        self.size, self.token = size, secrets.token_hex(8)
        self.fd = os.memfd_create(f"{NAME}-{self.token}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            self.memory = torch.frombuffer(mmap.mmap(self.fd, size), dtype=torch.uint8)
        except BaseException:
            os.close(self.fd)
            raise

    def unread(self) -> bool:
        """Whether no other process has it mapped."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        return True

    def close(self) -> None:
        del self.memory
        os.close(self.fd)


class SharedMemoryTransport:
    """Implements :class:`transport.WeightTransport` between the processes of one machine and one user."""

    name = "shared_memory"

    def __init__(self) -> None:
        self._given: dict[SharedBucket, _Buffer] = {}
        self._free: list[_Buffer] = []
        self._lock = threading.Lock()

    def send(self, bucket: Sequence[NamedTensor]) -> tuple[list[str], SharedBucket]:
        """Copies a bucket into memory that others map; see :meth:`transport.WeightTransport.send`."""
        offsets, size = layout([tensor.nbytes for _, tensor in bucket])
        buffer = self._buffer(max(size, 1))
        found = []
        for (name, tensor), offset in zip(bucket, offsets, strict=True):
            place = buffer.memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            found.append(copy_with_fingerprint(name, tensor.detach(), place))
        handle = SharedBucket(_machine(), os.getpid(), buffer.fd, buffer.token)
        with self._lock:
            self._given[handle] = buffer
        return found, handle

    def receive(self, handle: SharedBucket, bucket: BucketManifest) -> list[TensorBytes]:
        """Maps a bucket; see :meth:`transport.WeightTransport.receive`."""
        offsets, size = layout([slot.nbytes for slot in bucket.tensors])
        if handle.machine != _machine():
            raise ConfigError(
                "weights.transport shared_memory: this worker is on another machine than learner rank 0, or in another "
                "container; set it to auto or object_store"
            )
        path = f"/proc/{handle.pid}/fd/{handle.fd}"
        try:
            name = os.readlink(path)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if handle.token in name else None
        except (FileNotFoundError, ProcessLookupError):
            fd = None
        if fd is None:
            raise BucketGone(f"the weights of process {handle.pid} are gone: the learner that held them has ended")
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)  # until the mapping ends, whose own descriptor shares the lock
            if handle.token not in os.readlink(f"/proc/self/fd/{fd}"):
                raise BucketGone(f"the weights of process {handle.pid} are gone: another learner has its number")
            # all pages at once: faults one after the other cost a fifth of what loading takes
            pages = mmap.mmap(fd, max(size, 1), mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
            data = np.frombuffer(pages, dtype=np.uint8)
        finally:
            os.close(fd)
        return [data[at : at + slot.nbytes] for at, slot in zip(offsets, bucket.tensors, strict=True)]

    def keep(self, handles: Collection[SharedBucket]) -> None:
        """Takes back the memory of all other buckets; see :meth:`transport.WeightTransport.keep`.

        What nobody took again since the last call is given to the system.
        """
        with self._lock:
            unused, self._free = self._free, []
            for handle in self._given.keys() - set(handles):
                self._free.append(self._given.pop(handle))
        for buffer in unused:
            buffer.close()

    def _buffer(self, size: int) -> _Buffer:
        with self._lock:
            fitting = sorted((b for b in self._free if size <= b.size <= 2 * size), key=lambda b: b.size)
            for buffer in fitting:
                if buffer.unread():
                    self._free.remove(buffer)
                    return buffer
        return _Buffer(size)


def unavailable() -> str | None:
    """Returns why this machine has no such memory, or None if it has it."""
    if not hasattr(os, "memfd_create") or not Path("/proc/self/fd").is_dir():
        return "this system has no memfd_create or no /proc, which Linux has"
    try:
        os.close(os.memfd_create(NAME, os.MFD_CLOEXEC))
    except OSError as error:
        return f"the system refuses memfd_create ({error})"
    return None


@functools.cache
def _machine() -> str:
    """Returns a text that two processes share if one sees the other's /proc: same boot, same process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Returns where tensors of these sizes begin in a bucket, and the bucket's size, in bytes."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end
