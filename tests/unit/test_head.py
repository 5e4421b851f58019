"""The output layer gives float32 logits in any dtype, and engine and learner agree on logits as large as a real
model's."""

import numpy as np
import pytest
import torch
from engine_driving import published
from large_logits import FACTS, VOCAB, component_gaps, large_logits, make_model, request
from torch import nn

from latent_grpo.common.config import ConfigError
from latent_grpo.common.head import COPY_BYTES, PROVEN_ON_CUDA, Float32Head, float32_logits, install_float32_head
from latent_grpo.rollout_workers.engine import generate
from latent_grpo.rollout_workers.transformers_engine import TransformersEngine


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


def test_products_that_no_gpu_has_run_are_off_unless_they_are_asked_for():
    assert not PROVEN_ON_CUDA, "docs/gpu.md must then name the card, and this test the new default"
    assert not install_float32_head(make_model()).native
    plain, hidden = layer(48, 70), states(5, 48)
    tried = Float32Head(plain, native=True)
    assert tried.native
    assert torch.equal(tried(hidden), Float32Head(plain)(hidden)), "a CPU has none, so copies are multiplied"


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
    return component_gaps(change(large_logits()), change(large_logits()))[0]


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
    states: list[torch.Tensor] = []  # that the output layer was given, the prompt's first
    model.get_output_embeddings().register_forward_pre_hook(lambda layer, inputs: states.append(inputs[0].clone()))
    (group,) = generate(engine, [request(0)])
    hidden = states[0]
    assert hidden.dtype == torch.bfloat16
    with torch.no_grad():
        exact = nn.functional.linear(hidden.float(), model.get_output_embeddings().weight.float()).log_softmax(-1)
    first = group[0]
    ids = torch.from_numpy(first.latent_ids[0]).long()
    np.testing.assert_allclose(first.latent_log_probs[0], exact[0, ids].numpy(), atol=1e-4)
