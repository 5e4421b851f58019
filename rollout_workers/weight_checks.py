"""The check of a publication against its model, with the same errors in both engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from latent_grpo.common.types import PolicyVersion
from latent_grpo.rollout_workers.engine import EngineError


class TensorShape(NamedTuple):
    """The shape and dtype that a model expects of one parameter."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorShape:
        """Returns dtype and shape of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))


def checked_tensors(
    version: PolicyVersion, tensors: Iterable[tuple[str, torch.Tensor]], expected: Mapping[str, TensorShape]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors, each checked before it is yielded, and checks at the end that none is missing.

    Raises EngineError for a tensor that the model does not have or has in another shape or dtype, and for a
    publication that lacks one.
    """
    seen = set()
    for name, tensor in tensors:
        wanted = expected.get(name)
        if wanted is None:
            raise EngineError(f"version {version.version} has a parameter {name!r}, which the model does not have")
        if TensorShape.of(tensor) != wanted:
            raise EngineError(
                f"version {version.version}: {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{wanted.dtype} {wanted.shape}"
            )
        yield name, tensor
        seen.add(name)
    missing = sorted(expected.keys() - seen)
    if missing:
        raise EngineError(f"version {version.version} lacks {len(missing)} parameters, the first {missing[0]!r}")


def check_checksum(version: PolicyVersion, found: str) -> None:
    """Raises EngineError where the checksum `found` is not the publication's."""
    if found != version.checksum:
        raise EngineError(
            f"version {version.version}: expected checksum {version.checksum}, got {found}; publish again"
        )
