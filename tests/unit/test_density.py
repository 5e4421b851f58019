"""METHOD §3: values and gradients against closed forms."""

import pytest
import torch

from latent_grpo.common.density import hard_log_prob, latent_log_prob, surrogate_log_prob


def test_surrogate_is_the_gumbel_log_density_weighted_over_components():
    log_p, scores = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    weights = torch.softmax(torch.randn(5, 3), -1)
    d = scores - log_p
    density = -d - torch.exp(-d)
    assert torch.allclose(surrogate_log_prob(log_p, scores).double(), density.mean(-1), atol=1e-5)
    got = surrogate_log_prob(log_p, scores, component_weights=weights)
    assert torch.allclose(got.double(), (density * weights).sum(-1), atol=1e-5)


@pytest.mark.parametrize(
    ("flip", "slope"),
    [
        ("off", lambda d: 1 - torch.exp(-d)),
        ("reference", lambda d: -(1 - torch.exp(d))),
        ("sign", lambda d: 1 - torch.exp(d)),
    ],
)
def test_flip_changes_the_gradient_and_never_the_value(flip, slope):
    log_p = torch.zeros(4, 1, requires_grad=True)
    scores = torch.tensor([[-0.5], [-0.5], [0.8], [0.8]])
    advantages = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    value = surrogate_log_prob(log_p, scores, advantages=advantages, flip=flip)
    assert torch.allclose(value, surrogate_log_prob(log_p.detach(), scores))
    value.sum().backward()
    original = 1 - torch.exp(-scores)
    want = original.clone()
    want[0] = slope(scores[0])  # only A <= 0 and d < 0 is turned
    assert torch.allclose(log_p.grad, want, atol=1e-6)


def test_reference_flip_tames_and_sign_flip_turns():
    d = torch.tensor(-3.0)
    assert 1 - torch.exp(-d) < -10
    assert -1 < -(1 - torch.exp(d)) < 0
    assert 0 < 1 - torch.exp(d) < 1


def test_a_large_d_leaves_no_nan_in_the_gradient():
    log_p = torch.tensor([[-500.0, 1.0]], requires_grad=True)
    surrogate_log_prob(log_p, torch.zeros(1, 2), advantages=torch.tensor([-1.0])).sum().backward()
    assert log_p.grad.isfinite().all()


def test_log_probs_from_logits_are_over_the_whole_vocabulary():
    logits, ids, scores = torch.randn(6, 20), torch.randint(20, (6, 4)), torch.randn(6, 4)
    log_p = torch.log_softmax(logits.double(), -1)
    want = surrogate_log_prob(log_p.gather(-1, ids), scores)
    assert torch.allclose(latent_log_prob(logits, ids, scores), want, atol=1e-5)
    temperature = torch.linspace(0.3, 1.5, 6)
    hard = torch.log_softmax(logits.double() / temperature[:, None], -1).gather(-1, ids[:, :1])[:, 0]
    assert torch.allclose(hard_log_prob(logits, ids[:, 0], temperature).double(), hard, atol=1e-5)


def test_an_unknown_flip_is_refused():
    with pytest.raises(ValueError, match="reference, sign, off"):
        surrogate_log_prob(torch.zeros(1, 1), torch.zeros(1, 1), flip="on")
