"""An estimate of a learner rank's memory: what it holds of the model, and what a micro-batch adds.

    weights, gradients, optimizer states   by ZeRO stage and ranks
  + activations of one micro-batch         saved for the backward pass
  + float32 logits of one chunk

It needs the model's shape alone and is right to about a fifth, which tells a run that fits from one that does not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.models import make_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIB = 2**30
SAVED_WIDTHS = {"float32": 10, "bfloat16": 13}  # values of width D that a layer saves for a token; norms are float32
SAVED_MLP_WIDTHS = 4  # of the MLP's width: gate, its activation, up, their product
LOGIT_COPIES = 3  # a chunk's logits, their softmax, and the gradient of both


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a causal LM that decide its memory."""

    parameters: int
    embeddings: int  # values of the input embeddings
    tied: bool  # whether the output layer shares them
    layers: int
    width: int
    mlp_width: int
    rows: int  # of the vocabulary

    @classmethod
    def of(cls, config: RunConfig, source: str | Path | None, tokenizer: PreTrainedTokenizerBase) -> ModelShape:
        """The shape of the run's model, which is read from its configuration; no weights are made or read.

        `source`: the model's folder; None: a `model.new` that is still to be made.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            if source is not None:
                model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
            elif config.model.new is not None:
                model = make_model(config.model.new, tokenizer, seed=0)
            else:
                raise ConfigError("model: one of `path` and `new` must be given")
        embedding, settings = model.get_input_embeddings().weight, model.config.get_text_config()
        return cls(
            parameters=model.num_parameters(),
            embeddings=embedding.numel(),
            tied=model.get_output_embeddings().weight is embedding,
            layers=settings.num_hidden_layers,
            width=settings.hidden_size,
            mlp_width=getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size,
            rows=embedding.shape[0],
        )

    def trained(self, layers: int | None, *, frozen_embeddings: bool) -> int:
        """Parameters that are trained: with `layers`, only those of the uppermost layers and of an untied head."""
        head = 0 if self.tied else self.embeddings
        if layers is None:
            return self.parameters - (self.embeddings if frozen_embeddings else 0)
        of_layers = self.parameters - self.embeddings - head
        return of_layers * min(layers, self.layers) // self.layers + head

    def saved_bytes(self, dtype: str, *, checkpointing: bool, layers: int | None = None) -> int:
        """Bytes that one token's forward pass saves for the backward pass, in all trained layers together."""
        size, count = 4 if dtype == "float32" else 2, min(layers or self.layers, self.layers)
        layer = size * (SAVED_MLP_WIDTHS * self.mlp_width + SAVED_WIDTHS[dtype] * self.width)
        return count * size * self.width + layer if checkpointing else count * layer


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of a learner rank, estimated."""

    states: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.states + self.activations + self.logits

    def __str__(self) -> str:
        parts = (
            f"{self.states / GIB:.1f} weights, gradients and optimizer",
            f"{self.activations / GIB:.1f} activations",
        )
        return f"about {self.total / GIB:.1f} GiB: {', '.join(parts)}, {self.logits / GIB:.1f} logits"


def rank_memory(config: RunConfig, shape: ModelShape, tokens: int, *, frozen_embeddings: bool) -> RankMemory:
    """Estimates the memory of each learner rank.

    `tokens` is the size of a step on one rank; `frozen_embeddings` says whether the input embeddings are trained.
    """
    learner, dtype = config.learner, config.model.dtype
    layers = config.model.train_layers
    trained = shape.trained(layers, frozen_embeddings=frozen_embeddings)
    own = 4 if dtype == "float32" else 2
    parts = {"parameters": own * shape.parameters, "gradients": 4 * trained, "optimizer": 12 * trained}
    if learner.zero_stage == 0:
        parts["optimizer"] = 8 * trained  # the weights themselves are the master weights
    for name, stage in (("optimizer", 1), ("gradients", 2), ("parameters", 3)):
        if learner.zero_stage >= stage:
            parts[name] //= learner.ranks
    at_once = min(learner.tokens_per_microbatch, tokens)
    return RankMemory(
        states=sum(parts.values()),
        activations=at_once * shape.saved_bytes(dtype, checkpointing=learner.gradient_checkpointing, layers=layers),
        logits=LOGIT_COPIES * 4 * shape.rows * min(learner.logprob_chunk_tokens, at_once),
    )


def machine_bytes() -> int:
    """The physical memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
