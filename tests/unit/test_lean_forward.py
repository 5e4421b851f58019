"""The lean decode step against Transformers' own forward pass, for every family that it serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from latent_grpo.common.weights import checksum
from latent_grpo.rollout_workers.kv_cache import SlotCache
from latent_grpo.rollout_workers.lean_forward import LeanForward, lean_forward

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama, one head a key": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 4})),
    "llama 3 positions": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
}
EXTENT = 40


def made(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():  # biases and norms of a new model are 0 and 1, and would hide what is left out
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval().to(dtype)


class Step:
    """The same decode step of six rows of different length, by one pass or the other."""

    def __init__(self, model: PreTrainedModel) -> None:
        torch.manual_seed(1)
        self.model = model
        self.positions = torch.tensor([EXTENT - 1, 3, 17, 0, 30, 8])
        rows = len(self.positions)
        self.inputs = torch.randn(rows, model.config.hidden_size).to(model.dtype)
        self.mask = (torch.arange(EXTENT) <= self.positions.unsqueeze(-1))[:, None, None]
        self.cache = SlotCache.of(model)
        self.cache.reserve(rows, EXTENT, 0)
        self.prompts = torch.randn(2, EXTENT, model.config.hidden_size).to(model.dtype)
        self.owners = torch.tensor([0, 1, 0, 1, 0, 1])
        prefill = model.base_model(inputs_embeds=self.prompts, use_cache=True)
        self.hidden = prefill.last_hidden_state
        self.cache.insert(prefill.past_key_values, self.owners, 0)

    def of_transformers(self) -> torch.Tensor:
        self.cache.begin_step(self.positions, EXTENT)
        return self.model.base_model(
            inputs_embeds=self.inputs.unsqueeze(1),
            position_ids=self.positions.unsqueeze(-1),
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, 0]

    def lean(self, forward: LeanForward) -> torch.Tensor:
        self.cache.begin_step(self.positions, EXTENT)
        return forward(self.inputs, self.positions, self.cache, self.mask)


def served(model: PreTrainedModel) -> LeanForward:
    forward = lean_forward(model)
    assert forward is not None
    return forward


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_it_equals_the_models_own_forward_pass(name: str) -> None:
    model = made(name)
    step = Step(model)
    expected = step.of_transformers()
    found = step.lean(served(model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step.of_transformers(), expected, atol=1e-5, rtol=1e-5)  # joining changed no weight


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_prompts_of_different_length_equal_the_models_own_pass(name: str) -> None:
    """Their hidden states, and the step that follows on the keys and values that they leave."""
    model = made(name)
    step = Step(model)
    expected, forward = step.of_transformers(), served(model)
    last = torch.tensor([EXTENT - 1, 8])
    step.cache.clear()
    found = forward.prompts(step.prompts, last, step.cache, step.owners, 0)
    torch.testing.assert_close(found, step.hidden[torch.arange(2), last], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step.of_transformers(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@torch.inference_mode()
def test_bfloat16_differs_by_its_rounding(name: str) -> None:
    model = made(name, torch.bfloat16)
    step = Step(model)
    expected = step.of_transformers().float()
    exact = Step(made(name)).of_transformers()
    found = step.lean(served(model)).float()
    of_transformers = (expected - exact).abs().mean()
    assert (found - exact).abs().mean() < 1.5 * of_transformers


@torch.inference_mode()
def test_loaded_weights_are_its_own_at_once() -> None:
    model, other = made("qwen2"), made("qwen2")
    forward = served(model)
    for parameter in other.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.copy_(new)
    assert checksum(model.named_parameters()) == checksum(other.named_parameters())
    torch.testing.assert_close(Step(model).lean(forward), Step(other).of_transformers(), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_table_of_angles_grows_with_the_rows() -> None:
    model = made("llama")
    forward, step = served(model), Step(model)
    step.lean(forward)
    step.cache.reserve(6, 200, 6)
    step.positions = torch.tensor([199, 3, 180, 0, 30, 8])
    step.mask = (torch.arange(200) <= step.positions.unsqueeze(-1))[:, None, None]
    step.cache.begin_step(step.positions, 200)
    found = forward(step.inputs, step.positions, step.cache, step.mask)
    step.cache.begin_step(step.positions, 200)
    expected = model.base_model(
        inputs_embeds=step.inputs.unsqueeze(1),
        position_ids=step.positions.unsqueeze(-1),
        attention_mask=step.mask,
        past_key_values=step.cache,
        use_cache=True,
    ).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2)),
        LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 1}, hidden_act="gelu")),
        LlamaForCausalLM(
            LlamaConfig(
                **SIZES | {"num_hidden_layers": 1},
                rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            )
        ),
    ],
    ids=["architecture", "activation", "positions that depend on the length"],
)
def test_what_it_does_not_compute_is_left_to_transformers(model: PreTrainedModel) -> None:
    assert lean_forward(model) is None
