"""`model.train_layers`: what is frozen stays as it was in Latent-SFT and in RL, and is published all the same."""

from __future__ import annotations

import pytest
import torch

from latent_grpo.common.config import ConfigError, NewModelConfig, RunConfig
from latent_grpo.common.models import make_model
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.learner.policy import freeze_lower_layers


def model_of(architecture: str, tied: bool):
    config = NewModelConfig(
        architecture=architecture, tokenizer="arithmetic", hidden_size=16, num_layers=3, num_heads=2,
        intermediate_size=24, tie_embeddings=tied,
    )  # fmt: skip
    return make_model(config, make_arithmetic_tokenizer(), seed=0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_update_changes_the_uppermost_layers_and_what_follows_them_alone(architecture, tied):
    model = model_of(architecture, tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    freeze_lower_layers(model, 1)
    inputs = model.get_input_embeddings()(torch.tensor([[2, 3, 4]]))
    assert not inputs.requires_grad, "the backward pass must end at the lowest trained layer"
    model.get_output_embeddings()(model.base_model(inputs_embeds=inputs).last_hidden_state).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    last = {name for name in before if ".layers.2." in name or ".h.2." in name}
    after = {"model.norm.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"} & before.keys()
    # a bias of the keys changes no attention, since softmax ignores what is added to all of them
    still = {name for name in last if name.endswith("k_proj.bias")}
    assert moved | still == last | after | ({"lm_head.weight"} if not tied else set())


def test_without_the_setting_nothing_is_frozen_and_too_many_layers_are_refused():
    model = model_of("llama", tied=True)
    freeze_lower_layers(model, None)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match=r"train_layers \(4\): the model has 3 layers"):
        freeze_lower_layers(model, 4)


def test_stage_1_of_induced_labels_refuses_it():
    with pytest.raises(ValueError, match=r"model\.train_layers \(1\) has no effect on stage 1"):
        RunConfig.model_validate(
            {
                "model": {"new": {}, "train_layers": 1},
                "tasks": [{"name": "t", "path": "builtin:words"}],
                "warm_start": {"source": "induced"},
            }
        )
