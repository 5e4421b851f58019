"""What a learner's step costs: seconds of its parts, positions with and without padding, and model FLOPs.

Model FLOPs are those that the mathematics needs: two for each weight and position in a forward pass, four more for the
weight's and the input's gradient, and attention over the pairs of positions that see each other. What is computed again
for memory's sake, hidden pairs and padding are no model FLOPs, so their cost shows as a lower utilisation (MFU).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from latent_grpo.learner.policy import transformer_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16 of a card (by a part of its name), from the vendor's data sheets; the SXM variants."""
PARTS = ("replay", "forward", "backward", "optimizer")


def peak_flops(device: torch.device | str) -> float | None:
    """Returns the most FLOPs a second of a device, in bfloat16; None for a CPU and a card that is not in the table."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAK_FLOPS.items() if part in name), None)


@dataclass(slots=True)
class StepCost:
    """One rank's share of a step, which its parts add to."""

    device: str
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    computed: int = 0  # positions of all forward passes
    real: int = 0  # those that are no padding
    flops: float = 0.0

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Adds the block's seconds to a part; on a GPU, the work that it has begun is waited for."""
        began = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds[part] += time.perf_counter() - began


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """The model FLOPs of a policy's passes."""

    layer_weights: int  # of products, in all layers
    passed: float  # share of the layers that the backward pass goes through: it ends at the lowest that is trained
    trained: float  # share of the weights that are trained, which have a gradient of their own
    pair: int  # FLOPs of a pair of positions in attention, all layers
    head_weights: int
    head_trained: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelFlops:
        """Counts a model's weights; its parameters must be whole (before ZeRO) and have their `requires_grad`."""
        layers, head, config = transformer_layers(model), model.get_output_embeddings(), model.config
        passed = sum(any(p.requires_grad for p in layer.parameters()) for layer in layers)
        weights = [p for layer in layers for p in layer.parameters() if p.ndim == 2]
        count = sum(p.numel() for p in weights)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = head.get_parameter("weight")
        return cls(
            layer_weights=count,
            passed=passed / max(len(layers), 1),
            trained=sum(p.numel() for p in weights if p.requires_grad) / max(count, 1),
            pair=4 * head_dim * config.num_attention_heads * len(layers),
            head_weights=weight.numel(),
            head_trained=weight.requires_grad,
        )

    def count(self, prompts: np.ndarray, fed: list[np.ndarray], steps: int, *, gradient: bool) -> float:
        """Returns the FLOPs of sequences with `prompts` [R] tokens and the `fed` steps of their responses, and `steps`.

        `steps` is the number of response steps whose log-probs are computed.
        """
        positions = int(prompts.sum()) + sum(int(f.sum()) for f in fed)
        own = prompts.astype(np.float64) ** 2 / 2
        seen = own.sum() + sum(
            float((f * p + f.astype(np.float64) ** 2 / 2).sum()) for p, f in zip(prompts, fed, strict=True)
        )
        products, attention = 2.0 * self.layer_weights * positions, self.pair * seen
        head = 2.0 * self.head_weights * steps
        forward = products + attention + head
        if not gradient:
            return forward
        backward = (
            products * (self.passed + self.trained) + 2 * attention * self.passed
        )  # inputs' and weights' gradients
        return forward + backward + head * (2 if self.head_trained else 1)
