"""What an engine recorded, the learner finds again: one maths on both sides (METHOD §3, §6)."""

import pytest
import torch
from test_engine import ARCHITECTURES, make_engine, make_request

from common.density import hard_log_prob, latent_log_prob
from common.schema import TrajectoryBatch, encode
from learner.policy import PolicyModule, collate, step_log_probs
from rollout_workers.engine import generate

SETTINGS = {
    "one_sided": {},
    "two_sided": {"noise_mode": "two_sided", "noise_scale": 0.5, "tau": 0.6},
    "off": {"noise_mode": "off"},
    "visible": {"mode": "visible"},
    "hot": {"temperature": 1.7, "noise_scale": 1.5},
}


def rollouts(architecture):
    engine = make_engine(architecture)
    requests = [make_request(i, 3 + 5 * i, **s) for i, s in enumerate(SETTINGS.values())]
    trajectories = [t for group in generate(engine, requests) for t in group]
    return engine._model, TrajectoryBatch(encode(trajectories, 4))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replayed_log_probs_equal_the_rollouts_at_every_noise_and_temperature(architecture):
    model, batch = rollouts(architecture)
    inputs = collate(batch, range(len(batch)))
    with torch.no_grad():
        latent, hard = PolicyModule(model, chunk_tokens=7)(inputs)
    assert len(latent) > 20
    assert len(hard) >= 4
    assert (latent - inputs.latent_behaviour).abs().max() < 1e-4  # METHOD §6 allows 1e-3
    assert (hard - inputs.hard_behaviour).abs().max() < 1e-4


def test_the_result_does_not_depend_on_which_rows_share_a_microbatch_or_on_the_chunk():
    model, batch = rollouts("llama")
    together = collate(batch, range(len(batch)))
    log_probs = step_log_probs(together, *PolicyModule(model)(together), component_weighting="mixture")
    for row in range(len(batch)):
        alone = collate(batch, [row])
        one = step_log_probs(alone, *PolicyModule(model, chunk_tokens=3)(alone), component_weighting="mixture")
        assert torch.allclose(one[0], log_probs[row, : one.shape[1]], atol=1e-5)
        assert (log_probs[row, one.shape[1] :] == 0).all()


def test_chunked_gradients_equal_those_of_the_whole_logits_matrix():
    model, batch = rollouts("llama")
    inputs = collate(batch, range(6))
    model.requires_grad_(True)
    policy = PolicyModule(model, chunk_tokens=5)

    def gradients(latent_log_pi, hard_log_pi):
        model.zero_grad()
        (latent_log_pi.sum() + hard_log_pi.sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    latent, hard = policy(inputs)
    flat = step_log_probs(inputs, latent, hard, component_weighting="uniform").reshape(-1)
    chunked = gradients(flat[inputs.latent_step], flat[inputs.hard_step])

    captured = {}
    handle = model.base_model.register_forward_hook(lambda m, a, out: captured.update(h=out.last_hidden_state))
    policy(inputs)
    handle.remove()
    logits = model.get_output_embeddings()(captured["h"]).flatten(0, 1)
    whole = gradients(
        latent_log_prob(logits[inputs.latent_source], inputs.latent_ids, inputs.latent_scores),
        hard_log_prob(logits[inputs.hard_source], inputs.hard_ids, inputs.hard_temperature),
    )
    assert chunked.keys() == whole.keys()
    for name, gradient in chunked.items():
        assert (gradient - whole[name]).norm() <= 1e-5 * whole[name].norm() + 1e-8, name


def test_no_gradient_runs_into_the_embedding_through_a_mixture():
    model, batch = rollouts("qwen3")  # untied head
    inputs = collate(batch, [0])
    model.requires_grad_(True)
    latent, hard = PolicyModule(model)(inputs)
    (latent.sum() + hard.sum()).backward()
    fed = set(inputs.token_ids[inputs.attention_mask.bool()].tolist())
    touched = set(model.get_input_embeddings().weight.grad.abs().sum(-1).nonzero().flatten().tolist())
    assert touched <= fed


def test_a_framework_cannot_turn_dropout_on():
    policy = PolicyModule(make_engine()._model)
    policy.train()
    assert not any(m.training for m in policy.modules())
