"""Publishing a policy: full weights as checksummed byte buckets in Ray's object store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import ray
import torch

from latent_grpo.common.types import PolicyVersion
from latent_grpo.common.weights import Publication, WeightManifest, combine_checksums, pack, tensor_checksum


def publish(tensors: Iterable[tuple[str, torch.Tensor]], version: int, bucket_bytes: int) -> Publication:
    """Packs and puts; called on rank 0. NumPy arrays, since Ray copies those once and serves them without a copy."""
    parts: list[str] = []

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            parts.append(tensor_checksum(name, tensor))
            yield name, tensor

    manifests, refs = [], []
    for manifest, data in pack(counted(), bucket_bytes):
        manifests.append(manifest)
        refs.append(ray.put(data))
    policy = PolicyVersion(version=version, checksum=combine_checksums(parts))
    return Publication(manifest=WeightManifest(version=policy, buckets=tuple(manifests)), buckets=tuple(refs))
