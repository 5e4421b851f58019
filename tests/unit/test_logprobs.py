"""Chunking the output layer changes neither values nor gradients, and never holds more than a chunk of logits."""

import pytest
import torch
from torch import nn

from latent_grpo.common.config import LearnerConfig
from latent_grpo.common.head import Float32Head
from latent_grpo.learner.logprobs import calls_size, chunk_size, selected_log_probs

N, D, V, W = 11, 6, 40, 3


class Head(nn.Linear):
    """An output layer that keeps the sizes of its calls."""

    def __init__(self):
        super().__init__(D, V, bias=False)
        self.calls = []

    def forward(self, hidden):
        self.calls.append(len(hidden))
        return super().forward(hidden)


def full(head, hidden, ids, temperatures):
    return torch.log_softmax(head(hidden) / temperatures.unsqueeze(-1), -1).gather(-1, ids)


def example():
    torch.manual_seed(0)
    temperatures = torch.where(torch.arange(N) % 2 == 0, 1.0, 0.6)
    return Head(), torch.randn(N, D, requires_grad=True), torch.randint(0, V, (N, W)), temperatures


@pytest.mark.parametrize("chunks", [1, 2, 4, 11, 20])
def test_chunked_equals_full_in_value_and_gradient(chunks):
    head, hidden, ids, temperatures = example()
    direction = torch.randn(N, W)
    found = []
    for compute in (full, lambda *a: selected_log_probs(*a, chunks)):
        value = compute(head, hidden, ids, temperatures)
        found.append((value, *torch.autograd.grad((value * direction).sum(), (hidden, head.weight))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunks", [1, 3, 20])
def test_the_head_is_called_exactly_as_often_as_asked(chunks):
    head, hidden, ids, temperatures = example()
    with torch.no_grad():
        selected_log_probs(head, hidden, ids, temperatures, chunks)
    assert len(head.calls) == chunks
    assert max(head.calls) <= -(-N // chunks)
    assert sum(head.calls) == N


def test_nothing_selected_still_reaches_every_parameter():
    head, hidden, ids, temperatures = example()
    value = selected_log_probs(head, hidden[:0], ids[:0], temperatures[:0], 2)
    value.sum().backward()
    assert value.shape == (0, W)
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


class CountedHead(Float32Head):
    """A float32 output layer that counts its calls, and how often it computes logits."""

    calls = products = 0

    def forward(self, *inputs):
        self.calls += 1
        return super().forward(*inputs)

    def logits(self, hidden):
        self.products += 1
        return super().logits(hidden)


def float32_head(dtype, trained, bias=True):
    torch.manual_seed(1)
    head = CountedHead(nn.Linear(D, V, bias=bias, dtype=dtype).requires_grad_(False))
    head.weight.requires_grad_(trained)
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("chunks", [1, 4, 20])
def test_gradients_are_those_of_float64_and_a_frozen_head_computes_logits_once(dtype, trained, chunks):
    head = float32_head(dtype, trained)
    _, hidden, ids, temperatures = example()
    ids[3] = ids[3, 0]  # one id several times
    hidden = hidden.detach().to(dtype).requires_grad_()
    value = selected_log_probs(head, hidden, ids, temperatures, chunks)
    direction = torch.randn(N, W)
    found = torch.autograd.grad((value * direction).sum(), (hidden, head.weight) if trained else (hidden,))
    assert {tensor.dtype for tensor in found} == {dtype}
    assert head.products == (2 * chunks if trained else chunks)
    assert head.calls == 1, "with ZeRO-3 each call gathers the layer"

    exact, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, head.weight))
    logits = torch.nn.functional.linear(exact, weight, head.bias.double())
    expected = torch.log_softmax(logits / temperatures.double().unsqueeze(-1), -1).gather(-1, ids)
    gradients = torch.autograd.grad((expected * direction.double()).sum(), (exact, weight))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    rough = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(found, gradients, strict=False):
        torch.testing.assert_close(one.double(), other, rtol=rough, atol=rough)


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "stage", "inside", "calls"),
    [
        (48, "auto", 2, 2048, 2048),
        (16_384, "auto", 3, 2048, 2048),
        (49_152, "auto", 2, 682, 682),
        (151_936, "auto", 2, 220, 220),
        (151_936, "auto", 3, 220, 2048),  # Latent-SFT calls the layer once a chunk, and each call gathers it
        (10_000_000, "auto", 2, 16, 16),
        (151_936, 512, 3, 512, 512),
    ],
)
def test_by_default_so_many_logits_exist_at_once_as_take_128_mib(vocabulary, tokens, stage, inside, calls):
    learner = LearnerConfig(logprob_chunk_tokens=tokens, zero_stage=stage)
    assert (chunk_size(learner, vocabulary), calls_size(learner, vocabulary)) == (inside, calls)


def test_a_head_whose_bias_is_trained_has_its_gradient():
    head = float32_head(torch.float32, trained=True)
    head.bias.requires_grad_(True)
    _, hidden, ids, temperatures = example()
    direction = torch.randn(N, W)
    values = (f(head, hidden, ids, temperatures) for f in (full, lambda *a: selected_log_probs(*a, 2)))
    expected, found = (torch.autograd.grad((v * direction).sum(), (hidden, head.weight, head.bias)) for v in values)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
