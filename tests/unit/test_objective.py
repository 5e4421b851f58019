"""METHOD §5 against a step-by-step float64 reference."""

import math

import torch

from latent_grpo.learner.objective import importance_weights, k3_kl, policy_loss


def reference_loss(new, old, advantage, mask, low, high, dual):
    total, count = 0.0, 0
    for n, o, a, m in zip(new.tolist(), old.tolist(), advantage.tolist(), mask.tolist()):
        if not m:
            continue
        ratio = math.exp(n - o)
        objective = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        if a < 0:
            objective = max(objective, dual * a)
        total, count = total - objective, count + 1
    return total / count


def test_policy_loss_equals_the_reference_in_every_clipping_region():
    torch.manual_seed(0)
    new, old, advantage = torch.randn(400).double(), torch.randn(400).double(), torch.randn(400).double()
    mask = torch.rand(400) < 0.8
    loss, diagnostics = policy_loss(new, old, advantage, mask)
    assert abs(loss.item() - reference_loss(new, old, advantage, mask, 0.2, 0.2, 3.0)) < 1e-5
    assert diagnostics.clipped_dual > 0
    assert diagnostics.clipped_high > 0
    assert diagnostics.steps == mask.sum()


def test_the_gradient_on_policy_is_the_advantage_over_the_denominator():
    log_probs = torch.zeros(4, requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, 0.0, 5.0])
    mask = torch.tensor([True, True, True, False])
    loss, _ = policy_loss(log_probs, torch.zeros(4), advantage, mask, denominator=10)
    loss.backward()
    assert torch.allclose(log_probs.grad, torch.tensor([-0.1, 0.2, 0.0, 0.0]))


def test_the_dual_clip_stops_the_gradient_of_a_runaway_negative_step():
    log_probs = torch.tensor([math.log(4.0)], requires_grad=True)
    loss, _ = policy_loss(log_probs, torch.zeros(1), torch.tensor([-1.0]), torch.tensor([True]))
    loss.backward()
    assert loss.item() == 3.0
    assert log_probs.grad.item() == 0.0


def test_importance_weights_multiply_the_loss_of_their_step():
    args = (torch.zeros(2), torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([True, True]))
    weighted, _ = policy_loss(*args, weights=torch.tensor([2.0, 0.0]))
    assert weighted.item() == policy_loss(*args)[0].item()


def test_masked_steps_may_hold_anything():
    log_probs = torch.tensor([0.0, float("nan")], requires_grad=True)
    loss, _ = policy_loss(log_probs, torch.zeros(2), torch.ones(2), torch.tensor([True, False]))
    loss.backward()
    assert log_probs.grad.isfinite().all()


def test_k3_is_zero_at_equality_and_never_negative():
    p, q = torch.randn(100), torch.randn(100)
    assert (k3_kl(p, q) >= 0).all()
    assert torch.equal(k3_kl(p, p), torch.zeros(100))
    assert torch.allclose(k3_kl(p, q).double(), torch.expm1((q - p).double()) - (q - p).double(), atol=1e-5)


def test_importance_weights_are_truncated_masked_or_none():
    gap = torch.tensor([0.2, 0.5, 1.0, 2.0, 5.0]).log()
    assert importance_weights(gap, "off", 0.5, 2.0) is None
    torch.testing.assert_close(importance_weights(gap, "truncate", 0.5, 2.0), torch.tensor([0.2, 0.5, 1.0, 2.0, 2.0]))
    masked = importance_weights(gap, "mask", 0.4, 2.5)
    torch.testing.assert_close(masked, torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0]))
