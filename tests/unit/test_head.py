"""The output layer gives float32 logits in any dtype, and engine and learner agree on logits as large as a real
model's."""

import numpy as np
import pytest
import torch
from engine_driving import published
from torch import nn

from latent_grpo.common.config import ConfigError
from latent_grpo.common.head import COPY_BYTES, Float32Head, float32_logits, install_float32_head
from latent_grpo.common.schema import TrajectoryBatch, encode
from latent_grpo.common.types import GroupRequest, SamplingSettings, TokenFacts
from latent_grpo.learner.batching import collate
from latent_grpo.learner.policy import PolicyModule
from latent_grpo.rollout_workers.engine import generate
from latent_grpo.rollout_workers.transformers_engine import TransformersEngine

LARGEST = 36.0  # of a position's logits: SmolLM2-135M has 24 before and 36 after Latent-SFT (docs/numerics.md)
SPREAD, COMMON = 2.5, 16  # standard deviation of a position's logits; dimensions that raise all of them alike
VOCAB, END, EOS, K = 2000, 5, 1, 10
FACTS = TokenFacts(vocab_size=VOCAB, allowed=np.ones(VOCAB, bool), latent_end_id=END, eos_ids=(EOS,), pad_id=0)


def layer(inputs, outputs, bias=False, dtype=torch.bfloat16):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(inputs, outputs, bias=bias).to(dtype)


def states(rows, inputs, dtype=torch.bfloat16, scale=8.0):
    return (torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_a_float32_layer_computes_bit_for_bit_what_it_computed_before(bias):
    plain, hidden = layer(48, 70, bias, torch.float32), states(5, 48, torch.float32)
    assert torch.equal(Float32Head(plain)(hidden), plain(hidden))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 48), (0, 48)])
def test_bfloat16_logits_and_their_gradients_are_those_of_a_float32_product(shape, bias):
    plain = layer(48, 70, bias)
    hidden = states(int(np.prod(shape[:-1])), 48).view(shape).requires_grad_()
    exact = layer(48, 70, bias).float()
    exact_hidden = hidden.detach().float().requires_grad_()
    outer = torch.randn(*shape[:-1], 70, generator=torch.Generator().manual_seed(2))
    found, expected = float32_logits(Float32Head(plain), hidden), exact(exact_hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.backward(outer)
    expected.backward(outer)
    rounding = {"rtol": 2**-8, "atol": 1e-6}  # a gradient has the dtype of its tensor
    torch.testing.assert_close(hidden.grad.float(), exact_hidden.grad, **rounding)
    torch.testing.assert_close(plain.weight.grad.float(), exact.weight.grad, **rounding)
    if bias:
        torch.testing.assert_close(plain.bias.grad.float(), exact.bias.grad, **rounding)


def test_a_layer_too_large_for_one_float32_copy_is_multiplied_in_parts():
    inputs, outputs = 4096, 9_000
    assert 4 * inputs * outputs > 2 * COPY_BYTES
    plain, hidden = layer(inputs, outputs), states(2, inputs, scale=1.0).requires_grad_()
    found = Float32Head(plain)(hidden)
    expected = nn.functional.linear(hidden.detach().float(), plain.weight.detach().float())
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-4)
    outer = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    found.backward(outer)
    torch.testing.assert_close(hidden.grad.float(), outer @ plain.weight.detach().float(), rtol=2**-8, atol=1e-3)
    torch.testing.assert_close(plain.weight.grad.float(), outer.T @ hidden.detach().float(), rtol=2**-8, atol=1e-3)


def test_a_frozen_layer_passes_the_gradient_on():
    plain = layer(48, 70).requires_grad_(False)
    hidden = states(3, 48).requires_grad_()
    Float32Head(plain)(hidden).sum().backward()
    assert plain.weight.grad is None
    torch.testing.assert_close(hidden.grad.float(), plain.weight.float().sum(0).expand(3, -1), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_keeps_its_parameters_and_their_names(tied):
    model = make_model(tied)
    before = dict(model.named_parameters())
    head = install_float32_head(model)
    assert install_float32_head(model) is head, "a second time changes nothing"
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert set(model.state_dict()) == set(make_model(tied).state_dict())


def test_another_kind_of_output_layer_is_refused_where_it_rounds_and_used_where_it_does_not():
    class Scaled(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 0.5

    model = make_model(tied=False)
    head = Scaled(64, VOCAB, bias=False)
    model.set_output_embeddings(head)
    assert install_float32_head(model) is head
    assert float32_logits(head, torch.ones(1, 64)).shape == (1, VOCAB)
    with pytest.raises(ConfigError, match=r"Scaled and gives bfloat16 logits.*model\.dtype to float32"):
        float32_logits(head.bfloat16(), torch.ones(1, 64, dtype=torch.bfloat16))


# --- logits as large as a real model's ---------------------------------------------------------------------------


def make_model(tied=False, dtype=torch.bfloat16):
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.05, tie_word_embeddings=tied,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def large_logits(dtype=torch.bfloat16):
    """An untied model whose largest logit of a position is about `LARGEST`, as a trained model's is.

    Trained models have a part of the hidden state that is alike everywhere and raises all logits alike. It changes no
    probability, but bfloat16 rounds the sum. Here it is the first `COMMON` dimensions.
    """
    model = make_model(dtype=torch.float32)
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    ids = torch.randint(6, VOCAB, (8, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embed[:, :COMMON] = embed.std() * torch.linspace(3.0, 4.0, COMMON)
        head[:, :COMMON] = 0.0
        head.mul_(SPREAD / model(input_ids=ids).logits.std())
        hidden = model.base_model(input_ids=ids).last_hidden_state
        missing = LARGEST - (hidden @ head.T).amax(-1).mean()
        head[:, :COMMON] = missing / hidden[..., :COMMON].sum(-1).mean()
    return model.to(dtype)


def request(uid):
    return GroupRequest(
        group_uid=f"g{uid}", problem_uid=f"p{uid}", task="t",
        prompt_ids=np.random.default_rng(uid).integers(6, VOCAB, size=10 + uid).astype(np.int32),
        sample_indices=(0, 1, 2, 3), sampling=SamplingSettings(mode="latent", max_tokens=24, k=K),
        purpose="self_test", epoch=0, run_seed=3, verifier="v", gold_answer="",
    )  # fmt: skip


class RoundedHead(nn.Linear):
    """The output layer before the remedy: its product is rounded to bfloat16."""

    def forward(self, hidden):
        return super().forward(hidden).float()


def rounded(model):
    head = model.get_output_embeddings()
    replaced = RoundedHead(head.in_features, head.out_features, bias=False)
    replaced.weight = head.weight
    model.set_output_embeddings(replaced)
    return model


def gaps(change=lambda model: model):
    """|learner - engine| of the latent components of bfloat16 rollouts."""
    model = change(large_logits())
    engine = TransformersEngine(model, FACTS, max_rows=32)
    engine.load_weights(*published(model))
    samples = [t for group in generate(engine, [request(i) for i in range(6)]) for t in group]
    inputs = collate(TrajectoryBatch(encode(samples, K)), range(len(samples)), chunks=3)
    with torch.no_grad():
        gap = (PolicyModule(change(large_logits()))(inputs) - inputs.behaviour).abs()
    assert inputs.latent.sum() > 200
    return gap[inputs.latent].numpy()


def test_in_bfloat16_engine_and_learner_agree_on_logits_as_large_as_a_real_models():
    found, before = gaps(), gaps(rounded)
    print(f"float32 product: mean {found.mean():.4f} p99 {np.quantile(found, 0.99):.4f}; rounded: {before.mean():.4f}")
    assert found.mean() < 0.02
    assert np.quantile(found, 0.99) < 0.1
    assert before.mean() > 0.03, "rounded logits pass too, so the test shows nothing"
    assert np.quantile(before, 0.99) > 0.1


def test_the_recorded_log_probs_are_those_of_float32_logits():
    model = large_logits()
    engine = TransformersEngine(model, FACTS, max_rows=4)
    engine.load_weights(*published(model))
    asked = request(0)
    (group,) = generate(engine, [asked])
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.from_numpy(asked.prompt_ids).long()[None]).last_hidden_state[:, -1]
        exact = nn.functional.linear(hidden.float(), model.get_output_embeddings().weight.float()).log_softmax(-1)
    first = group[0]
    ids = torch.from_numpy(first.latent_ids[0]).long()
    np.testing.assert_allclose(first.latent_log_probs[0], exact[0, ids].numpy(), atol=1e-4)
