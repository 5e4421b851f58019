"""Finds what would make the host wait for a device that computes asynchronously, on a CPU, where nothing waits."""

from __future__ import annotations

from collections import Counter

import numpy as np
from torch.overrides import TorchFunctionMode

WAITING = frozenset(("item", "tolist", "cpu", "nonzero", "__bool__", "numpy", "__int__", "__float__"))
"""On a GPU each of these stops the host until the device has caught up."""
COPYING = frozenset(("tensor", "as_tensor", "asarray", "scalar_tensor"))
"""Of a number or a list, each of these copies to the device and waits for it too; arrays go there by `upload` alone."""


class Without(TorchFunctionMode):
    """Refuses these functions of torch and of its tensors; counts the calls of others by name."""

    def __init__(self, refused):
        super().__init__()
        self.refused, self.calls = refused, Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        waits = name in self.refused and not (name in COPYING and isinstance(args[0], np.ndarray))
        assert not waits, f"the host would wait for the device: {name}"
        self.calls[name] += 1
        return function(*args, **(kwargs or {}))
