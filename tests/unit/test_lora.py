"""LoRA: what is trained, that whoever takes the model sees a plain one, and a step of RL beside plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_learner import load, make_batch, moved, plain_step, save_small_model, settings

from latent_grpo.common.config import ConfigError, LoRAConfig, NewModelConfig, load_config, parse_config
from latent_grpo.common.models import make_model
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.deploy.reproduce.in_process import InProcessLearner, one_rank_group
from latent_grpo.deploy.run.preparation import check_lora
from latent_grpo.learner.lora import add_lora, missing_package, plain_parameters, without_additions

IDS = torch.tensor([[2, 3, 4, 5]])
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2"]


def model_of(architecture: str = "llama"):
    config = NewModelConfig(architecture=architecture, hidden_size=16, num_layers=3, num_heads=2, intermediate_size=24)
    return make_model(config, make_arithmetic_tokenizer(), seed=0)


def with_lora(architecture: str = "llama", trained_layers: int | None = None, **settings):
    model = model_of(architecture)
    additions = add_lora(model, LoRAConfig(**{"rank": 4, **settings}), seed=1, trained_layers=trained_layers)
    return model, additions


def hidden(model) -> torch.Tensor:
    return model.base_model(inputs_embeds=model.get_input_embeddings()(IDS)).last_hidden_state


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_that_is_taken_is_plain_and_computes_what_was_trained(architecture):
    model, additions = with_lora(architecture)
    plain = model_of(architecture)
    torch.testing.assert_close(hidden(model), hidden(plain), msg="the additions begin at 0")
    hidden(model).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=0.05).step()  # of the up factors alone: while they are 0, the others have no gradient
    hidden(model).square().sum().backward()
    torch.optim.SGD(trained, lr=0.05).step()

    taken = dict(plain_parameters(model.named_parameters(), additions))
    own = dict(plain.named_parameters())
    assert taken.keys() == own.keys(), "the names of the model's folder"
    moved = {name for name in own if not torch.equal(own[name], taken[name])}
    assert moved == {f"{name}.weight" for name in additions}
    assert not hidden(model).allclose(hidden(plain), atol=1e-3)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(taken[name])
    torch.testing.assert_close(hidden(plain), hidden(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_layers_of_the_transformer_are_targets_and_no_other_is_trained(architecture):
    model, additions = with_lora(architecture)
    assert not any("lm_head" in name or "embed" in name for name in additions)
    assert len(additions) == 3 * (4 if architecture == "gpt2" else 7)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.{factor}.default.weight" for layer in additions for factor in ("lora_A", "lora_B")
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_initial_model_is_the_trained_one_without_its_additions(architecture):
    model, additions = with_lora(architecture)
    with torch.no_grad():
        for name in additions:
            model.get_parameter(f"{name}.lora_B.default.weight").fill_(0.1)
        trained = hidden(model)
        with without_additions(model):
            assert torch.equal(hidden(model), hidden(model_of(architecture)))
        with pytest.raises(RuntimeError), without_additions(model):
            raise RuntimeError
        assert torch.equal(hidden(model), trained)
        assert not trained.allclose(hidden(model_of(architecture)))


def test_a_step_of_rl_is_that_of_plain_torch_and_what_never_changes_is_not_sent_again(tmp_path):
    """With a KL term, whose initial model is the policy without its factors in the step's second update."""
    folder = save_small_model(tmp_path)
    batch, before = make_batch(folder), load(folder)
    config = settings(lora={"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]}, kl_coefficient=0.5)
    expected, mean_old = plain_step(folder, config, batch)
    without_kl, _ = plain_step(folder, config.model_copy(update={"kl_coefficient": 0.0}), batch)
    with one_rank_group():
        learner = InProcessLearner(config, folder)
        rank = learner._only  # the rank's own report and weights
        report = rank.train_step(batch, 0)
        after = dict(rank.policy_parameters())
    np.testing.assert_allclose(report.mean_old_log_probs, mean_old, atol=1e-5)
    want, got = moved(expected, before), moved(after, before)
    assert float((want - got).norm() / want.norm()) < 1e-5
    assert float((want - moved(without_kl, before)).norm() / want.norm()) > 1e-3
    changed = {name for name, p in before.named_parameters() if not torch.equal(p, after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj", "down_proj"}
    assert rank.frozen == after.keys() - changed
    assert dict(rank.policy_parameters(without=rank.frozen)).keys() == changed


def test_targets_and_layers_are_those_that_the_settings_name():
    _, additions = with_lora(targets=["q_proj", "up_proj"])
    assert {name.rpartition(".")[2] for name in additions} == {"q_proj", "up_proj"}
    _, additions = with_lora(trained_layers=1)
    assert {name.partition("layers.")[2][0] for name in additions} == {"2"}
    with pytest.raises(ConfigError, match=r"no linear layers lm_head, query; it has down_proj, .*, v_proj"):
        with_lora(targets=["query", "lm_head"])
    with pytest.raises(ConfigError, match=r"train_layers \(4\): the model has 3 layers"):
        with_lora(trained_layers=4)


def test_factors_depend_on_the_seed_alone_and_half_precision_keeps_its_dtype():
    (one, additions), (same, _) = with_lora(), with_lora()
    for (name, a), (_, b) in zip(one.named_parameters(), same.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    half = one.to(torch.bfloat16)
    assert {p.dtype for _, p in plain_parameters(half.named_parameters(), additions)} == {torch.bfloat16}


def test_what_lora_does_not_go_with_is_refused_and_a_given_model_has_its_own_rate():
    with pytest.raises(ConfigError, match=r"warm_start\.lora has no effect on stage 1 of warm_start\.source induced"):
        load_config("quickstart", ["warm_start.lora.rank=4", "warm_start.source=induced"])
    given = ["model.path=some/model", "model.new=null"]
    configs = [load_config("quickstart", [*given, *more]) for more in ([], ["warm_start.lora={}"])]
    assert [config.warm_start.optimizer.lr for config in configs] == [2e-5, 1e-4]


def test_rl_with_lora_has_its_own_rate_unless_one_is_set():
    assert settings(lora={}, optimizer={"lr": 1e-3}).optimizer.lr == 1e-3
    data = {"tasks": [{"name": "t", "path": "builtin:arithmetic"}], "model": {"path": "unused"}}
    assert [parse_config(data | more).optimizer.lr for more in ({}, {"lora": {}})] == [1e-6, 1e-5]
    with pytest.raises(ConfigError, match="freeze_embeddings: false has no effect with lora"):
        settings(lora={}, freeze_embeddings=False)


def test_a_missing_package_is_said_with_what_to_install():
    check_lora()
    with pytest.raises(ConfigError, match=r"needs the package peft, .*: pip install 'peft>=0\.21,<0\.22'"):
        check_lora(lambda: missing_package(lambda name: None))
