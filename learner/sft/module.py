"""Latent-SFT, the initialisation that latent RL needs (METHOD §7). Pure torch: no Ray, no DeepSpeed, no I/O.

An explicit chain of thought becomes a chain of soft labels (`learner.sft.soft_labels`), a problem a row
(`learner.sft.rows`), rows a batch (:func:`collate`), and :class:`LatentSFTModule` gives the sums of its loss::

    prompt ids ... <think> | q_1 q_2 ... q_L | </think> \\boxed{7} <eos>
        inputs only          KL(q || p)        cross-entropy

Every random choice (perturbation, self-feeding) is a function of a row's key, never of its batch or rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from latent_grpo.common.head import float32_logits, install_float32_head
from latent_grpo.common.latent import greedy_mixture, mix_embeddings, sample_mixture_keyed
from latent_grpo.common.noise import GUMBEL_HIGH, GUMBEL_LOW, gumbel_noise, trajectory_key
from latent_grpo.learner.policy import checkpoint_layers
from latent_grpo.learner.sft.rows import SFTRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SELF_FEEDING_TOP_P = 0.95  # the rollout's nucleus (METHOD §2.1)


# --- batches -----------------------------------------------------------------------------------------------------


class Calls(NamedTuple):
    """The least number of output-layer calls, on no rows if need be.

    With ZeRO-3 each call is a collective, so all ranks must make equally many.
    """

    latent: int = 0  # for the KL, and for the self-feeding pass
    hard: int = 0
    feed: bool = False  # the self-feeding pass is made


NO_CALLS = Calls()


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTBatch:
    """B rows of T positions, padded on the right. Position t holds what is fed there and what is predicted there."""

    hard_ids: torch.Tensor  # [B, T] int64; padding's id where latent or beyond the row
    mixture_ids: torch.Tensor  # [B, T, K] int64
    labels: torch.Tensor  # [B, T, K] float32; 0 where not latent
    attention: torch.Tensor  # [B, T] bool: position belongs to the row
    latent: torch.Tensor  # [B, T] bool: a latent step, KL target
    hard_target: torch.Tensor  # [B, T] bool: a hard step, cross-entropy target
    keys: torch.Tensor  # [B] int64: the row's randomness
    perturbed: torch.Tensor  # [B] bool: inputs are perturbed
    feed: torch.Tensor  # [B, T] bool: a latent step fed by the model's own mixture
    feed_noisy: torch.Tensor  # [B] bool: that mixture is drawn with noise
    calls: Calls = NO_CALLS

    def to(self, device: torch.device | str) -> SFTBatch:
        """Returns the batch on a device."""
        tensors = (f.name for f in fields(self) if f.name != "calls")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of latent and hard targets; their sums over micro-batches and ranks are the loss's denominators."""
        return int(self.latent.sum()), int(self.hard_target.sum())


def row_key(seed: int, step: int, row: int) -> int:
    """Returns the key of the randomness of row `row` in training step `step`."""
    return trajectory_key(
        run_seed=seed, purpose="latent_sft", problem_uid=str(row), epoch=0, sample_index=0, policy_version=step
    )


def collate(
    rows: Sequence[SFTRow],
    keys: Sequence[int],
    *,
    k: int,
    pad_id: int,
    perturb_share: float = 0.5,
    self_feeding: float = 0.5,
    calls: Calls = NO_CALLS,
) -> SFTBatch:
    """Makes a batch of rows; `keys` come from :func:`row_key`, one per row."""
    if len(rows) != len(keys):
        raise ValueError(f"need one key per row, got {len(rows)} rows and {len(keys)} keys")
    size, width = len(rows), max(len(row) for row in rows)
    hard_ids = np.full((size, width), pad_id, dtype=np.int64)
    mixture_ids = np.full((size, width, k), pad_id, dtype=np.int64)
    labels = np.zeros((size, width, k), dtype=np.float32)
    attention, latent, hard_target, feed = (np.zeros((size, width), dtype=bool) for _ in range(4))
    perturbed, noisy = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    draw = np.random.RandomState(0)  # made once: making one takes ten times as long as giving it another seed
    for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
        start = len(row.prompt_ids)
        end = start + len(row.chain.ids)
        hard_ids[i, :start] = row.prompt_ids
        if end > start:
            mixture_ids[i, start:end] = row.chain.ids
            labels[i, start:end] = row.chain.labels
        hard_ids[i, end : len(row)] = row.hard_ids
        attention[i, : len(row)] = True
        latent[i, start:end] = True
        hard_target[i, end : len(row)] = True
        draw.seed([key & 0xFFFFFFFF, key >> 32])
        perturbed[i], noisy[i] = draw.random_sample() < perturb_share, draw.random_sample() < 0.5
        feed[i, start:end] = draw.random_sample(end - start) < self_feeding
    arrays = {
        "hard_ids": hard_ids,
        "mixture_ids": mixture_ids,
        "labels": labels,
        "attention": attention,
        "latent": latent,
        "hard_target": hard_target,
        "keys": np.asarray(keys, dtype=np.int64),
        "perturbed": perturbed,
        "feed": feed,
        "feed_noisy": noisy,
    }
    return SFTBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()}, calls=calls)


# --- loss --------------------------------------------------------------------------------------------------------


class LossParts(NamedTuple):
    """Sums of losses with gradient, to be divided by the global counts of the step (:func:`means`)."""

    latent_sum: torch.Tensor  # sum of KL(q || p) over latent positions
    latent_count: torch.Tensor
    hard_sum: torch.Tensor  # sum of cross-entropies over hard positions
    hard_count: torch.Tensor


def means(
    parts: LossParts, latent_count: float | None = None, hard_count: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean KL and mean cross-entropy, whose sum is the loss (METHOD §7).

    Counts are of all micro-batches and ranks, or this batch's.
    """
    latent = parts.latent_count if latent_count is None else latent_count
    hard = parts.hard_count if hard_count is None else hard_count
    return parts.latent_sum / max(float(latent), 1.0), parts.hard_sum / max(float(hard), 1.0)


def perturb(labels: torch.Tensor, gumbel: torch.Tensor, scale: float, tau: float) -> torch.Tensor:
    """softmax((log q + g) / tau) on q's support, g one-sided as in METHOD §2.1: [..., K] -> [..., K].

    `gumbel` [..., K]: raw standard draws. Slots with q = 0 keep weight 0.
    """
    noise = (gumbel.float().clamp(GUMBEL_LOW, GUMBEL_HIGH) - GUMBEL_LOW) * scale
    return torch.softmax((labels.float().log() + noise) / tau, dim=-1)


class LatentSFTModule(nn.Module):
    """A causal LM whose forward pass is the Latent-SFT loss, so that an engine can wrap the whole of it.

    `allowed` bool [V] marks the ids that the tokenizer has, for the model's own mixtures.
    """

    allowed: torch.Tensor | None

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        k: int,
        tau: float = 1.0,
        perturb_scale: float = 1.0,
        allowed: torch.Tensor | np.ndarray | None = None,
        chunk_tokens: int = 2048,
        gradient_checkpointing: bool | int = False,
    ) -> None:
        super().__init__()
        install_float32_head(model)
        self.model = model
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.k = k
        self.tau = tau
        self.perturb_scale = perturb_scale
        self.chunk_tokens = chunk_tokens
        mask = None if allowed is None else torch.as_tensor(allowed, dtype=torch.bool)
        self.register_buffer("allowed", mask, persistent=False)

    def train(self, mode: bool = True) -> LatentSFTModule:
        """Stays in evaluation mode, like the policy that it will become."""
        super().train(False)
        if self.gradient_checkpointing:
            checkpoint_layers(self, self.gradient_checkpointing)
        return self

    def forward(self, batch: SFTBatch) -> LossParts:
        """Returns the loss's sums over the batch."""
        inputs = self.mixed_inputs(batch, self.label_weights(batch))
        if batch.calls.feed or bool(batch.feed.any()):
            inputs = self.self_fed(batch, inputs)
        hidden = self._hidden(batch.attention, inputs)
        calls = batch.calls
        latent_sum = self._summed(_latent_losses, hidden, batch.latent, calls.latent, batch.mixture_ids, batch.labels)
        hard_sum = self._summed(_hard_losses, hidden, batch.hard_target, calls.hard, batch.hard_ids)
        return LossParts(latent_sum, batch.latent.sum(), hard_sum, batch.hard_target.sum())

    # -- inputs

    def label_weights(self, batch: SFTBatch) -> torch.Tensor:
        """Returns the mixture weights [B, T, K] that are fed at latent positions: q, or q perturbed."""
        chosen = batch.latent & batch.perturbed.unsqueeze(-1)
        rows, positions = chosen.nonzero(as_tuple=True)
        if not len(rows):
            return batch.labels
        gumbel = gumbel_noise(batch.keys[rows], positions, batch.mixture_ids[rows, positions])
        weights = batch.labels.clone()
        weights[rows, positions] = perturb(batch.labels[rows, positions], gumbel, self.perturb_scale, self.tau)
        return weights

    def mixed_inputs(self, batch: SFTBatch, weights: torch.Tensor) -> torch.Tensor:
        """Returns input embeddings [B, T, D]: E[id] at hard positions, sum_k w_k E[id_k] (detached) at latent ones."""
        embed = self.model.get_input_embeddings()
        inputs = embed(batch.hard_ids)
        if not bool(batch.latent.any()):
            return inputs
        mixed = mix_embeddings(embed(batch.mixture_ids[batch.latent]).detach(), weights[batch.latent])
        return inputs.masked_scatter(batch.latent.unsqueeze(-1), mixed)

    @torch.no_grad()
    def own_mixtures(self, batch: SFTBatch, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the model's mixtures at the fed positions, in order: embeddings [N, D] (METHOD §7, self-feeding)."""
        rows, positions = batch.feed.nonzero(as_tuple=True)
        seen = int(positions.max()) if len(positions) else 1  # nothing after the last fed position matters
        hidden = self._hidden(batch.attention[:, :seen], inputs[:, :seen])
        embed, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        mixed = []
        for row, position in self._chunks(rows, positions, batch.calls.latent):
            logits = float32_logits(head, hidden[row, position - 1])
            if not len(row):
                mixed.append(embed(row))
                continue
            # the other half of the key space: perturbation and self-feeding never share a draw
            ids, _, weights, _ = sample_mixture_keyed(
                logits,
                batch.keys[row] ^ (1 << 62),
                position,
                k=self.k,
                top_p=SELF_FEEDING_TOP_P,
                noise_scale=self.perturb_scale,
                tau=self.tau,
                allowed=self.allowed,
            )
            quiet_ids, _, quiet_weights = greedy_mixture(logits, k=self.k, tau=self.tau, allowed=self.allowed)
            noisy = batch.feed_noisy[row].unsqueeze(-1)
            ids, weights = torch.where(noisy, ids, quiet_ids), torch.where(noisy, weights, quiet_weights)
            mixed.append(mix_embeddings(embed(ids), weights))
        return torch.cat(mixed)

    def self_fed(self, batch: SFTBatch, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.masked_scatter(batch.feed.unsqueeze(-1), self.own_mixtures(batch, inputs.detach()))

    # -- outputs

    def _hidden(self, attention: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the last hidden states [B, T, D]; those of position t - 1 predict position t."""
        return self.model.base_model(
            inputs_embeds=inputs, attention_mask=attention.long(), use_cache=False
        ).last_hidden_state

    def _chunks(
        self, rows: torch.Tensor, positions: torch.Tensor, least: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields pairs of at most `chunk_tokens` positions; at least `least` pairs and at least one, even if empty."""
        count = max(-(-len(rows) // self.chunk_tokens), least, 1)
        return zip(rows.tensor_split(count), positions.tensor_split(count), strict=True)

    def _summed(
        self,
        losses: Callable[..., torch.Tensor],
        hidden: torch.Tensor,
        mask: torch.Tensor,
        least: int,
        *targets: torch.Tensor,
    ) -> torch.Tensor:
        """Sums `losses` over the positions of `mask`; at most `chunk_tokens` rows of logits exist at once."""
        rows, positions = mask.nonzero(as_tuple=True)
        total = hidden.sum() * 0.0  # a part without positions still belongs to the graph
        head = self.model.get_output_embeddings()
        for row, position in self._chunks(rows, positions, least):
            here = (t[row, position] for t in targets)
            states = hidden[row, position - 1]
            total = total + checkpoint(losses, head, states, *here, use_reentrant=False)
        return total


def _latent_losses(head: nn.Module, states: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the sum of KL(q || p): `states` [N, D], `ids` and `labels` [N, K]."""
    log_p = torch.log_softmax(float32_logits(head, states), dim=-1).gather(-1, ids)
    return (torch.xlogy(labels, labels) - labels * log_p).sum()


def _hard_losses(head: nn.Module, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the sum of cross-entropies: `states` [N, D], `ids` [N]."""
    return nn.functional.cross_entropy(float32_logits(head, states), ids, reduction="sum")
