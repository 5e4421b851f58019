"""The comparison of recorded log-probs with the learner's own (METHOD §6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from latent_grpo.common.agreement import Gap
from latent_grpo.learner.batching import ReplayInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGaps:
    """The gaps |learner - engine| of the recorded log-probs of a rank's rows."""

    latent: np.ndarray  # [latent steps * K] float32
    hard: np.ndarray  # [hard steps] float32
    largest_logits: np.ndarray  # [steps] float32: size of the largest logit of each step


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """The gaps between replayed and recorded component log-probs (METHOD §6)."""

    latent: Gap
    hard: Gap
    largest_logit: float  # mean over steps of the size of the largest logit


class LogitSizes:
    """Notes the size of the largest logit of each step while the chunks of a replay pass by."""

    def __init__(self, inputs: ReplayInputs):
        self._temperatures = inputs.temperatures
        self._found: list[torch.Tensor] = []

    def visit(self, piece: slice, logits: torch.Tensor) -> None:
        """Takes the logits [n, V] of the next steps, `piece`, divided by the steps' temperatures."""
        self._found.append(logits.abs().amax(-1) * self._temperatures[piece] if len(logits) else logits.new_zeros(0))

    @property
    def sizes(self) -> torch.Tensor:
        """The sizes of all steps: [N] float32."""
        return torch.cat(self._found)


@torch.no_grad()
def compare(
    forward: Callable[[ReplayInputs, LogitSizes], torch.Tensor], microbatches: Iterable[ReplayInputs]
) -> RankGaps:
    """Compares the component log-probs that `forward` computes, [N, W], with the recorded ones."""
    latent, hard, sizes = [], [], []
    for inputs in microbatches:
        logits = LogitSizes(inputs)
        gap = (forward(inputs, logits) - inputs.behaviour).abs()
        latent.append(gap[inputs.latent].reshape(-1))
        hard.append(gap[~inputs.latent, 0])
        sizes.append(logits.sizes)
    return RankGaps(latent=joined(latent), hard=joined(hard), largest_logits=joined(sizes))


def summarize_gaps(ranks: list[RankGaps]) -> ReplayReport:
    """Merges the ranks' gaps into one report."""
    sizes = np.concatenate([r.largest_logits for r in ranks])
    return ReplayReport(
        latent=Gap.of(np.concatenate([r.latent for r in ranks])),
        hard=Gap.of(np.concatenate([r.hard for r in ranks])),
        largest_logit=float(sizes.mean()) if sizes.size else 0.0,
    )


def joined(parts: list[torch.Tensor]) -> np.ndarray:
    """Returns tensors of any shape and device as one flat float32 array."""
    if not parts:
        return np.zeros(0, dtype=np.float32)
    return torch.cat([p.detach().float().reshape(-1).cpu() for p in parts]).numpy()
