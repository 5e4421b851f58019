"""A CUDA graph on a CPU: the operations of a step are recorded, and done again on the same memory.

As with a graph, no Python of the step runs again: what it decided stays, tensors are found where they were, and results
are written where they were. What a capture forbids, which is to wait for the device and to copy from the host, fails.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public name for it
from waiting import COPYING, WAITING, Without

FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero")


class StepRecorder:
    """Implements :class:`~rollout_workers.step_graphs.Capture`; counts what was captured and replayed."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, work):
        work()  # outside, as on a GPU: what is made once is made here
        recording = _Recording()
        with Without(WAITING | COPYING), recording:
            work()
        self.captured += 1

        def replay():
            self.replayed += 1
            recording.repeat()

        return replay


class _Recording(TorchDispatchMode):
    """The operations of a step that write memory, with all tensors that they took and gave."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in FORBIDDEN, f"a capture does not allow {name}"
        kwargs = kwargs or {}
        uploaded = name == "lift_fresh" and args[0].ndim  # a number of the host is filled in
        assert not uploaded, "a capture does not allow copies from the host"
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, result))
        return result

    def repeat(self):
        """Does them again; a result is written into the memory of the first one."""
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    assert old.shape == new.shape
                    old.copy_(new)


def _tensors(result):
    return [part for part in (result if isinstance(result, tuple | list) else [result]) if torch.is_tensor(part)]
