"""How published weights travel from learner rank 0 to the workers: the Protocol, its implementations, the choice.

    rank 0: bucket of tensors ──► send (fingerprints on the way) ──► handle ──► worker: receive ──► the bucket's bytes

`object_store` puts a bucket into Ray's object store, which carries it to any node. `shared_memory`
(`shared_memory.py`) writes it where the workers of the same machine read it without another copy. `collective`
(`collective.py`) sends it to each worker by gloo or NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from latent_grpo.common import collective, shared_memory
from latent_grpo.common.config import WeightsConfig
from latent_grpo.common.errors import ConfigError
from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.common.weights import (
    BucketManifest,
    NamedTensor,
    Publication,
    TensorBytes,
    WeightManifest,
    tensor_bytes,
)


class WeightTransport(Protocol):
    """One way for weights. Rank 0 sends with its own object; every worker receives with its own."""

    name: str

    def send(self, bucket: Sequence[NamedTensor]) -> tuple[list[str], Any]:
        """Copies a bucket's tensors, and returns their fingerprints and a handle, which pickles. Any thread may call.

        The tensors may change afterwards. A handle is of use as long as this object lives.
        """

    def receive(self, handle: Any, bucket: BucketManifest) -> list[TensorBytes]:
        """Returns the bytes of a bucket's tensors, not to be written; they live as long as the arrays.

        Raises Ray's errors for lost objects, :class:`shared_memory.BucketGone`, :class:`collective.LinkLost` or
        ConfigError.
        """

    def keep(self, handles: Collection[Any]) -> None:
        """Says which of the buckets that were sent may still be asked for; the memory of all others is free."""


class ObjectStoreTransport:
    """Ray's object store: an object is the list of a bucket's arrays, which Ray copies once and serves without a copy.

    It lives as long as a reference to it.
    """

    name = "object_store"

    def send(self, bucket: Sequence[NamedTensor]) -> tuple[list[str], Any]:
        import ray

        found = [fingerprint(name, tensor) for name, tensor in bucket]
        return found, ray.put([tensor_bytes(tensor) for _, tensor in bucket])

    def receive(self, handle: Any, bucket: BucketManifest) -> list[TensorBytes]:
        import ray

        data: list[TensorBytes] = ray.get(handle)
        return data

    def keep(self, handles: Collection[Any]) -> None:
        """Ray counts the references."""


TRANSPORTS: dict[str, Callable[[WeightsConfig], WeightTransport]] = {
    "collective": collective.CollectiveTransport,
    "object_store": lambda settings: ObjectStoreTransport(),
    "shared_memory": lambda settings: shared_memory.SharedMemoryTransport(),
}


@dataclass(frozen=True, slots=True)
class TransportChoice:
    """The transport of a run, and why it is the one."""

    name: str
    reason: str

    @property
    def sentence(self) -> str:
        return f"weights travel by {self.name} ({self.reason})"


def choose_transport(weights: WeightsConfig, nodes: int, *, may_grow: bool | None = None) -> TransportChoice:
    """Returns the transport for `weights.transport`, in a Ray of so many nodes.

    `may_grow` says whether others may join (default: those of RAY_ADDRESS may). `auto` never takes the collective: on
    a CPU it is slower than the others (docs/measured.md), and no GPU has run it. Raises ConfigError with the reason for
    a named one that cannot be had.
    """
    wanted = weights.transport
    if may_grow is None:
        may_grow = bool(os.environ.get("RAY_ADDRESS"))
    if wanted == "collective" and (reason := collective.unavailable(weights)):
        raise ConfigError(f"weights.transport collective: {reason}; set it to auto or object_store")
    missing = shared_memory.unavailable()
    if missing is None and nodes > 1:
        missing = f"Ray has {nodes} nodes, and a worker on another than learner rank 0's could not read it"
    if wanted == "shared_memory" and missing is not None:
        raise ConfigError(f"weights.transport shared_memory: {missing}; set it to auto or object_store")
    if wanted == "collective":
        return TransportChoice(wanted, f"weights.transport; weights.backend {weights.backend}")
    if wanted != "auto":
        return TransportChoice(wanted, "weights.transport")
    if missing is None and may_grow:
        missing = "nodes may join this Ray, and a worker on another than learner rank 0's could not read it"
    if missing is not None:
        return TransportChoice("object_store", f"auto: not by shared memory, since {missing}")
    return TransportChoice("shared_memory", "auto: learner and workers share this machine")


class WeightReceiver:
    """A worker's end: it fetches the buckets of publications, and keeps the frozen ones, which come once, on the host.

    An engine reads them again after a failure, and vLLM's compares with them what its layers hold.
    """

    def __init__(self) -> None:
        self._transports: dict[str, WeightTransport] = {}
        self._frozen: dict[str, list[TensorBytes]] = {}  # by fingerprint

    def receive(self, manifest: WeightManifest, handles: Sequence[Any]) -> list[list[TensorBytes]]:
        """Returns the bytes of each bucket's tensors; raises what :meth:`WeightTransport.receive` raises."""
        if manifest.transport not in self._transports:
            self._transports[manifest.transport] = TRANSPORTS[manifest.transport](WeightsConfig())
        transport, held = self._transports[manifest.transport], self._frozen
        frozen: dict[str, list[TensorBytes]] = {}
        buckets = []
        for bucket, handle in zip(manifest.buckets, handles, strict=True):
            found = held.get(bucket.fingerprint) if bucket.frozen else None
            data = transport.receive(handle, bucket) if found is None else found
            if bucket.frozen and found is None:  # a GPU holds them once, in the engine, which compares them each time
                data = [part.cpu() if isinstance(part, torch.Tensor) else part for part in data]
            if bucket.frozen:
                frozen[bucket.fingerprint] = data
            buckets.append(data)
        self._frozen = frozen
        return buckets


def receive(publication: Publication) -> list[list[TensorBytes]]:
    """Returns the bytes of a publication's buckets, as a worker that joins gets them."""
    return WeightReceiver().receive(publication.manifest, publication.buckets)
