"""What an engine recorded, the learner finds again: one maths on both sides (METHOD §3, §6)."""

import dataclasses

import pytest
import torch
from test_engine import ARCHITECTURES, make_engine, make_model, make_request

from latent_grpo.common.density import hard_log_prob, latent_log_prob
from latent_grpo.common.schema import TrajectoryBatch, encode
from latent_grpo.learner.batching import collate
from latent_grpo.learner.gaps import compare, summarize_gaps
from latent_grpo.learner.logprobs import step_log_probs
from latent_grpo.learner.policy import PolicyModule
from latent_grpo.rollout_workers.engine import generate

SETTINGS = {
    "one_sided": {},
    "two_sided": {"noise_mode": "two_sided", "noise_scale": 0.5, "tau": 0.6},
    "off": {"noise_mode": "off"},
    "exit by the first id": {"latent_exit": "first", "max_tokens": 30},
    "visible": {"mode": "visible"},
    "hot": {"temperature": 1.7, "noise_scale": 1.5},
}


def rollouts(architecture):
    engine = make_engine(architecture)
    requests = [make_request(i, 3 + 5 * i, **s) for i, s in enumerate(SETTINGS.values())]
    trajectories = [t for group in generate(engine, requests) for t in group]
    return make_model(architecture), TrajectoryBatch(encode(trajectories, 4))


def policy(model):
    return PolicyModule(model, freeze_embeddings=False)


def one_each(rows):
    """Each row in a sequence of its own."""
    return [(row,) for row in rows]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replayed_log_probs_equal_the_rollouts_at_every_noise_and_temperature(architecture):
    model, batch = rollouts(architecture)
    inputs = collate(batch, one_each(range(len(batch))), chunks=7)
    with torch.no_grad():
        gap = (policy(model)(inputs) - inputs.behaviour).abs()
    assert inputs.latent.sum() > 20
    assert (~inputs.latent).sum() >= 4
    assert gap[inputs.latent].max() < 1e-4  # METHOD §6 allows 1e-3
    assert gap[~inputs.latent, 0].max() < 1e-4


def test_the_result_does_not_depend_on_which_rows_share_a_microbatch_or_on_the_chunk():
    model, batch = rollouts("llama")
    together = collate(batch, one_each(range(len(batch))))
    whole = step_log_probs(policy(model)(together), together, weighting="mixture")
    for row in range(len(batch)):
        alone = collate(batch, [(row,)], chunks=3)
        one = step_log_probs(policy(model)(alone), alone, weighting="mixture")
        assert torch.allclose(one, whole[together.batch_rows == row], atol=1e-5)


def test_chunked_gradients_equal_those_of_the_whole_logits_matrix():
    model, batch = rollouts("llama")
    inputs = collate(batch, one_each(range(6)), chunks=5)
    model.requires_grad_(True)

    def gradients(log_pi):
        model.zero_grad()
        log_pi.sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    chunked = gradients(step_log_probs(policy(model)(inputs), inputs, weighting="uniform"))
    captured = {}
    handle = model.base_model.register_forward_hook(lambda m, a, out: captured.update(h=out.last_hidden_state))
    policy(model)(inputs)
    handle.remove()
    logits = model.get_output_embeddings()(captured["h"])[inputs.rows, inputs.positions]
    latent, ids = inputs.latent, inputs.selected
    whole = gradients(
        torch.cat(
            [
                latent_log_prob(logits[latent], ids[latent], inputs.scores[latent]),
                hard_log_prob(logits[~latent], ids[~latent, 0], inputs.temperatures[~latent]),
            ]
        )
    )
    assert chunked.keys() == whole.keys()
    for name, gradient in chunked.items():
        assert (gradient - whole[name]).norm() <= 1e-5 * whole[name].norm() + 1e-8, name


def test_the_self_tests_comparison_is_that_of_whole_logits():
    model, batch = rollouts("llama")
    inputs = collate(batch, one_each(range(len(batch))), chunks=4)
    wrong = dataclasses.replace(inputs, behaviour=inputs.behaviour - 0.25)
    with torch.no_grad():
        found = compare(policy(model), [wrong])
        hidden = model.base_model(inputs_embeds=policy(model)._embedded(inputs)).last_hidden_state  # no other way to it
        logits = model.get_output_embeddings()(hidden)[inputs.rows, inputs.positions]
    sizes = torch.from_numpy(found.largest_logits)
    torch.testing.assert_close(sizes, logits.abs().amax(-1), rtol=1e-4, atol=1e-4)
    report = summarize_gaps([found, found])
    assert (report.latent.count, report.hard.count) == (2 * found.latent.size, 2 * found.hard.size)
    assert found.latent.size == inputs.latent.sum() * 4
    assert found.hard.size == (~inputs.latent).sum()
    for gap in (report.latent, report.hard):
        assert abs(gap.mean - 0.25) < 1e-4
        assert abs(gap.p99 - 0.25) < 1e-4
    assert report.largest_logit == pytest.approx(float(sizes.mean()))


def test_no_gradient_runs_into_the_embedding_through_a_mixture():
    model, batch = rollouts("qwen3")  # untied head
    inputs = collate(batch, [(0,)])
    model.requires_grad_(True)
    policy(model)(inputs).sum().backward()
    fed = set(inputs.ids.flatten().tolist())
    touched = set(model.get_input_embeddings().weight.grad.abs().sum(-1).nonzero().flatten().tolist())
    assert touched <= fed


def test_a_framework_cannot_turn_dropout_on():
    module = policy(make_model("llama"))
    module.train()
    assert not any(m.training for m in module.modules() if isinstance(m, torch.nn.Dropout))
    assert not module.training
