"""A model is refused where its own logits are not those that engine and learner compute from it: from its
configuration where that says so, and else from its numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from latent_grpo.common.config import ConfigError, NewModelConfig
from latent_grpo.common.models import DTYPES, check_logits, load_model, make_model, save_model
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.learner.policy import load_policy_model

TOKENIZER = make_arithmetic_tokenizer()
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def saved(folder, architecture, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES, **settings))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "settings", "found"),
    [
        ("granite", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
        ("cohere", {}, "logit_scale=0.0625"),
        ("gemma2", {"initializer_range": 0.5}, "final_logit_softcapping=30.0"),  # logits as large as a trained model's
    ],
)
def test_a_model_that_changes_its_logits_is_refused_on_both_sides(tmp_path, dtype, architecture, settings, found):
    saved(tmp_path, architecture, **settings)
    key, _, value = found.partition("=")
    message = rf"its config\.json \({architecture}\) has {key} {float(value):g}, .*neither cap nor .*Qwen2"
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path, dtype)
    with pytest.raises(ConfigError, match=message):
        load_policy_model(str(tmp_path))
    message = (
        rf"(?i){architecture}ForCausalLM\) changes the logits of its output layer .*{found}.*by up to .*Llama, Qwen2"
    )
    with pytest.raises(ConfigError, match=message):  # whatever the configuration says
        check_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=DTYPES[dtype]), str(tmp_path))


def test_a_small_change_of_small_logits_is_seen_in_float32(tmp_path):
    saved(tmp_path, "gemma2", initializer_range=0.05)
    with pytest.raises(ConfigError, match=r"by up to 0\.000\d+ where they are up to 0\.\d\d \("):
        check_logits(AutoModelForCausalLM.from_pretrained(tmp_path), str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_the_supported_architectures_pass(tmp_path, architecture, tied, dtype):
    new = NewModelConfig(
        architecture=architecture, hidden_size=16, intermediate_size=32, num_heads=2, tie_embeddings=tied
    )
    save_model(tmp_path, make_model(new, TOKENIZER, seed=0), TOKENIZER)
    assert not load_model(tmp_path, dtype).training


def test_the_numbers_decide_and_not_the_name(tmp_path):
    load_model(saved(tmp_path, "granite", logits_scaling=1.0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("of", "value", "said"),
    [
        ("head", torch.nan, "logits are not finite"),
        ("all", 0.0, "hidden states are all zero"),
        ("head", 0.0, "hidden states are all zero"),
    ],
)
def test_weights_that_are_not_numbers_or_were_never_written_are_said(tmp_path, of, value, said, tied):
    new = NewModelConfig(hidden_size=16, intermediate_size=32, num_heads=2, tie_embeddings=tied)
    model = make_model(new, TOKENIZER, seed=0)
    with torch.no_grad():
        for weights in model.parameters() if of == "all" else [model.get_output_embeddings().weight]:
            weights[...] = value
    save_model(tmp_path, model, TOKENIZER)
    if of == "head" and value == 0.0 and not tied:  # as some recipes begin: every token is as likely
        assert not load_model(tmp_path).get_output_embeddings().weight.any()
        return
    with pytest.raises(ConfigError, match=said):
        load_model(tmp_path)
