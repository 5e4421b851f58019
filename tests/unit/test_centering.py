"""Score centering: what is subtracted is the mean over the noise, and nothing else decides what is drawn."""

import dataclasses

import numpy as np
import pytest
import torch
from fake_run import fake_trajectory

from common.density import surrogate_log_prob
from common.latent import latent_draws, latent_step
from common.schema import TrajectoryBatch, encode
from common.types import TokenFacts
from learner.batching import collate
from learner.centering import OtherDraws, Redraw, draw_keys

V, K, END = 300, 3, 7
SETTINGS = {"k": K, "top_p": 0.95, "noise_scale": 0.5, "tau": 1.0, "one_sided": True, "end_id": END}


def keys(rows, draws, seed=0):
    return torch.randint(0, 2**62, (rows, draws), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 6.0])  # flat: the nucleus reaches beyond the table
def test_draws_of_one_table_are_those_of_separate_steps(sharpness):
    logits = torch.randn(11, V, generator=torch.Generator().manual_seed(1)) * sharpness
    steps, of_draws = torch.arange(11), keys(11, 4)
    together = latent_draws(logits, of_draws, steps, **SETTINGS, top_m=16)
    for j, draw in enumerate(together):
        alone = latent_step(logits, of_draws[:, j], steps, noisy=True, **SETTINGS)
        assert all(torch.equal(a, b) for a, b in zip(draw, alone, strict=True))


@pytest.mark.parametrize("weighting", ["uniform", "mixture"])
def test_the_centered_score_has_mean_zero_over_the_noise_and_the_plain_one_has_not(weighting):
    many, others = 20_000, 4
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.0], requires_grad=True)
    rows = logits.detach().expand(many, -1)
    drawn = latent_draws(rows, keys(many, 1 + others), torch.zeros(many, dtype=torch.long), **SETTINGS | {"end_id": -1})
    names = ("ids", "scores", "weights", "log_probs")
    stacked = {name: torch.stack([getattr(d, name) for d in drawn], 1) for name in names}
    own = {name: values[:, 0] for name, values in stacked.items()}
    other = OtherDraws(
        shares=torch.full((many, others), 1 / others), **{name: values[:, 1:] for name, values in stacked.items()}
    )
    log_p = torch.log_softmax(logits, -1)
    weights = own["weights"] if weighting == "mixture" else None
    plain = surrogate_log_prob(log_p[own["ids"]], own["scores"], component_weights=weights)
    centered = plain - other.mean(log_p[other.ids], weighting=weighting)
    (of_plain,) = torch.autograd.grad(plain.mean(), logits, retain_graph=True)
    (of_centered,) = torch.autograd.grad(centered.mean(), logits)
    # coefficients lie in (-1, 1): the standard error of a mean over the noise is below 0.01
    assert of_centered.abs().max() < 0.01 < 0.03 < of_plain.abs().max()
    assert abs(float(centered.detach().mean())) < 0.01 < abs(float(plain.detach().mean()))


def some_batch():
    rng = np.random.default_rng(0)
    rows = [fake_trajectory(rng, step=1, group=g, index=i, reward=float(i)) for g in range(2) for i in range(2)]
    return TrajectoryBatch(encode(rows, 3))


FACTS = TokenFacts(vocab_size=V, allowed=np.arange(V) < V - 20, latent_end_id=END, eos_ids=(1,), pad_id=0)


def redrawn(view, rows, size, sharpness=1.0):
    """The draws of `rows`, each row's logits a function of it, shown in pieces of `size` steps."""
    inputs = collate(view, rows)
    redraw = Redraw(view, inputs, draw_keys(view, 5), FACTS)
    table = torch.randn(1000, V, generator=torch.Generator().manual_seed(2)) * sharpness
    logits = table[inputs.batch_rows * 100 + inputs.steps]
    for start in range(0, len(logits) + 1, size):
        redraw.visit(slice(start, start + size), logits[start : start + size])
    return inputs, redraw.draws()


def test_draws_do_not_depend_on_the_packing():
    view = some_batch()
    inputs, whole = redrawn(view, range(4), 1000)
    assert whole.ids.shape == (int(inputs.latent.sum()), 5, 3)
    assert (whole.ids < V - 20).all()
    rows = inputs.batch_rows[inputs.latent]
    for row in range(4):
        _, alone = redrawn(view, [row], 2)
        for name in OtherDraws.__dataclass_fields__:
            assert torch.equal(getattr(alone, name), getattr(whole, name)[rows == row]), name


def test_no_two_trajectories_and_draws_share_their_noise():
    assert len(np.unique(draw_keys(some_batch(), 5))) == 4 * 5


def test_draws_that_leave_latent_mode_do_not_count():
    view = some_batch()
    inputs = collate(view, range(4))
    latents = int(inputs.latent.sum())
    logits = torch.zeros(len(inputs.latent), V)
    logits[:, END] = 1.0  # the likeliest
    redraw = Redraw(view, inputs, draw_keys(view, 5), FACTS)
    redraw.visit(slice(0, len(logits)), logits)
    draws = redraw.draws()
    assert not draws.shares.any()
    assert torch.equal(draws.mean(draws.log_probs, weighting="mixture"), torch.zeros(latents))


def test_settings_are_those_of_each_trajectory():
    rng = np.random.default_rng(0)
    row = fake_trajectory(rng, step=1, group=0, index=0, reward=0.0)
    quiet = dataclasses.replace(row, sample_index=1, sampling=dataclasses.replace(row.sampling, noise_scale=0.0))
    view = TrajectoryBatch(encode([row, quiet], 3))
    inputs, draws = redrawn(view, [0, 1], 1000)
    of_quiet = inputs.batch_rows[inputs.latent] == 1
    assert torch.equal(draws.scores[of_quiet], draws.log_probs[of_quiet])
    assert not torch.equal(draws.scores[~of_quiet], draws.log_probs[~of_quiet])


def test_hard_steps_ask_for_nothing_else():
    view = some_batch()
    inputs, draws = redrawn(view, range(4), 1000)
    wide = draws.widened(inputs)
    assert torch.equal(wide[:, :3], inputs.selected)
    assert torch.equal(wide[inputs.latent][:, 3:], draws.ids.flatten(1))
    assert (wide[~inputs.latent] == inputs.selected[~inputs.latent][:, :1]).all()
