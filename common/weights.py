"""The format of published weights: flat byte buckets with a manifest, and the checksum on which both ends must agree.

The learner packs them (`pack`), the object store or NCCL carries them, and an engine verifies and unpacks them
(`unpack`). A bucket's checksum catches a damaged transfer before anything is applied. The publication's checksum is
made of the fingerprints of all tensors (`fingerprint.py`), whatever the bucketing, so an engine can compute it from its
own parameters after loading, on the device where they lie.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash

from latent_grpo.common.errors import LatentGRPOError
from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.common.types import PolicyVersion

ALIGNMENT = 64  # bytes; every tensor starts on a boundary that any dtype may be viewed at


class WeightsCorrupt(LatentGRPOError, ValueError):
    """Published bytes that do not match their checksum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlot:
    """The place of a tensor in its bucket."""

    name: str
    dtype: str  # "float32"
    shape: tuple[int, ...]
    offset: int  # bytes
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketManifest:
    nbytes: int
    checksum: str
    tensors: tuple[TensorSlot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """One publication: its version and its buckets, in order."""

    version: PolicyVersion
    buckets: tuple[BucketManifest, ...]

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.buckets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One policy version: the manifest and the buckets, whose bytes live as long as a reference to them."""

    manifest: WeightManifest
    buckets: tuple[Any, ...]  # Ray object references to uint8 arrays [nbytes], in the manifest's order

    def of_version(self, version: int) -> Publication:
        """Returns the same weights as another version: a step without an update has the weights of the one before."""
        relabelled = PolicyVersion(version=version, checksum=self.manifest.version.checksum)
        return replace(self, manifest=replace(self.manifest, version=relabelled))


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Returns the tensor's bytes as a flat uint8 array, a view where it lies contiguous in host memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if len(flat) else np.empty(0, np.uint8)


def checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Returns the checksum of (name, dtype, shape, bytes) of all tensors, whatever their order and device."""
    return combine_checksums(fingerprint(name, tensor) for name, tensor in tensors)


def combine_checksums(parts: Iterable[str]) -> str:
    """Returns the checksum of tensors that have these fingerprints."""
    return xxhash.xxh3_128_hexdigest("".join(sorted(parts)).encode())


def pack(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[tuple[BucketManifest, np.ndarray]]:
    """Yields buckets of about `bucket_bytes` (a larger tensor gets its own): manifest and uint8 array [nbytes]."""
    pending: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        need = _aligned(tensor.numel() * tensor.element_size())
        if pending and size + need > bucket_bytes:
            yield _bucket(pending, size)
            pending, size = [], 0
        pending.append((name, tensor))
        size += need
    if pending:
        yield _bucket(pending, size)


def unpack(manifest: BucketManifest, data: np.ndarray) -> list[tuple[str, torch.Tensor]]:
    """Returns a bucket's tensors as read-only views of `data`. Raises :class:`WeightsCorrupt` before returning any."""
    found = xxhash.xxh3_128_hexdigest(data.data) if len(data) == manifest.nbytes else f"{len(data)} bytes"
    if found != manifest.checksum:
        raise WeightsCorrupt(
            f"bucket of {len(manifest.tensors)} tensors from {manifest.tensors[0].name!r}: expected checksum "
            f"{manifest.checksum} over {manifest.nbytes} bytes, got {found}; the transfer is damaged, publish again"
        )
    if not data.flags.writeable:  # torch only warns about read-only memory; the views below are never written
        data = np.frombuffer(data.data.toreadonly(), dtype=np.uint8)
    return [(slot.name, _view(slot, data)) for slot in manifest.tensors]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _bucket(tensors: list[tuple[str, torch.Tensor]], size: int) -> tuple[BucketManifest, np.ndarray]:
    data = np.zeros(size, dtype=np.uint8)
    slots, offset = [], 0
    for name, tensor in tensors:
        raw = tensor_bytes(tensor)
        data[offset : offset + raw.nbytes] = raw
        dtype = str(tensor.dtype).removeprefix("torch.")
        slots.append(TensorSlot(name=name, dtype=dtype, shape=tuple(tensor.shape), offset=offset, nbytes=raw.nbytes))
        offset += _aligned(raw.nbytes)
    return BucketManifest(nbytes=size, checksum=xxhash.xxh3_128_hexdigest(data.data), tensors=tuple(slots)), data


def _view(slot: TensorSlot, data: np.ndarray) -> torch.Tensor:
    dtype = getattr(torch, slot.dtype)
    if not slot.nbytes:
        return torch.empty(slot.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        raw = torch.from_numpy(data[slot.offset : slot.offset + slot.nbytes])
    return raw.view(dtype).reshape(slot.shape)
