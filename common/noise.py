"""Keyed Gumbel noise (METHOD §2.5): every draw is a function of identity, never of batch, worker or order."""

from __future__ import annotations

import hashlib
import json
import operator

import torch

from latent_grpo.common.types import Purpose

GUMBEL_LOW, GUMBEL_HIGH = -1.5, 3.0  # METHOD §2.1.3; the one-sided shift is -GUMBEL_LOW


def trajectory_key(
    *, run_seed: int, purpose: str, problem_uid: str, epoch: int, sample_index: int, policy_version: int
) -> int:
    """Returns the key of a trajectory's randomness (METHOD §2.5): an int in [0, 2**63), equal on every machine.

    `policy_version` is that of the rollout's start, 0 in evaluation; `sample_index` is the run or the pass@k sample
    there. Raises TypeError for a number that is not an integer: 1 and 1.0 would be two trajectories.
    """
    numbers = [operator.index(n) for n in (run_seed, epoch, sample_index, policy_version)]  # NumPy's 3 is 3
    identity = json.dumps([str(purpose), str(problem_uid), *numbers]).encode()  # quoted: no two identities read alike
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8, person=b"latent-grpo").digest(), "big") >> 1


def noise_version(purpose: Purpose, version: int) -> int:
    """Returns the policy version that keys a trajectory's noise: that of the rollout's start, and 0 in evaluation.

    Two policies are thus evaluated with the same draws (METHOD §2.5).
    """
    return 0 if purpose == "evaluation" else version


def _signed(word: int) -> int:
    """Returns the int64 with the bits of a uint64."""
    return word - (1 << 64) if word >> 63 else word


_STRIDE = _signed(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: no two steps or ids of nearby keys meet
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Applies SplitMix64's finaliser, a bijection of 64-bit words kept in int64, in place.

    Products wrap modulo 2**64 in int64 as in uint64 (two's complement, CPU and CUDA alike); the shifts of a uint64 are
    those of int64 with the copies of the sign cut off.
    """
    for shift, multiplier in zip((30, 27), _MULTIPLIERS):
        x ^= (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        x *= multiplier
    x ^= (x >> 31).bitwise_and_((1 << 33) - 1)
    return x


def gumbel_noise(keys: torch.Tensor, step: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns standard Gumbel draws, a function of (trajectory key, step, token id) only (METHOD §2.5).

    `keys` [N] int64 (:func:`trajectory_key`), `step` [N] int64, `ids` [N, M] int64 -> float32 [N, M] in [-3.61, 36.8].
    The integers behind the draws are the same on every device. All 63 bits of a key count.
    """
    row = _mix((step + 1) * _STRIDE + keys)
    bits = _mix(ids * _STRIDE + row.unsqueeze(-1))
    # u in (0, 1): 52 bits and a half, exact in float64, so that the top word does not round to u = 1 (noise +inf)
    uniform = (bits >> 11).bitwise_and_((1 << 53) - 1).bitwise_or_(1).double().mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_().float()
