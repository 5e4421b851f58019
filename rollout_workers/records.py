"""What the Transformers engine records of running samples, on the device until a sample ends."""

from __future__ import annotations

import numpy as np
import torch

from latent_grpo.rollout_workers.requests import SampleRecord


class Records:
    """The draws of running samples, by slot, on the device; it grows as requests need it.

    `latent_ids`, `scores`, `log_probs` [slots, steps, K]; `hard_ids`, `hard_log_probs` [slots, steps].
    """

    latent_ids: torch.Tensor
    scores: torch.Tensor
    log_probs: torch.Tensor
    hard_ids: torch.Tensor
    hard_log_probs: torch.Tensor

    def __init__(self, slots: int, device: torch.device) -> None:
        self._slots, self._device = slots, device
        self._steps = self._width = 0
        self.latent_until = np.zeros(slots, dtype=np.int64)  # [slots] number of latent steps, once known

    def reserve(self, steps: int, width: int) -> None:
        """Makes room for so many steps and components; what is recorded stays."""
        if steps <= self._steps and width <= self._width:
            return
        old_steps, old_width = self._steps, self._width
        self._steps, self._width = max(steps, old_steps), max(width, old_width)
        for name, dtype in (("latent_ids", torch.int32), ("scores", torch.float32), ("log_probs", torch.float32)):
            new = torch.zeros(self._slots, self._steps, self._width, dtype=dtype, device=self._device)
            if old_steps:
                new[:, :old_steps, :old_width] = getattr(self, name)
            setattr(self, name, new)
        for name, dtype in (("hard_ids", torch.int32), ("hard_log_probs", torch.float32)):
            new = torch.zeros(self._slots, self._steps, dtype=dtype, device=self._device)
            if old_steps:
                new[:, :old_steps] = getattr(self, name)
            setattr(self, name, new)

    def copy(self, source: int, targets: list[int], steps: int) -> None:
        """Gives each of the target slots the first `steps` steps of the source's."""
        for tensor in (self.latent_ids, self.scores, self.log_probs, self.hard_ids, self.hard_log_probs):
            tensor[targets, :steps] = tensor[source, :steps].clone()
        self.latent_until[targets] = self.latent_until[source]

    def take(self, slot: int, steps: int, k: int) -> SampleRecord:
        """Copies a finished sample's arrays to the host."""
        latent = int(self.latent_until[slot])
        return SampleRecord(
            latent_ids=_host(self.latent_ids[slot, :latent, :k]),
            latent_scores=_host(self.scores[slot, :latent, :k]),
            latent_log_probs=_host(self.log_probs[slot, :latent, :k]),
            hard_ids=_host(self.hard_ids[slot, latent:steps]),
            hard_log_probs=_host(self.hard_log_probs[slot, latent:steps]),
        )


def _host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy().copy()
