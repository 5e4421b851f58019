"""Score centering: what is subtracted is the mean over the noise, and nothing else decides what is drawn."""

import dataclasses

import numpy as np
import pytest
import torch
from fake_run import fake_trajectory

from latent_grpo.common.density import surrogate_log_prob
from latent_grpo.common.latent import latent_draws, latent_step
from latent_grpo.common.schema import TrajectoryBatch, encode
from latent_grpo.common.types import TokenFacts
from latent_grpo.learner.batching import collate
from latent_grpo.learner.centering import OtherDraws, Redraw, draw_keys

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
        shares=torch.full((many, others), 1 / others),
        **{name: stacked[name][:, 1:] for name in ("ids", "scores", "weights")},
    )
    log_p = torch.log_softmax(logits, -1)
    weights = own["weights"] if weighting == "mixture" else None
    plain = surrogate_log_prob(log_p[own["ids"]], own["scores"], component_weights=weights)
    centered = other.centered(plain, log_p[other.ids], weighting=weighting)
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
    inputs = collate(view, [(row,) for row in rows])
    redraw = Redraw(view, inputs, draw_keys(view, 5), FACTS)
    table = torch.randn(1000, V, generator=torch.Generator().manual_seed(2)) * sharpness
    logits = table[inputs.batch_rows * 100 + inputs.steps]
    for start in range(0, len(logits) + 1, size):
        redraw.visit(slice(start, start + size), logits[start : start + size])
    return inputs, redraw.draws()[0]


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


def drawn_from(logits):
    """The draws and their log-probs where every latent step has these logits [V]."""
    view = some_batch()
    inputs = collate(view, [(row,) for row in range(4)])
    redraw = Redraw(view, inputs, draw_keys(view, 5), FACTS)
    redraw.visit(slice(0, len(inputs.latent)), logits.expand(len(inputs.latent), -1))
    return redraw.draws()


def test_a_step_whose_draws_all_leave_keeps_its_value_without_gradient():
    logits = torch.zeros(V)
    logits[END] = 1.0  # the likeliest
    draws, log_probs = drawn_from(logits)
    assert not draws.shares.any()
    surrogate = torch.randn(len(log_probs), requires_grad=True)
    centered = draws.centered(surrogate, log_probs, weighting="mixture")
    assert torch.equal(centered, surrogate)
    assert not torch.autograd.grad(centered.sum(), surrogate)[0].any()


def test_the_mean_is_over_the_draws_that_stay():
    logits = torch.zeros(V)
    logits[[END, 3]] = torch.tensor([6.0, 6.1])  # either may be first, by the noise
    draws, log_probs = drawn_from(logits)
    stay = draws.shares > 0
    assert 0 < int(stay.sum()) < stay.numel()
    assert torch.equal(stay, draws.ids[..., 0] != END)
    each = surrogate_log_prob(log_probs.flatten(0, 1), draws.scores.flatten(0, 1)).view(stay.shape)
    for step in range(len(stay)):
        if stay[step].any():
            centered = draws.centered(torch.zeros(len(stay)), log_probs, weighting="uniform")[step]
            assert centered == pytest.approx(-float(each[step][stay[step]].mean()), abs=1e-6)


def test_logits_that_are_not_numbers_draw_nothing():
    draws, log_probs = drawn_from(torch.full((V,), torch.nan))
    assert not draws.shares.any()
    plain = torch.full((len(log_probs),), torch.nan)
    assert draws.centered(plain, log_probs, weighting="mixture").isnan().all()


@pytest.mark.parametrize("flip", ["reference", "sign"])
def test_other_draws_are_flipped_like_the_recorded_one(flip):
    rows, others = 500, 3
    logits = torch.linspace(2, -2, 8, requires_grad=True)
    log_p = torch.log_softmax(logits, -1)
    ids = torch.randint(0, 8, (rows, others, K), generator=torch.Generator().manual_seed(3))
    scores = log_p.detach()[ids] - 0.3  # d < 0
    weights = torch.softmax(scores, -1)
    draws = OtherDraws(ids=ids.int(), scores=scores, weights=weights, shares=torch.full((rows, others), 1 / others))
    of = {"advantages": torch.full((rows,), -1.0), "flip": flip}
    own = surrogate_log_prob(log_p[ids[:, 0]], scores[:, 0], component_weights=weights[:, 0], **of)
    same = dataclasses.replace(
        draws, **{n: getattr(draws, n)[:, :1].expand(-1, others, -1) for n in ("ids", "scores", "weights")}
    )
    centered = same.centered(own, log_p[same.ids], weighting="mixture", **of)
    (gradient,) = torch.autograd.grad(centered.sum(), logits)
    assert gradient.abs().max() < 1e-4, "a draw relative to itself"


def test_settings_are_those_of_each_trajectory():
    rng = np.random.default_rng(0)
    row = fake_trajectory(rng, step=1, group=0, index=0, reward=0.0)
    quiet = dataclasses.replace(row, sample_index=1, sampling=dataclasses.replace(row.sampling, noise_scale=0.0))
    view = TrajectoryBatch(encode([row, quiet], 3))
    inputs, draws = redrawn(view, [0, 1], 1000)
    of_quiet = inputs.batch_rows[inputs.latent] == 1
    alike = (draws.scores == draws.scores[:, :1]).flatten(1).all(-1)
    assert torch.equal(alike, of_quiet)


def test_hard_steps_ask_for_nothing_else():
    view = some_batch()
    inputs, draws = redrawn(view, range(4), 1000)
    wide = draws.widened(inputs)
    assert torch.equal(wide[:, :3], inputs.selected)
    assert torch.equal(wide[inputs.latent][:, 3:], draws.ids.flatten(1))
    assert (wide[~inputs.latent] == inputs.selected[~inputs.latent][:, :1]).all()
