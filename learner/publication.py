"""Publishing a policy: full weights as checksummed byte buckets in Ray's object store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import ray
import torch

from latent_grpo.common.config import RunConfig
from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.common.model_check import empty_model, read_settings
from latent_grpo.common.models import DTYPES, load_model
from latent_grpo.common.types import PolicyVersion
from latent_grpo.common.weights import Publication, WeightManifest, combine_checksums, pack


def publish(tensors: Iterable[tuple[str, torch.Tensor]], version: int, bucket_bytes: int) -> Publication:
    """Packs the tensors and puts them into the object store; rank 0 calls it.

    Buckets are NumPy arrays, since Ray copies those once and serves them without a copy.
    """
    parts: list[str] = []

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            parts.append(fingerprint(name, tensor))
            yield name, tensor

    manifests, refs = [], []
    for manifest, data in pack(counted(), bucket_bytes):
        manifests.append(manifest)
        refs.append(ray.put(data))
    policy = PolicyVersion(version=version, checksum=combine_checksums(parts))
    return Publication(manifest=WeightManifest(version=policy, buckets=tuple(manifests)), buckets=tuple(refs))


def published_bytes(model: str | Path, dtype: str) -> int:
    """Returns the size of one publication of a model (a folder or hub id), in bytes; reads its configuration only."""
    shape = empty_model(read_settings(model), model)
    return sum(p.numel() for p in shape.parameters()) * DTYPES[dtype].itemsize


def publish_model(model: str | Path, version: int, config: RunConfig) -> Publication:
    """Publishes the weights of a finished model, a folder or hub id, that no learner holds."""
    loaded = load_model(model, config.model.dtype)
    weights = ((name, parameter.detach()) for name, parameter in loaded.named_parameters())
    return publish(weights, version, config.learner.weight_bucket_bytes)
