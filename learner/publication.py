"""Publishing a policy: full weights in buckets with fingerprints, by the run's transport."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from latent_grpo.common.config import RunConfig
from latent_grpo.common.model_check import empty_model, read_settings
from latent_grpo.common.models import DTYPES, load_model
from latent_grpo.common.transport import ObjectStoreTransport, WeightTransport
from latent_grpo.common.types import PolicyVersion
from latent_grpo.common.weights import (
    BucketManifest,
    NamedTensor,
    Publication,
    WeightManifest,
    combine_checksums,
    describe,
)

IN_FLIGHT = 2  # buckets that are read and copied at once, beside the one that is gathered
Sent = tuple[BucketManifest, Any]


class Publisher:
    """Rank 0's end of the transport. Tensors that never change, named in `frozen`, are sent with the first publication.

    Later ones refer to them. Every byte is read once for its fingerprint and copied once.
    """

    def __init__(self, transport: WeightTransport, bucket_bytes: int, frozen: Collection[str] = ()) -> None:
        self._transport, self._bucket_bytes = transport, bucket_bytes
        self._frozen_names, self._frozen = frozenset(frozen), list[Sent]()

    def publish(self, tensors: Iterable[NamedTensor], version: int, kept: Collection[Any] = ()) -> Publication:
        """Sends the tensors; those that are frozen may be missing after the first time.

        `kept` are the handles of buckets of earlier publications that may still be asked for.
        """
        self._transport.keep([*kept, *(handle for _, handle in self._frozen)])
        sent = list(self._sent(tensors))
        self._frozen += [pair for pair in sent if pair[0].frozen]
        buckets = [*self._frozen, *(pair for pair in sent if not pair[0].frozen)]
        slots = [slot for bucket, _ in buckets for slot in bucket.tensors]
        policy = PolicyVersion(version=version, checksum=combine_checksums(slot.fingerprint for slot in slots))
        manifest = WeightManifest(
            version=policy, buckets=tuple(bucket for bucket, _ in buckets), transport=self._transport.name
        )
        return Publication(manifest=manifest, buckets=tuple(handle for _, handle in buckets))

    def _sent(self, tensors: Iterable[NamedTensor]) -> Iterator[Sent]:
        """Yields manifest and handle of each bucket, while threads send the next ones."""
        running: deque[Future[Sent]] = deque()
        with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="publish") as senders:
            for bucket, frozen in self._apart(tensors):
                running.append(senders.submit(self._send, bucket, frozen))
                if len(running) > IN_FLIGHT:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def _apart(self, tensors: Iterable[NamedTensor]) -> Iterator[tuple[list[NamedTensor], bool]]:
        """Yields buckets, each all frozen or not at all, with which of both it is; one of each is open at a time."""
        buckets: dict[bool, list[NamedTensor]] = {False: [], True: []}
        sizes = {False: 0, True: 0}
        for name, tensor in tensors:
            frozen = name in self._frozen_names
            if buckets[frozen] and sizes[frozen] + tensor.nbytes > self._bucket_bytes:
                yield buckets[frozen], frozen
                buckets[frozen], sizes[frozen] = [], 0
            buckets[frozen].append((name, tensor))
            sizes[frozen] += tensor.nbytes
        yield from ((bucket, frozen) for frozen, bucket in buckets.items() if bucket)

    def _send(self, bucket: list[NamedTensor], frozen: bool) -> Sent:
        fingerprints, handle = self._transport.send(bucket)
        return describe(bucket, fingerprints, frozen=frozen), handle


def published_bytes(model: str | Path, dtype: str) -> int:
    """Returns the size of one publication of a model (a folder or hub id), in bytes; reads its configuration only."""
    shape = empty_model(read_settings(model), model)
    return sum(p.numel() for p in shape.parameters()) * DTYPES[dtype].itemsize


def publish_model(model: str | Path, version: int, config: RunConfig) -> Publication:
    """Publishes the weights of a finished model, a folder or hub id, that no learner holds, by the object store."""
    loaded = load_model(model, config.model.dtype)
    weights = ((name, parameter.detach()) for name, parameter in loaded.named_parameters())
    return Publisher(ObjectStoreTransport(), config.learner.weight_bucket_bytes).publish(weights, version)
