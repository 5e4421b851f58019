"""The policy as a module: a micro-batch of trajectories in, log-probs of their recorded steps out (METHOD §3)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from latent_grpo.common.errors import ConfigError
from latent_grpo.common.head import install_float32_head
from latent_grpo.common.latent import mix_embeddings
from latent_grpo.learner.batching import ReplayInputs
from latent_grpo.learner.centering import OtherDraws
from latent_grpo.learner.logprobs import selected_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class LogitVisitor(Protocol):
    """Sees the logits of a replay as its chunks pass by."""

    def visit(self, piece: slice, logits: torch.Tensor) -> None:
        """Takes the logits [n, V] of the next steps, `piece`, divided by the steps' temperatures."""


class PolicyModule(nn.Module):
    """A Hugging Face causal LM whose forward pass is the replay of a micro-batch.

    It is always in evaluation mode: the learner must compute the policy that the engine sampled from, and dropout would
    change it. Each layer is called equally often whatever the micro-batch holds, as ZeRO-3's collectives need.
    """

    def __init__(
        self, model: PreTrainedModel, *, freeze_embeddings: bool = True, gradient_checkpointing: bool | int = False
    ):
        super().__init__()
        install_float32_head(model)
        self.model = model
        self.gradient_checkpointing = gradient_checkpointing
        if freeze_embeddings:
            freeze_input_embeddings(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.train(False)

    def train(self, mode: bool = True) -> PolicyModule:
        """Stays in evaluation mode, except for the flag that makes layers checkpoint."""
        super().train(False)
        if self.gradient_checkpointing:
            checkpoint_layers(self, self.gradient_checkpointing)
        return self

    def forward(
        self, inputs: ReplayInputs, visitor: LogitVisitor | None = None, others: OtherDraws | None = None
    ) -> torch.Tensor:
        """Returns component log-probs of all response steps, float32: [N, W]; with those of `others`, [N, W + J K].

        `visitor` sees the logits, and must be given only without gradient.
        """
        # right-padded and causal: no position of a response sees padding, so only shared prompts need a mask
        hidden = self.model.base_model(
            inputs_embeds=self._embedded(inputs), use_cache=False, **inputs.attention()
        ).last_hidden_state
        return selected_log_probs(
            self.model.get_output_embeddings(),
            hidden[inputs.rows, inputs.positions],
            inputs.selected if others is None else others.widened(inputs),
            inputs.temperatures,
            inputs.chunks,
            visit=None if visitor is None else visitor.visit,
        )

    def _embedded(self, inputs: ReplayInputs) -> torch.Tensor:
        """Returns E[id] at hard positions and the detached mixture sum_k w_k E[s_k] at latent ones: [R, S, D].

        See METHOD §3.
        """
        rows, length = inputs.ids.shape
        # one lookup for both, so that the number of calls does not depend on the data
        flat = self.model.get_input_embeddings()(torch.cat([inputs.ids.reshape(-1), inputs.fed_ids.reshape(-1)]))
        hard = flat[: rows * length].reshape(rows, length, -1)
        latent = flat[rows * length :].detach().reshape(*inputs.fed_ids.shape, flat.shape[-1])
        mixed = mix_embeddings(latent, inputs.fed_weights)
        return hard.index_put((inputs.fed_rows, inputs.fed_positions), mixed)


def checkpoint_layers(module: nn.Module, which: bool | int) -> None:
    """Turns checkpointing on, in all layers or in so many of the lowest ones that are trained; others save nothing.

    Layers do it only in training mode, so only they get that flag, and dropout stays off.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if any(p.requires_grad for p in layer.parameters())]
    for layer in layers if which is True else layers[:which]:
        layer.training = True


def freeze_input_embeddings(model: PreTrainedModel) -> None:
    """Freezes the input embeddings (METHOD §5), and with tied embeddings the output layer, the same parameter."""
    embedding = model.get_input_embeddings().get_parameter("weight")
    embedding.requires_grad_(False)
    head = model.get_output_embeddings()
    if head is not None and head.weight is embedding:
        log.warning("freeze_embeddings: the output layer shares the input embeddings and is frozen with them")


def freeze_lower_layers(model: PreTrainedModel, trained: int | None) -> None:
    """Freezes the embeddings and all but the `trained` uppermost layers; None: nothing.

    The backward pass then ends at the lowest trained layer. Raises ConfigError for a model with fewer layers.
    """
    if trained is None:
        return
    count = model.config.num_hidden_layers
    if trained > count:
        raise ConfigError(f"model.train_layers ({trained}): the model has {count} layers; lower it, or leave it out")
    for part in model.base_model.children():
        if isinstance(part, nn.Embedding):
            part.requires_grad_(False)
    for layer in transformer_layers(model)[: count - trained]:
        layer.requires_grad_(False)


def transformer_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the model's transformer layers, from the lowest to the uppermost."""
    return [layer for part in model.base_model.children() if isinstance(part, nn.ModuleList) for layer in part]


def load_policy_model(folder: str, dtype: str = "float32") -> PreTrainedModel:
    """Loads the model, in float32 where it is trained: DeepSpeed keeps float32 master weights and casts by itself."""
    from latent_grpo.common.models import load_model

    return load_model(folder, dtype)
