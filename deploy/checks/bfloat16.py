"""How much slower bfloat16 is than float32 on a device: processors without instructions for it emulate them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from latent_grpo.common.models import DTYPES

TOKENS, INPUTS, OUTPUTS = 128, 576, 1536  # of a feed-forward layer of a model of 135 M parameters
REPEATS = 3
NOTICEABLE = 1.3
"""The ratio from which a user is told; below it a shared machine's noise decides."""


def layer_seconds(hidden: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """Returns the wall-clock seconds of the layer's three products: [T, I] x [O, I], and with the gradient [T, O]."""
    _wait(hidden.device)
    began = time.perf_counter()
    torch.mm(hidden, weight.t())
    torch.mm(gradient, weight)
    torch.mm(gradient.t(), hidden)
    _wait(hidden.device)
    return time.perf_counter() - began


def bfloat16_slowdown(
    device: str = "cpu", repeats: int = REPEATS, seconds: Callable[..., float] = layer_seconds
) -> float:
    """Returns the time of a layer's forward and backward pass in bfloat16, as a multiple of float32's.

    The two are timed in turn by `seconds`, and the fastest of `repeats` of each counts. It takes well under a second.
    """
    passes = {name: _tensors(dtype, torch.device(device)) for name, dtype in DTYPES.items()}
    best = dict.fromkeys(passes, float("inf"))
    for repeat in range(repeats + 1):
        for name, tensors in passes.items():
            found = seconds(*tensors)
            if repeat:  # the first is the warm-up
                best[name] = min(best[name], found)
    return best["bfloat16"] / best["float32"]


def slowdown_sentence(ratio: float, device: str) -> str | None:
    """Returns what to tell a user whose run computes in bfloat16 on the device, or None if it is not slower."""
    if ratio < NOTICEABLE:
        return None
    return (
        f"bfloat16 is {ratio:.1f} times slower than float32 on this machine's {device} (a layer's forward and backward "
        "pass); set model.dtype to float32 where memory allows"
    )


def _tensors(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, INPUTS), (OUTPUTS, INPUTS), (TOKENS, OUTPUTS))
    hidden, weight, gradient = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)
    return hidden, weight, gradient


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
