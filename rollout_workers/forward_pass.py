"""The forward passes of the Transformers engine: over one step of every row, and over prompts.

Both read and write the cache of keys and values. The families of `lean_forward.py` are computed there on a CPU; every
other model, and on CUDA every model, by Transformers' own forward pass.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from latent_grpo.common.head import float32_logits, install_float32_head
from latent_grpo.common.model_limits import refusal
from latent_grpo.common.types import TokenFacts
from latent_grpo.rollout_workers.engine import EngineError
from latent_grpo.rollout_workers.kv_cache import SlotCache
from latent_grpo.rollout_workers.lean_forward import lean_forward


class ForwardPass:
    """A model, on the device where its parameters lie, with its cache of keys and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        # on CUDA no GPU has run it yet (docs/gpu.md), and captured steps would need its table of angles to stay
        self._lean = lean_forward(model) if model.device.type == "cpu" else None
        self.embed = model.get_input_embeddings()
        self._head = install_float32_head(model)
        self._additive_mask = model.config._attn_implementation == "eager"
        with torch.inference_mode():
            self.cache = SlotCache.of(model)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the float32 logits [..., V] of final hidden states [..., D]."""
        return float32_logits(self._head, hidden)

    def logits(self, inputs: torch.Tensor, positions: torch.Tensor, extent: int) -> torch.Tensor:
        """Feeds `inputs` [n, D] at `positions` [n] to the first n rows of the cache; returns logits [n, V].

        `extent` is the number of columns that the longest row sees, or more: a row sees those up to its position.
        """
        mask = (torch.arange(extent, device=positions.device) <= positions.unsqueeze(-1))[:, None, None]
        self.cache.begin_step(positions, extent)
        if self._lean is not None:
            return self.head(self._lean(inputs, positions, self.cache, mask))
        if self._additive_mask:
            zeros = torch.zeros_like(mask, dtype=self._model.dtype)
            mask = zeros.masked_fill(~mask, torch.finfo(self._model.dtype).min)
        hidden = self._model.base_model(
            inputs_embeds=inputs.unsqueeze(1),
            position_ids=positions.unsqueeze(-1),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return self.head(hidden[:, -1])

    def read(self, inputs: torch.Tensor, last: torch.Tensor, owners: torch.Tensor, first: int) -> torch.Tensor:
        """Runs a pass over right-padded `inputs` [g, T, D]; returns the hidden states at `last` [g], [g, D].

        Row first + i of the cache gets the keys and values of line `owners[i]`.
        """
        if self._lean is not None:
            return self._lean.prompts(inputs, last, self.cache, owners, first)
        output = self._model.base_model(inputs_embeds=inputs, use_cache=True)
        self.cache.insert(output.past_key_values, owners, first)
        states: torch.Tensor = output.last_hidden_state
        return states[torch.arange(len(inputs), device=inputs.device), last]


def check_model(model: PreTrainedModel, facts: TokenFacts, max_rows: int) -> None:
    """Raises EngineError for a model that the decode loop cannot serve exactly."""
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[0] != facts.vocab_size or len(facts.allowed) != facts.vocab_size:
        rows = None if head is None else head.weight.shape[0]
        raise EngineError(
            f"the model's output has {rows} rows, but the token facts have {facts.vocab_size} rows and "
            f"{len(facts.allowed)} flags; load both from the same model"
        )
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise EngineError(
            f"expected attention 'sdpa' or 'eager' (rows of different length need a mask), got "
            f"{model.config._attn_implementation!r}; load the model with attn_implementation='sdpa'"
        )
    if (reason := refusal(model.config)) is not None:
        raise EngineError(f"this {type(model).__name__} cannot be served: {reason}")
    if max_rows < 1:
        raise EngineError(f"max_rows must be >= 1, got {max_rows}")
