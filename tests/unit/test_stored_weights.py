"""A model for ZeRO-3 is the one that `load_model` loads, without memory for its weights; ranks are in test_learner."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig

from latent_grpo.common.errors import ConfigError
from latent_grpo.common.models import load_model
from latent_grpo.learner.stored_weights import StoredWeights, checksum_of

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDER = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
MODELS = {
    "tied": LlamaConfig(**WIDER, tie_word_embeddings=True),
    "untied": LlamaConfig(**WIDER, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "experts": MixtralConfig(**WIDER, num_local_experts=3, num_experts_per_tok=2),
    "scaled by a buffer": Gemma2Config(**WIDER, final_logit_softcapping=None, attn_logit_softcapping=None),
}


def saved(folder, config, dtype=torch.float32):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_loaded_model_but_for_the_memory(tmp_path, name, kept, dtype):
    folder = saved(tmp_path, MODELS[name], kept)
    whole, weights = load_model(folder, dtype), StoredWeights()
    model = weights.load(folder, dtype)
    assert all(p.untyped_storage().nbytes() == p.element_size() for p in model.parameters())
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad(), weights.lent(model):
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in whole.named_parameters()
    ]
    both = zip(model.named_buffers(), whole.named_buffers(), strict=True)
    assert all(one == two and torch.equal(a, b) and a.dtype == b.dtype for (one, a), (two, b) in both)
    assert all(p.isnan().all() for p in model.parameters()), "computing with what is not there is noticed"


def test_files_of_several_data_types_lose_nothing_and_are_named(tmp_path, caplog):
    folder = saved(tmp_path, MODELS["untied"], torch.bfloat16)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"].float() + 2.0**-20
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    weights, ids = StoredWeights(), torch.arange(6).unsqueeze(0)
    model, whole = weights.load(folder, "float32"), load_model(folder)
    assert "its files hold weights of BF16 and F32, so each learner rank copies all of them" in caplog.text
    with torch.no_grad(), weights.lent(model):
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_what_load_model_refuses_is_refused(tmp_path):
    folder = saved(tmp_path, MODELS["untied"])
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"lm_head.weight": state["lm_head.weight"] * torch.nan}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="not finite"):
        StoredWeights().load(folder, "float32")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="1 missing"):
        StoredWeights().load(folder, "float32")


def test_ranks_compare_every_tensor():
    tensors = [torch.arange(100.0).view(10, 10), torch.ones(3)]
    code = checksum_of(tensors)
    assert code == checksum_of([t.clone() for t in tensors])
    for index in range(2):
        other = [t.clone() for t in tensors]
        other[index].view(-1)[-2] += 1
        assert checksum_of(other) != code
    assert checksum_of([tensors[0].view(4, 25), tensors[1]]) != code
