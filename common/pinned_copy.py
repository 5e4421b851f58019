"""Copies between a GPU and the host through pinned memory, in pieces, two of which are under way at once.

    GPU ──► pinned piece 0 ──► host, while the GPU writes piece 1          (and the other way round)

A plain copy into memory that is not pinned is staged by the driver, one piece after the other. No GPU has run this
(docs/gpu.md), so :data:`PROVEN_ON_CUDA` leaves it off.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

PROVEN_ON_CUDA = False
PIECE_BYTES = 32 * 2**20  # a few milliseconds of a PCIe link; two of them stay pinned in each thread that copies


def copy_between(source: torch.Tensor, target: torch.Tensor, *, proven: bool = PROVEN_ON_CUDA) -> None:
    """Copies `source` into `target`, of its shape and dtype, and returns when the bytes have arrived.

    The way by pinned memory is that of contiguous tensors of which one lies on a GPU, where `proven`.
    """
    devices = {source.device.type, target.device.type}
    if proven and devices == {"cpu", "cuda"} and source.is_contiguous() and target.is_contiguous():
        gpu = source.device if source.is_cuda else target.device
        if getattr(_kept, "device", None) != gpu:
            _kept.device, _kept.copies = gpu, PinnedCopies(gpu)
        _kept.copies.copy(source, target)
    else:
        target.copy_(source)


_kept = threading.local()  # a thread's PinnedCopies: pinning memory takes longer than copying into it


class PinnedCopies:
    """Two pinned pieces of `piece_bytes` and the stream that fills or empties them; of one thread.

    With the device "cpu" the pieces are plain memory and nothing runs beside: the same steps, for tests.
    """

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        cuda = device.type == "cuda"
        self._pieces = [torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._done = [torch.cuda.Event() for _ in self._pieces] if cuda else []

    @torch.no_grad()
    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies all bytes of a contiguous tensor into another one of its size; returns when they have arrived."""
        raw, into = flat_bytes(source), flat_bytes(target)
        to_host = not target.is_cuda
        pieces = list(zip(raw.split(len(self._pieces[0])), into.split(len(self._pieces[0])), strict=True))
        with self._beside():
            if to_host:
                self._to_host(pieces)
            else:
                self._to_device(pieces)
        if self._stream is not None:
            self._stream.synchronize()

    def _to_host(self, pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Has the next piece on its way while the one before is copied out of pinned memory."""
        for number in range(len(pieces) + 1):
            if number < len(pieces):
                self._piece(number, len(pieces[number][0])).copy_(pieces[number][0], non_blocking=True)
                self._mark(number)
            if number:
                self._wait(number - 1)
                pieces[number - 1][1].copy_(self._piece(number - 1, len(pieces[number - 1][1])))

    def _to_device(self, pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Fills a pinned piece while the one before is on its way."""
        for number, (raw, into) in enumerate(pieces):
            if number >= len(self._pieces):
                self._wait(number)  # for the piece two before, which lies in the same memory
            staged = self._piece(number, len(raw))
            staged.copy_(raw)
            into.copy_(staged, non_blocking=True)
            self._mark(number)

    def _piece(self, number: int, size: int) -> torch.Tensor:
        return self._pieces[number % 2][:size]

    def _mark(self, number: int) -> None:
        if self._stream is not None:
            self._done[number % 2].record(self._stream)

    def _wait(self, number: int) -> None:
        if self._stream is not None:
            self._done[number % 2].synchronize()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Runs on a stream of its own, after all that the caller's has been given so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's bytes [nbytes], a view where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if len(flat) else torch.empty(0, dtype=torch.uint8, device=flat.device)
