"""Replay: the policy's log-probs of recorded trajectories, in one forward pass (METHOD §3).

Inputs are rebuilt from the record: a latent step is fed as the mixture softmax(r / tau) of its K ids, detached, a hard
step as its token. What was fed last predicts the next step, so the last response step is a target only.

    position   0 .. P-1     P         P+1       ...   P+T-2
    fed        prompt       step 0    step 1    ...   step T-2
    predicts        step 0  step 1    step 2    ...   step T-1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import nn

from common.density import surrogate_log_prob
from common.latent import mix_embeddings
from common.schema import TrajectoryBatch
from learner.logprobs import selected_log_probs


@dataclass(frozen=True, slots=True)
class ReplayInputs:
    """R rows padded to S fed positions, and their targets in flat form: L latent and H hard steps of all rows."""

    token_ids: torch.Tensor  # [R, S] int64: prompt and hard tokens; 0 at mixtures and padding
    attention_mask: torch.Tensor  # [R, S] int64
    mixture_position: torch.Tensor  # [F] int64: row * S + position of every mixture that is fed
    mixture_ids: torch.Tensor  # [F, K] int64
    mixture_weights: torch.Tensor  # [F, K] float32
    latent_source: torch.Tensor  # [L] int64: row * S + position whose output predicts the step
    latent_step: torch.Tensor  # [L] int64: row * T + step
    latent_ids: torch.Tensor  # [L, K] int64
    latent_scores: torch.Tensor  # [L, K] float32: recorded r
    latent_weights: torch.Tensor  # [L, K] float32: softmax(r / tau), METHOD §3.1's mixture weighting
    latent_behaviour: torch.Tensor  # [L, K] float32: recorded behaviour log-probs
    hard_source: torch.Tensor  # [H] int64
    hard_step: torch.Tensor  # [H] int64
    hard_ids: torch.Tensor  # [H] int64
    hard_temperature: torch.Tensor  # [H] float32
    hard_behaviour: torch.Tensor  # [H] float32
    step_mask: torch.Tensor  # [R, T] bool: the response steps there are

    def to(self, device: torch.device | str) -> ReplayInputs:
        return ReplayInputs(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def collate(batch: TrajectoryBatch, rows: Sequence[int]) -> ReplayInputs:
    """Replay inputs of some rows of a batch, padded to the longest of them."""
    rows = [int(r) for r in rows]
    prompt_lengths = np.array([len(batch.prompt_ids[r]) for r in rows])
    steps = batch.num_steps[rows]
    latent_steps = batch.num_latent_steps[rows]
    width = int((prompt_lengths + steps).max()) - 1
    longest = int(steps.max())
    token_ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    tau, temperature = batch.numbers("sampling_tau"), batch.numbers("sampling_temperature")
    flat: dict[str, list[np.ndarray]] = {
        name: [] for name in ("fed", "fed_row", "latent_source", "latent_step", "hard_source", "hard_step", "hard_temp")
    }
    for i, row in enumerate(rows):
        prompt, total, latent = prompt_lengths[i], int(steps[i]), int(latent_steps[i])
        hard = batch.hard_ids[row]
        token_ids[i, :prompt] = batch.prompt_ids[row]
        fed_hard = hard[: max(total - 1 - latent, 0)]
        token_ids[i, prompt + latent : prompt + latent + len(fed_hard)] = fed_hard
        mask[i, : prompt + total - 1] = 1
        fed = min(latent, total - 1)  # the last step is a target only
        first = i * width + prompt
        flat["fed"].append(first + np.arange(fed))
        flat["fed_row"].append(np.arange(latent) < fed)
        flat["latent_source"].append(first - 1 + np.arange(latent))
        flat["latent_step"].append(i * longest + np.arange(latent))
        flat["hard_source"].append(first - 1 + np.arange(latent, total))
        flat["hard_step"].append(i * longest + np.arange(latent, total))
        flat["hard_temp"].append(np.full(total - latent, temperature[row], np.float32))
    joined = {name: np.concatenate(parts) for name, parts in flat.items()}

    def column(ragged, dtype) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([ragged[r] for r in rows]).astype(dtype))

    ids, scores = column(batch.latent_ids, np.int64), column(batch.latent_scores, np.float32)
    row_tau = torch.from_numpy(np.repeat(tau[rows], latent_steps).astype(np.float32)).unsqueeze(-1)
    weights = torch.softmax(scores / row_tau, dim=-1)
    is_fed = torch.from_numpy(joined["fed_row"])
    return ReplayInputs(
        token_ids=torch.from_numpy(token_ids),
        attention_mask=torch.from_numpy(mask),
        mixture_position=torch.from_numpy(joined["fed"]),
        mixture_ids=ids[is_fed],
        mixture_weights=weights[is_fed],
        latent_source=torch.from_numpy(joined["latent_source"]),
        latent_step=torch.from_numpy(joined["latent_step"]),
        latent_ids=ids,
        latent_scores=scores,
        latent_weights=weights,
        latent_behaviour=column(batch.latent_log_probs, np.float32),
        hard_source=torch.from_numpy(joined["hard_source"]),
        hard_step=torch.from_numpy(joined["hard_step"]),
        hard_ids=column(batch.hard_ids, np.int64),
        hard_temperature=torch.from_numpy(joined["hard_temp"]),
        hard_behaviour=column(batch.hard_log_probs, np.float32),
        step_mask=torch.arange(longest) < torch.from_numpy(steps.astype(np.int64)).unsqueeze(-1),
    )


class PolicyModule(nn.Module):
    """A causal LM that answers with the log-probs of recorded steps. `chunk_tokens`: see :mod:`learner.logprobs`."""

    def __init__(self, model: nn.Module, *, chunk_tokens: int = 2048):
        super().__init__()
        self.model = model.eval()  # dropout is off in training too: replay must equal the rollout
        self.chunk_tokens = chunk_tokens

    def train(self, mode: bool = True) -> PolicyModule:
        """The model stays in evaluation mode whatever a framework asks for."""
        return super().train(False)

    def forward(self, inputs: ReplayInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """log p(s_k) of every latent step at temperature 1, [L, K], and of every hard step, [H]; float32."""
        embed = self.model.get_input_embeddings()
        embeddings = embed(inputs.token_ids)
        rows, width, size = embeddings.shape
        if len(inputs.mixture_position):
            mixed = mix_embeddings(embed(inputs.mixture_ids).detach(), inputs.mixture_weights)  # METHOD §3: no gradient
            embeddings = embeddings.reshape(rows * width, size).index_copy(0, inputs.mixture_position, mixed)
            embeddings = embeddings.reshape(rows, width, size)
        hidden = self.model.base_model(
            inputs_embeds=embeddings,
            attention_mask=inputs.attention_mask,
            position_ids=torch.arange(width, device=embeddings.device).expand(rows, -1),
            use_cache=False,
        ).last_hidden_state.reshape(rows * width, size)
        head = self.model.get_output_embeddings()
        latent = selected_log_probs(
            head,
            hidden[inputs.latent_source],
            inputs.latent_ids,
            inputs.latent_scores.new_ones(len(inputs.latent_source)),
            self.chunk_tokens,
        )
        hard = selected_log_probs(
            head,
            hidden[inputs.hard_source],
            inputs.hard_ids.unsqueeze(-1),
            inputs.hard_temperature,
            self.chunk_tokens,
        )
        return latent, hard.squeeze(-1)


def step_log_probs(
    inputs: ReplayInputs,
    latent: torch.Tensor,
    hard: torch.Tensor,
    *,
    component_weighting: str,
    advantages: torch.Tensor | None = None,
    flip: str = "off",
) -> torch.Tensor:
    """log pi of every response step, [R, T], 0 where there is none (METHOD §3.1-§3.3).

    `latent` [L, K] and `hard` [H] as :class:`PolicyModule` gives them, or the recorded behaviour log-probs (METHOD §6).
    `advantages` [R, T] turns the straight-through flip on.
    """
    weights = inputs.latent_weights if component_weighting == "mixture" else None
    chosen = None if advantages is None else advantages.reshape(-1)[inputs.latent_step]
    surrogate = surrogate_log_prob(
        latent, inputs.latent_scores, advantages=chosen, component_weights=weights, flip=flip
    )
    flat = hard.new_zeros(inputs.step_mask.numel())
    flat = flat.index_copy(0, inputs.hard_step, hard).index_copy(0, inputs.latent_step, surrogate)
    return flat.reshape(inputs.step_mask.shape)
