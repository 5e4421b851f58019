"""Log-probs of selected ids without the [T, V] matrix (METHOD §3; REQUIREMENTS 19).

The vocabulary head is applied to `chunk` positions at a time. With gradients on, each chunk is a checkpoint: its logits
are made again in the backward pass, so at no time does more than one chunk of float32 logits exist.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def selected_log_probs(
    head: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, temperature: torch.Tensor, chunk: int
) -> torch.Tensor:
    """log_softmax(head(hidden) / temperature)[ids]: [N, D], `ids` [N, M], `temperature` [N] -> float32 [N, M]."""
    pieces = []
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        arguments = (head, hidden[part], ids[part], temperature[part])
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(_chunk(*arguments))
    return torch.cat(pieces) if pieces else hidden.new_zeros(ids.shape, dtype=torch.float32)


def _chunk(head: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    logits = head(hidden).float() / temperature.unsqueeze(-1)
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
