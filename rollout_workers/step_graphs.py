"""Decode steps as graphs: one launch for the forward pass, the draw, the mixture and the record of a step.

On a GPU a step of a small model is hundreds of kernels, and launching them takes longer than they run. A graph launches
them all at once. It repeats the same operations on the same memory, so everything that may differ between two steps is
either in that memory or part of the graph's key:

* rows: a power of two; those that no sample has draw into the decoder's scratch slot;
* columns of the cache that attention reads: a power of two; those beyond a row's length are masked;
* what the host decided of the rows' settings (`Rows.decisions`), such as whether any of them is in latent mode.

Steps whose code asks the device are not taken so (`careful` rows, `decoding.py`). A step with another key is captured
while it is taken; a key that comes again is replayed. Graphs are dropped once the memory that they read has moved (a
larger cache, longer records). Weights change in place, which no graph notices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from latent_grpo.rollout_workers.engine import EngineError
from latent_grpo.rollout_workers.requests import Rows, upload

PROVEN_ON_CUDA = False
"""Whether steps were captured and replayed on a GPU (docs/gpu.md)."""
FEWEST_ROWS = 8
FEWEST_COLUMNS = 128
MOST_GRAPHS = 64  # each has some MiB on the device; beyond this the one goes that was not used for longest

Replay = Callable[[], None]


class Capture(Protocol):
    """Takes a step and records it."""

    def __call__(self, work: Callable[[], None]) -> Replay:
        """Does `work`, and returns what repeats its operations, in their order, on the same memory."""
        ...


class TakeStep(Protocol):
    """A step that waits for nothing and whose Python decides nothing but by `rows` and `columns`."""

    def __call__(
        self, inputs: torch.Tensor, positions: torch.Tensor, complete: torch.Tensor, rows: Rows, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Feeds `inputs` [n, D] at `positions` [n], attends to `columns`, and draws for the rows that are `complete`.

        Returns the next inputs [n, D] and codes [n] int64 for the host.
        """
        ...


def capture_on_cuda(device: torch.device) -> Capture:
    """Returns the capture of CUDA graphs. They share a pool of memory, since nothing in it is read after its step."""
    kept: list[torch.cuda.CUDAGraph] = []  # a graph of the pool, which would be gone with the last of them

    def capture(work: Callable[[], None]) -> Replay:
        with torch.cuda.device(device):
            if not kept:
                first = torch.cuda.CUDAGraph()
                with torch.cuda.graph(first, capture_error_mode="thread_local"):
                    torch.zeros(1, device=device)
                kept.append(first)
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):  # the step itself; libraries make their handles and workspaces outside
                work()
            main.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:  # other threads of a worker may use the device meanwhile
                with torch.cuda.graph(graph, pool=kept[0].pool(), capture_error_mode="thread_local"):
                    work()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise EngineError(
                    f"this model's decode step cannot be captured as a CUDA graph ({error}); set rollout.compile=off"
                ) from error
        return graph.replay

    return capture


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    """Where graphs find what differs between steps, and leave what they found; graphs of fewer rows use the first."""

    inputs: torch.Tensor  # [rows, D]
    positions: torch.Tensor  # [rows] int64
    complete: torch.Tensor  # [rows] bool
    table: torch.Tensor  # [rows, columns] int64: the rows' settings
    slot: torch.Tensor  # [rows] int64: in the decoder
    next_inputs: torch.Tensor  # [rows, D]
    codes: torch.Tensor  # [rows] int64


class StepGraphs:
    """The graphs of an engine with at most `max_rows` rows, whose step is `take_step`; at most so many graphs."""

    def __init__(self, take_step: TakeStep, capture: Capture, *, max_rows: int, most: int = MOST_GRAPHS) -> None:
        self._take_step, self._capture, self._max_rows, self._most = take_step, capture, max_rows, most
        self.clear()

    def clear(self) -> None:
        """Drops all graphs and their memory."""
        self._graphs: dict[tuple[object, ...], Replay] = {}
        self._layouts: tuple[object, ...] = ()
        self._memory: _Memory | None = None
        self._loaded: Rows | None = None  # whose settings are in the memory

    def rows(self, running: int) -> int:
        """Returns the number of rows of the graph for so many samples."""
        return min(_power_of_two(running, FEWEST_ROWS), self._max_rows)

    def take(
        self,
        inputs: torch.Tensor,
        positions: np.ndarray,
        complete: np.ndarray,
        rows: Rows,
        capacity: int,
        layouts: tuple[object, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes a step of samples with these `inputs` [n, D]; returns their next inputs [n, D] and their codes [n].

        `positions`, `complete` and `rows` are of :meth:`rows` rows, of which the first n have samples. `capacity` is
        the cache's number of columns. `layouts` are objects that stand for the memory that the step reads and writes
        beside its arguments: others mean that it has moved. The next inputs are overwritten by the next step.
        """
        if len(layouts) != len(self._layouts) or any(a is not b for a, b in zip(layouts, self._layouts)):
            self._graphs.clear()
            self._layouts = layouts
        memory, count, size = self._at(inputs, rows), len(inputs), len(positions)
        memory.inputs[:count] = inputs
        memory.positions[:size] = upload(positions, inputs.device)
        memory.complete[:size] = upload(complete, inputs.device)
        columns = min(_power_of_two(int(positions.max()) + 1, FEWEST_COLUMNS), capacity)
        key = (size, columns, rows.decisions)
        if (replay := self._graphs.pop(key, None)) is not None:
            replay()
        else:
            replay = self._captured(memory, rows, columns)
            while len(self._graphs) >= self._most:
                del self._graphs[next(iter(self._graphs))]
        self._graphs[key] = replay  # the last one is the one that was used last
        return memory.next_inputs[:count], memory.codes[:count].clone()  # which the host reads after the next step

    def _at(self, like: torch.Tensor, rows: Rows) -> _Memory:
        """Returns the memory with the settings of these rows in it."""
        if self._memory is None:
            n = self._max_rows
            inputs = like.new_zeros(n, like.shape[-1])
            self._memory = _Memory(
                inputs=inputs,
                positions=inputs.new_zeros(n, dtype=torch.int64),
                complete=inputs.new_zeros(n, dtype=torch.bool),
                table=rows.table.new_zeros(n, rows.table.shape[1]),
                slot=rows.slot.new_zeros(n),
                next_inputs=torch.zeros_like(inputs),
                codes=inputs.new_zeros(n, dtype=torch.int64),
            )
        if self._loaded is not rows:
            size, self._loaded = len(rows.host), rows
            self._memory.table[:size], self._memory.slot[:size] = rows.table, rows.slot
        return self._memory

    def _captured(self, memory: _Memory, rows: Rows, columns: int) -> Replay:
        """Takes a step and returns its graph."""
        size = len(rows.host)
        fixed = Rows(rows.host, memory.table[:size], memory.slot[:size], every_row=True)

        def work() -> None:
            given = (memory.inputs[:size], memory.positions[:size], memory.complete[:size])
            next_inputs, codes = self._take_step(*given, fixed, columns)
            memory.next_inputs[:size] = next_inputs
            memory.codes[:size] = codes

        return self._capture(work)


def _power_of_two(number: int, least: int) -> int:
    """Returns the smallest power of two that is at least both."""
    return 1 << (max(number, least) - 1).bit_length()
