"""The fingerprint of a tensor: 128 bits of its bytes, computed where it lies (docs/measured.md: how fast).

A publication's two ends compare fingerprints instead of bytes. It is the same integer on every device, since it is made
of int64 arithmetic that wraps around. The bytes, padded with zeros, are read as rows of :data:`WORDS` words of 64 bits,
and each lane is a sum along one direction, then a mixing of the sums that is not linear, then a sum of those::

    w[r, c] ──► rows[r]    = Σ_c w[r, c] · m[c] ──► lane 0 = Σ_r mix(rows[r]) · n[r]
            └─► columns[c] = Σ_r w[r, c] · n[r] ──► lane 1 = Σ_c mix(columns[c]) · m[c]

`m` and `n` are odd numbers that depend on the position. An odd number times a difference is never 0, so a single wrong
word changes both lanes' sums, and two exchanged words of one row or one column, between which one linear sum may fail
(`(a - b) · (m[i] - m[j])` may be a multiple of 2^64), are seen by the other lane. It finds damage and mistakes; it is
no cryptographic hash and stops nobody who wants a collision.
"""

from __future__ import annotations

import functools
import itertools

import torch
import xxhash

WORDS = 2048  # of a row, 8 bytes each
ROW_BYTES = 8 * WORDS
CPU_ROWS = 64  # at a time: 1 MiB stays in a core's cache between the copy and both lanes
OTHER_ROWS = 4096  # at a time on other devices, whose products are temporary tensors: 64 MiB
_MASK = 2**64 - 1
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of splitmix64, as int64


def fingerprint(name: str, tensor: torch.Tensor) -> str:
    """Returns the fingerprint of a named tensor, 32 hexadecimal digits; its dtype and shape count too."""
    return _named(name, tensor, lanes(tensor))


def copy_with_fingerprint(name: str, source: torch.Tensor, target: torch.Tensor) -> str:
    """Copies `source` into `target`, which has its shape and dtype, and returns the fingerprint of what arrived.

    On the CPU in one pass: a piece is read again while it lies in the cache. Elsewhere `target` is read on its device.
    """
    together = source.device.type == target.device.type == "cpu" and target.is_contiguous() and source.is_contiguous()
    if not together:
        target.copy_(source)
    return _named(name, target, lanes(target, source if together else None))


@torch.no_grad()
def lanes(
    tensor: torch.Tensor, source: torch.Tensor | None = None, *, piece_rows: int | None = None
) -> tuple[int, int]:
    """Returns both lanes of a tensor's bytes, each from 0 to 2^64 - 1.

    With `source`, of the same shape and dtype, each piece is first copied from there. A tensor that is not contiguous
    is copied whole; every other one is read piece by piece, of `piece_rows`, which do not change the result.
    """
    raw, device = _bytes(tensor), tensor.device
    given = None if source is None else _bytes(source)
    whole, count = len(raw) // ROW_BYTES, -(-len(raw) // ROW_BYTES)
    across, down = _odd_words(device), _odd_rows(device, count.bit_length())[:count]
    rows, columns = torch.empty(count, dtype=torch.int64, device=device), torch.zeros_like(across)
    sums = matrix_sums if device.type == "cpu" else elementwise_sums
    size = piece_rows or (CPU_ROWS if device.type == "cpu" else OTHER_ROWS)
    bounds = [*range(0, whole, size), *([whole] if whole < count else []), count]  # the last row may not be full
    for first, end in itertools.pairwise(bounds):
        piece = raw[first * ROW_BYTES : end * ROW_BYTES]
        if given is not None:
            piece.copy_(given[first * ROW_BYTES : end * ROW_BYTES])
        rows[first:end], added = sums(_words(piece), across, down[first:end])
        columns += added
    first_lane, second_lane = (_mixed(rows) * down).sum(), (_mixed(columns) * across).sum()
    return int(first_lane) & _MASK, int(second_lane) & _MASK


def matrix_sums(words: torch.Tensor, across: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sums of the rows [R] and of the columns [C] of int64 `words` [R, C], by products of matrices."""
    return torch.mv(words, across), torch.mv(words.t(), down)


def elementwise_sums(
    words: torch.Tensor, across: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the same as :func:`matrix_sums` where the device multiplies no matrices of integers, as CUDA."""
    return (words * across).sum(1), (words * down[:, None]).sum(0)


def _named(name: str, tensor: torch.Tensor, found: tuple[int, int]) -> str:
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    return xxhash.xxh3_128_hexdigest(f"{name}|{dtype}|{shape}|{found[0]:016x}{found[1]:016x}".encode())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's bytes [nbytes], a view where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if len(flat) else torch.empty(0, dtype=torch.uint8, device=flat.device)


def _words(piece: torch.Tensor) -> torch.Tensor:
    """Returns the rows of a piece, int64 [rows, WORDS]; a last row that is not full is padded with zeros, in a copy."""
    missing = -len(piece) % ROW_BYTES
    if missing:
        piece = torch.nn.functional.pad(piece, (0, missing))
    elif piece.storage_offset() % 8:  # torch views only aligned bytes as words
        piece = piece.clone()
    return piece.view(torch.int64).view(-1, WORDS)


@functools.cache
def _odd_words(device: torch.device) -> torch.Tensor:
    return _odd(torch.arange(WORDS, device=device))


@functools.cache
def _odd_rows(device: torch.device, bits: int) -> torch.Tensor:
    """Returns the numbers of the first 2^bits rows; tensors of like size share one table."""
    return _odd(torch.arange(WORDS, WORDS + 2**bits, device=device))


def _odd(positions: torch.Tensor) -> torch.Tensor:
    """Returns an odd number for each position, int64."""
    return _mixed((positions + 1) * _GOLDEN) | 1


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Returns splitmix64's mixing of each word: a bijection that spreads every bit over all."""
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts to the right and fills with zeros, as for unsigned words; torch's own shift repeats the sign."""
    return (words >> bits) & (2 ** (64 - bits) - 1)
