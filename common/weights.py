"""The format of published weights: buckets of tensors with a manifest, and the checksum on which both ends must agree.

A transport (`transport.py`) carries the bytes of each bucket. The publication's checksum is made of the fingerprints of
all tensors (`fingerprint.py`), whatever the bucketing, so an engine can compute it from its own parameters after
loading, on the device where they lie.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash

from latent_grpo.common.errors import LatentGRPOError
from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.common.pinned_copy import copy_between
from latent_grpo.common.types import PolicyVersion

NamedTensor = tuple[str, torch.Tensor]
TensorBytes = np.ndarray | torch.Tensor
"""The bytes of a tensor, uint8 [nbytes]: a NumPy array in host memory, a tensor on a device."""


class WeightsCorrupt(LatentGRPOError, ValueError):
    """Published bytes that are not those of their manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlot:
    """A tensor of a bucket."""

    name: str
    dtype: str  # "float32"
    shape: tuple[int, ...]
    nbytes: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketManifest:
    """The tensors of a bucket. A `frozen` one is the same in every publication of its learner."""

    tensors: tuple[TensorSlot, ...]
    frozen: bool = False

    @property
    def nbytes(self) -> int:
        """The size of the bucket's tensors, in bytes."""
        return sum(slot.nbytes for slot in self.tensors)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the bucket, of those of its tensors."""
        return combine_checksums(slot.fingerprint for slot in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """One publication: its version, its buckets, in order, and the transport that carries them."""

    version: PolicyVersion
    buckets: tuple[BucketManifest, ...]
    transport: str = "object_store"

    @property
    def nbytes(self) -> int:
        """The size of all buckets, in bytes."""
        return sum(b.nbytes for b in self.buckets)

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each tensor, by its name."""
        return {slot.name: slot.fingerprint for bucket in self.buckets for slot in bucket.tensors}


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class Publication:
    """One policy version: the manifest and its buckets, whose bytes live as long as a reference to the publication."""

    manifest: WeightManifest
    buckets: tuple[Any, ...]  # what the transport's `receive` finds them by, in the manifest's order

    def of_version(self, version: int) -> Publication:
        """Returns the same weights as another version: a step without an update has the weights of the one before."""
        relabelled = PolicyVersion(version=version, checksum=self.manifest.version.checksum)
        return replace(self, manifest=replace(self.manifest, version=relabelled))


def checksum(tensors: Iterable[NamedTensor]) -> str:
    """Returns the checksum of (name, dtype, shape, bytes) of all tensors, whatever their order and device."""
    return combine_checksums(fingerprint(name, tensor) for name, tensor in tensors)


def combine_checksums(parts: Iterable[str]) -> str:
    """Returns the checksum of tensors that have these fingerprints."""
    return xxhash.xxh3_128_hexdigest("".join(sorted(parts)).encode())


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Returns the tensor's bytes as a flat uint8 array, a view where it lies contiguous in host memory."""
    if tensor.is_cuda:
        on_host = torch.empty(tensor.shape, dtype=tensor.dtype)
        copy_between(tensor.detach().contiguous(), on_host)
        tensor = on_host
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if len(flat) else np.empty(0, np.uint8)


def in_buckets(tensors: Iterable[NamedTensor], bucket_bytes: int) -> Iterator[list[NamedTensor]]:
    """Yields neighbouring tensors, together at most `bucket_bytes`; a larger tensor is a bucket by itself."""
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def describe(bucket: Sequence[NamedTensor], fingerprints: Sequence[str], *, frozen: bool = False) -> BucketManifest:
    """Returns the manifest of a bucket whose tensors have these fingerprints."""
    slots = [
        TensorSlot(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            nbytes=tensor.nbytes,
            fingerprint=found,
        )
        for (name, tensor), found in zip(bucket, fingerprints, strict=True)
    ]
    return BucketManifest(tensors=tuple(slots), frozen=frozen)


def unpack(manifest: BucketManifest, data: Sequence[TensorBytes]) -> list[NamedTensor]:
    """Returns a bucket's tensors as views of `data`, which may be read-only.

    Raises :class:`WeightsCorrupt` where sizes are wrong. Wrong bytes are found by the engine, which reads them anyway
    (`fingerprint.py`).
    """
    expected, found = [slot.nbytes for slot in manifest.tensors], [len(part) for part in data]
    if expected != found:
        raise WeightsCorrupt(
            f"bucket of {len(expected)} tensors from {manifest.tensors[0].name!r}: expected {sum(expected)} bytes, got "
            f"{sum(found)} of {len(found)} tensors; the transfer is damaged, publish again"
        )
    return [(slot.name, _view(slot, part)) for slot, part in zip(manifest.tensors, data, strict=True)]


def _view(slot: TensorSlot, data: TensorBytes) -> torch.Tensor:
    dtype = getattr(torch, slot.dtype)
    if not slot.nbytes:
        return torch.empty(slot.shape, dtype=dtype)
    if isinstance(data, torch.Tensor):
        return data.view(dtype).reshape(slot.shape)
    with warnings.catch_warnings():  # torch only warns about read-only memory; the views are never written
        warnings.simplefilter("ignore", UserWarning)
        raw = torch.from_numpy(data)
    return raw.view(dtype).reshape(slot.shape)
