"""Chunking the output layer changes neither values nor gradients, and never holds more than a chunk of logits."""

import pytest
import torch
from torch import nn

from latent_grpo.common.head import Float32Head
from latent_grpo.learner.logprobs import selected_log_probs

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
    """A float32 output layer that counts its calls."""

    calls = 0

    def forward(self, hidden):
        self.calls += 1
        return super().forward(hidden)


def frozen_head(dtype, bias=True):
    torch.manual_seed(1)
    return CountedHead(nn.Linear(D, V, bias=bias, dtype=dtype).requires_grad_(False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [1, 4, 20])
def test_under_a_frozen_head_the_gradient_is_that_of_float64_and_logits_are_computed_once(dtype, chunks):
    head = frozen_head(dtype)
    _, hidden, ids, temperatures = example()
    ids[3] = ids[3, 0]  # one id several times
    hidden = hidden.detach().to(dtype).requires_grad_()
    value = selected_log_probs(head, hidden, ids, temperatures, chunks)
    direction = torch.randn(N, W)
    (found,) = torch.autograd.grad((value * direction).sum(), hidden)
    assert (head.calls, found.dtype) == (chunks, dtype)

    exact = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(exact, head.weight.double(), head.bias.double())
    expected = torch.log_softmax(logits / temperatures.double().unsqueeze(-1), -1).gather(-1, ids)
    (gradient,) = torch.autograd.grad((expected * direction.double()).sum(), exact)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    rough = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), gradient, rtol=rough, atol=rough)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_head_of_which_anything_is_trained_has_its_gradient(part):
    head = frozen_head(torch.float32)
    head.get_parameter(part).requires_grad_(True)
    _, hidden, ids, temperatures = example()
    value = selected_log_probs(head, hidden, ids, temperatures, 2)
    (found,) = torch.autograd.grad(value[:, 0].sum(), head.get_parameter(part))
    (expected,) = torch.autograd.grad(full(head, hidden, ids, temperatures)[:, 0].sum(), head.get_parameter(part))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
