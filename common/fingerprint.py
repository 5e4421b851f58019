"""The fingerprint of a tensor: 128 bits of its bytes, computed where it lies (docs/measured.md: how fast).

A publication's two ends compare fingerprints instead of bytes. It is the same integer on every device, since it is made
of int64 arithmetic that wraps around. The bytes, padded with zeros, are read as rows of :data:`WORDS` words of 64 bits.
Each lane sums along one direction, mixes the sums, which is not linear, and adds them up with odd numbers `n` and `m`
that depend on the position::

    w[r, c] ──► rows[r]    = Σ_c w[r, c] ──► lane 0 = Σ_r mix(rows[r]) · n[r]
            └─► columns[c] = Σ_r w[r, c] ──► lane 1 = Σ_c mix(columns[c]) · m[c]

Words are only added, since a CPU multiplies 64-bit integers at a third of the speed at which it adds and reads them.
Up to three wrong words, and two that are exchanged, always change some row's or column's sum, hence a lane, unless its
64 bits collide. Four are missed if they lie in a rectangle and their changes cancel in both of its rows and columns;
what fails in practice (a flipped bit, a part that is missing, old or in another place) does not do that. It finds
damage and mistakes; it is no cryptographic hash and stops nobody who wants a collision.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from latent_grpo.common.pinned_copy import copy_between, flat_bytes

WORDS = 1024  # of a row, 8 bytes each
ROW_BYTES = 8 * WORDS
CPU_ROWS = 64  # at a time: 512 KiB stay in a core's cache between the copy and both lanes
OTHER_ROWS = 4096  # at a time on other devices
UInt64 = npt.NDArray[np.uint64]
_GOLDEN, _FIRST, _SECOND = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # of splitmix64


def fingerprint(name: str, tensor: torch.Tensor) -> str:
    """Returns the fingerprint of a named tensor, 32 hexadecimal digits; its dtype and shape count too."""
    return _named(name, tensor, lanes(tensor))


def copy_with_fingerprint(name: str, source: torch.Tensor, target: torch.Tensor) -> str:
    """Copies `source` into `target`, which has its shape and dtype, and returns the fingerprint of what arrived.

    On the CPU in one pass: a piece is read again while it lies in the cache. Elsewhere `target` is read on its device.
    """
    together = source.device.type == target.device.type == "cpu" and target.is_contiguous() and source.is_contiguous()
    if not together:
        copy_between(source, target)
    return _named(name, target, lanes(target, source if together else None))


@torch.no_grad()
def lanes(
    tensor: torch.Tensor, source: torch.Tensor | None = None, *, piece_rows: int | None = None
) -> tuple[int, int]:
    """Returns both lanes of a tensor's bytes, each from 0 to 2^64 - 1.

    With `source`, of the same shape and dtype, each piece is first copied from there. A tensor that is not contiguous
    is copied whole; every other one is read piece by piece, of `piece_rows`, which do not change the result.
    """
    raw, device = flat_bytes(tensor), tensor.device
    given = None if source is None else flat_bytes(source)
    whole, count = len(raw) // ROW_BYTES, -(-len(raw) // ROW_BYTES)
    rows = torch.empty(count, dtype=torch.int64, device=device)
    columns = torch.zeros(WORDS, dtype=torch.int64, device=device)
    size = piece_rows or (CPU_ROWS if device.type == "cpu" else OTHER_ROWS)
    bounds = [*range(0, whole, size), *([whole] if whole < count else []), count]  # the last row may not be full
    for first, end in itertools.pairwise(bounds):
        piece = raw[first * ROW_BYTES : end * ROW_BYTES]
        if given is not None:
            piece.copy_(given[first * ROW_BYTES : end * ROW_BYTES])
        words = _words(piece)
        rows[first:end] = words.sum(1)
        columns += words.sum(0)
    return _lane(rows, _odd_rows(count.bit_length())[:count]), _lane(columns, _odd_words())


def _lane(sums: torch.Tensor, odd: UInt64) -> int:
    """Returns Σ mix(sum) · odd, on the host: there are few sums, and NumPy takes less time to begin an operation."""
    return int((_mixed(sums.cpu().numpy().view(np.uint64)) * odd).sum(dtype=np.uint64))


def _named(name: str, tensor: torch.Tensor, found: tuple[int, int]) -> str:
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    return xxhash.xxh3_128_hexdigest(f"{name}|{dtype}|{shape}|{found[0]:016x}{found[1]:016x}".encode())


def _words(piece: torch.Tensor) -> torch.Tensor:
    """Returns the rows of a piece, int64 [rows, WORDS]; a last row that is not full is padded with zeros, in a copy."""
    missing = -len(piece) % ROW_BYTES
    if missing:
        piece = torch.nn.functional.pad(piece, (0, missing))
    elif piece.storage_offset() % 8:  # torch views only aligned bytes as words
        piece = piece.clone()
    return piece.view(torch.int64).view(-1, WORDS)


@functools.cache
def _odd_words() -> UInt64:
    return _odd(np.arange(WORDS, dtype=np.uint64))


@functools.cache
def _odd_rows(bits: int) -> UInt64:
    """Returns the numbers of the first 2^bits rows; tensors of like size share one table."""
    return _odd(np.arange(WORDS, WORDS + 2**bits, dtype=np.uint64))


def _odd(positions: UInt64) -> UInt64:
    """Returns an odd number for each position."""
    return _mixed((positions + np.uint64(1)) * _GOLDEN) | np.uint64(1)


def _mixed(words: UInt64) -> UInt64:
    """Returns splitmix64's mixing of each word: a bijection that spreads every bit over all."""
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))
