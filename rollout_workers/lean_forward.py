"""Decode steps and prompts of the architectures that people train, in as few tensor operations as they need.

Transformers' modules cost much beside their arithmetic where a step is small (docs/measured.md). Here a layer is one
product for queries, keys and values, one for gate and up, rotary positions of queries and keys together, and residuals
that are added by the products themselves::

    x [n, D] ──► RMSNorm ──► q, k, v ──► (norms) ──► rotary ──► slot cache ──► attention ──► + x
             └─► RMSNorm ──► gate, up ──► silu(gate) * up ──► down ──► + x

It serves Llama, Qwen2, Qwen3 and Mistral with full attention and rotary positions that depend on the position alone;
every other model is decoded by Transformers' own forward pass (:func:`lean_forward` returns None), which is also what
the tests compare with. Joined weights are the model's own memory: the parameters become views of them, so weights that
are loaded into the parameters are at once those of this pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from latent_grpo.rollout_workers.kv_cache import SlotCache

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angle is a function of the position, whatever the length of the sequence is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """The joined weight [out, in] of linear layers with the same input, transposed for a product, and their bias."""

    weight: torch.Tensor  # [in, out], a transposed view
    bias: torch.Tensor | None  # [out]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Returns residual + layer(x), both [n, out]."""
        total = torch.addmm(residual, x, self.weight)
        return total if self.bias is None else total + self.bias


@dataclass(frozen=True, slots=True, kw_only=True)
class _Norm:
    weight: torch.Tensor  # [size]
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    before_attention: _Norm
    qkv: _Linear
    head_norms: tuple[_Norm, _Norm] | None  # of queries and of keys (Qwen3)
    out: _Linear
    before_mlp: _Norm
    gate_up: _Linear
    down: _Linear


class LeanForward:
    """The decode step and the pass over prompts of a supported model; made by :func:`lean_forward`."""

    def __init__(self, model: PreTrainedModel) -> None:
        config, base = model.config, model.base_model
        self._heads = config.num_attention_heads
        self._kv_heads = getattr(config, "num_key_value_heads", None) or self._heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._grouped = self._heads != self._kv_heads
        layers: Any = base.layers
        self._layers = [self._layer(layer) for layer in layers]
        self._norm = _norm(base.norm)
        self._rotary: Any = base.rotary_emb
        self._angles = torch.empty(0)

    def __call__(
        self, inputs: torch.Tensor, positions: torch.Tensor, cache: SlotCache, mask: torch.Tensor
    ) -> torch.Tensor:
        """Runs one step of n rows: `inputs` [n, D] embeddings at `positions` [n] -> final hidden states [n, D].

        `cache` has begun the step, and `mask` [n, 1, 1, extent] bool says which of its columns a row sees.
        """
        rotation = self._rotation(positions, cache.extent, inputs)
        x, heads = inputs, self._heads
        # the kernel adds its mask to the scores; made once here, instead of in every layer
        added = torch.zeros_like(mask, dtype=inputs.dtype).masked_fill(~mask, -torch.inf)
        for index, layer in enumerate(self._layers):
            turned, values = self._projected(layer, x, rotation)
            past_keys, past_values = cache.write(index, turned[:, heads:], values)
            attended = F.scaled_dot_product_attention(
                turned[:, :heads].unsqueeze(2), past_keys, past_values, attn_mask=added, enable_gqa=self._grouped
            )
            x = self._finished(layer, x, attended)
        return self._norm(x)

    def prompts(
        self, inputs: torch.Tensor, last: torch.Tensor, cache: SlotCache, owners: torch.Tensor, first: int
    ) -> torch.Tensor:
        """Runs a pass over prompts: `inputs` [g, T, D] embeddings -> final hidden states at `last` [g], [g, D].

        Prompts are padded on the right, where no earlier position sees it. Row first + i of `cache` gets the keys and
        values of prompt `owners[i]`. Of the last layer only what those positions need is computed.
        """
        count, length, width = inputs.shape
        at = torch.arange(length, device=inputs.device)
        rotation = self._rotation(at.repeat(count), length, inputs)
        x, heads, which = inputs.reshape(-1, width), self._heads, torch.arange(count, device=inputs.device)
        for index, layer in enumerate(self._layers):
            turned, values = self._projected(layer, x, rotation)
            queries, keys = turned.view(count, length, -1, self._head_dim).split([heads, self._kv_heads], 2)
            keys, values = (part.transpose(1, 2) for part in (keys, values.view(keys.shape)))
            cache.fill(index, keys, values, owners, first)
            if index < len(self._layers) - 1:
                attended = F.scaled_dot_product_attention(
                    queries.transpose(1, 2), keys, values, is_causal=True, enable_gqa=self._grouped
                )
                x = self._finished(layer, x, attended.transpose(1, 2))
            else:
                mask = (at <= last.unsqueeze(-1))[:, None, None]
                attended = F.scaled_dot_product_attention(
                    queries[which, last].unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=self._grouped
                )
                x = self._finished(layer, x.view(count, length, width)[which, last], attended)
        return self._norm(x)

    def _projected(
        self, layer: _Layer, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns queries and keys with their positions in one tensor [m, H + kv, d], and values [m, kv, d]."""
        (cos, sin), heads, both = rotation, self._heads, self._heads + self._kv_heads
        states = layer.qkv(layer.before_attention(x)).view(len(x), both + self._kv_heads, self._head_dim)
        turned = states[:, :both]
        if layer.head_norms is not None:
            of_queries, of_keys = layer.head_norms
            turned = torch.cat([of_queries(turned[:, :heads]), of_keys(turned[:, heads:])], 1)
        return torch.addcmul(turned * cos, _half_swapped(turned), sin), states[:, both:]

    def _finished(self, layer: _Layer, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Returns a layer's output [m, D], from its input and what attention found for each head."""
        x = layer.out.added_to(x, attended.reshape(len(x), self._heads * self._head_dim))
        gate, up = layer.gate_up(layer.before_mlp(x)).chunk(2, -1)
        return layer.down.added_to(x, F.silu(gate).mul_(up))

    def _rotation(self, positions: torch.Tensor, extent: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and signed sines [n, 1, head_dim] of the positions, from a table that grows with `extent`."""
        if self._angles.shape[1:2] < (extent,) or self._angles.dtype != like.dtype:
            length = max(2 * extent, 128)
            cos, sin = self._rotary(like, torch.arange(length, device=like.device).unsqueeze(0))
            half = self._head_dim // 2
            sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
            self._angles = torch.stack([cos[0], sin[0]])
        cos, sin = self._angles[:, positions].unsqueeze(2)
        return cos, sin

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = None
        if hasattr(attention, "q_norm"):
            norms = (_norm(attention.q_norm), _norm(attention.k_norm))
        return _Layer(
            before_attention=_norm(layer.input_layernorm),
            qkv=_joined([attention.q_proj, attention.k_proj, attention.v_proj]),
            head_norms=norms,
            out=_joined([attention.o_proj]),
            before_mlp=_norm(layer.post_attention_layernorm),
            gate_up=_joined([mlp.gate_proj, mlp.up_proj]),
            down=_joined([mlp.down_proj]),
        )


def _half_swapped(x: torch.Tensor) -> torch.Tensor:
    """Returns x [n, H, d] with the halves of d exchanged; the sign of the first one is in the table of sines."""
    return torch.cat([x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def _norm(module: Any) -> _Norm:
    return _Norm(weight=module.weight, eps=module.variance_epsilon)


@torch.no_grad()
def _joined(layers: Sequence[nn.Linear]) -> _Linear:
    """Joins the layers' weights row by row; their parameters become views of the joined memory."""
    if len(layers) == 1:
        (layer,) = layers
        return _Linear(weight=layer.weight.t(), bias=layer.bias)
    weight = torch.cat([layer.weight.data for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
    first = 0
    for layer in layers:
        last = first + layer.out_features
        layer.weight.data = weight[first:last]
        if bias is not None:
            layer.bias.data = bias[first:last]
        first = last
    return _Linear(weight=weight.t(), bias=bias)


def lean_forward(model: PreTrainedModel) -> LeanForward | None:
    """Returns the lean decode step of a model, or None for a model that it does not compute.

    Joining moves the model's attention and MLP weights into new memory: the parameters stay the same objects.
    """
    config = model.config
    if config.model_type not in FAMILIES or config.hidden_act != "silu":
        return None
    return LeanForward(model) if has_static_positions(model) else None


def has_static_positions(model: PreTrainedModel) -> bool:
    """Whether a position's angle, where the model has such, depends on the position alone, so that nothing asks for
    the longest."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    return getattr(rotary, "rope_type", "default") in STATIC_ROPE
