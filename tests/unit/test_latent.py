"""METHOD §2 against a loop-by-loop float64 reference, and the keyed form against the plain one."""

import math

import numpy as np
import pytest
import torch

from latent_grpo.common.candidates import likeliest
from latent_grpo.common.latent import (
    NOISE_AT_ONCE,
    latent_draws,
    latent_step,
    mix_embeddings,
    sample_mixture,
    sample_mixture_keyed,
    sample_visible,
    visible_step,
)
from latent_grpo.common.noise import gumbel_noise, trajectory_key


def reference_mixture(row, gumbel, k, top_p, scale, tau, one_sided):
    """One row in float64, step by step as METHOD §2.1 says it."""
    log_p = np.array(row) - math.log(sum(math.exp(x) for x in row))
    order = sorted(range(len(row)), key=lambda i: (-log_p[i], i))
    candidates, cumulative = [], 0.0
    for rank, i in enumerate(order):
        if rank < k or cumulative < top_p:
            candidates.append(i)
        cumulative += math.exp(log_p[i])
    score = {}
    for i in candidates:
        g = min(max(gumbel[i], -1.5), 3.0) + (1.5 if one_sided else 0.0)
        score[i] = log_p[i] + scale * g
    best = sorted(candidates, key=lambda i: (-score[i], i))[:k]
    scores = np.array([score[i] for i in best])
    weights = np.exp((scores - scores.max()) / tau)
    return best, scores, weights / weights.sum()


def draws(rows, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    exponential = torch.empty(rows, vocabulary).exponential_(generator=generator)
    return logits, -torch.log(exponential)


@pytest.mark.parametrize("one_sided", [True, False])
@pytest.mark.parametrize(("k", "top_p", "scale", "tau"), [(3, 0.95, 1.0, 1.0), (10, 0.5, 0.3, 0.7), (1, 1.0, 2.0, 2.0)])
def test_sample_mixture_equals_a_float64_reference(k, top_p, scale, tau, one_sided):
    logits, gumbel = draws(16, 40)
    ids, scores, weights = sample_mixture(
        logits, gumbel, k=k, top_p=top_p, noise_scale=scale, tau=tau, one_sided=one_sided
    )
    for row in range(16):
        want = reference_mixture(logits[row].double().tolist(), gumbel[row].tolist(), k, top_p, scale, tau, one_sided)
        assert ids[row].tolist() == want[0]
        np.testing.assert_allclose(scores[row], want[1], atol=1e-5)
        np.testing.assert_allclose(weights[row], want[2], atol=1e-5)


def adversarial(vocabulary):
    logits, _ = draws(12, vocabulary, seed=1)
    logits[0] = 0.0  # flat: the nucleus is the whole vocabulary
    logits[1] = logits[1] * 20  # peaked
    logits[2, ::2] = 1.0  # many ties
    logits[3, 5:] = -1e4
    return logits


@pytest.mark.parametrize(("vocabulary", "top_m"), [(23, 256), (900, 32), (900, 256)])
def test_the_engines_fast_path_equals_the_full_one_exactly(vocabulary, top_m):
    logits = adversarial(vocabulary)
    rows = len(logits)
    keys, steps = torch.arange(rows) * 7919 + 2**40, torch.arange(rows)
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[-4:] = False
    noise = gumbel_noise(keys, steps, torch.arange(vocabulary).expand(rows, -1))
    top_p = torch.linspace(0.3, 1.0, rows)
    full = sample_mixture(logits, noise, k=5, top_p=top_p, noise_scale=1.0, tau=1.0, allowed=allowed)
    fast = sample_mixture_keyed(
        logits, keys, steps, k=5, top_p=top_p, noise_scale=1.0, tau=1.0, allowed=allowed, top_m=top_m
    )
    for a, b in zip(full, fast, strict=False):
        assert torch.equal(a, b)
    assert (full[0] < vocabulary - 4).all()
    settings = {"temperature": 0.6, "top_p": 0.95, "top_k": 30, "allowed": allowed}
    for bounds in ({}, {"top_k": 0}, {"top_k": 0, "top_p": 1.0}):  # by top_k, by the nucleus alone, by nothing
        settings |= bounds
        for a, b in zip(sample_visible(logits, noise, **settings), visible_step(logits, keys, steps, **settings)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("special", [None, "ties", "flat", "zeros of both signs", "inf"])
@pytest.mark.parametrize(("vocabulary", "top_m"), [(23, 32), (900, 32), (900, 128)])
def test_candidates_found_by_the_host_are_those_of_all_ids_in_order(vocabulary, top_m, special):
    """NumPy selects and sorts where the host may ask, torch where it may not; what the floor leaves open may differ."""
    logits = draws(16, vocabulary, seed=6)[0]
    if special == "ties":
        logits[8] = torch.round(logits[8] * 2) / 2
    elif special == "flat":
        logits[8] = 0.0
    elif special == "zeros of both signs":
        logits[8] = torch.where(torch.arange(vocabulary) % 3 == 0, -0.0, logits[8].clamp(max=0))
    elif special:
        logits[8, 3] = math.inf
    for allowed in (None, torch.arange(vocabulary) % 100 != 3):
        exact = likeliest(logits, allowed, vocabulary, ask=False)
        for ask in (True, False):
            table = likeliest(logits, allowed, top_m, ask)
            floor = torch.full((16,), -math.inf) if table.floor is None else table.floor
            certain = table.logits > floor.unsqueeze(-1)
            assert (certain.sum(-1) >= min(top_m, vocabulary) - 12)[torch.arange(16) != 8].all()
            for name in ("ids", "logits"):
                found, expected = getattr(table, name), getattr(exact, name)[:, : table.ids.shape[-1]]
                assert torch.equal(found[certain], expected[certain])


@pytest.mark.parametrize("one_sided", [True, False])
@pytest.mark.parametrize(("k", "scale"), [(5, 1.0), (12, 0.1), (3, 2.5)])
def test_draws_that_never_wait_are_exact_wherever_they_say_so(k, scale, one_sided):
    vocabulary, rows = 900, 64
    logits, _ = draws(rows, vocabulary, seed=2)
    logits *= torch.linspace(0.0, 2.0, rows)[:, None]  # from flat to peaked
    logits[8:16] = torch.round(logits[40:48] * 2) / 2  # ties, as in bfloat16
    keys, steps = torch.arange(rows) * 31 + 2**50, torch.arange(rows)
    settings = {"k": k, "top_p": 0.95, "noise_scale": scale, "tau": 1.0, "one_sided": one_sided}
    noise = gumbel_noise(keys, steps, torch.arange(vocabulary).expand(rows, -1))
    ids, scores, _ = sample_mixture(logits, noise, **settings)
    step = latent_step(logits, keys, steps, **settings, noisy=True, end_id=-1, top_m=64, widen=False)
    assert torch.equal(step.ids[step.exact], ids[step.exact])
    assert torch.equal(step.scores[step.exact], scores[step.exact])
    assert rows // 2 < step.exact.sum() < rows, "the test needs rows of both kinds"
    careful = latent_step(logits, keys, steps, **settings, noisy=True, end_id=-1, top_m=64)
    assert careful.exact.all()
    assert torch.equal(careful.ids, ids)


@pytest.mark.parametrize("most", [200, 500])
def test_a_top_k_beyond_the_first_look_is_exact_without_waiting(most):
    """Rows of many top_k, the largest of them known to the host; flat, peaked and tied logits."""
    vocabulary, rows = 900, 64
    logits, _ = draws(rows, vocabulary, seed=4)
    logits *= torch.linspace(0.0, 2.0, rows)[:, None]
    logits[8:16] = torch.round(logits[40:48] * 2) / 2  # ties, as in bfloat16
    keys, steps = torch.arange(rows) * 31 + 2**50, torch.arange(rows)
    top_k = torch.linspace(1, most, rows).long()
    noise = gumbel_noise(keys, steps, torch.arange(vocabulary).expand(rows, -1))
    settings = {"temperature": torch.linspace(0.6, 5.0, rows), "top_p": 0.999, "top_k": top_k}
    ids, log_probs = sample_visible(logits, noise, **settings)
    ranks = (logits > logits.gather(-1, ids[:, None])).sum(-1)
    assert ranks.max() > 128, "the test needs a draw from beyond the first look"
    for widen in (False, True):
        step = visible_step(logits, keys, steps, **settings, largest_top_k=most, widen=widen)
        untied = torch.ones(rows, dtype=torch.bool) if widen else logits.sort(-1).values.diff().abs().min(-1).values > 0
        assert step.exact[untied].all()
        assert torch.equal(step.ids[step.exact], ids[step.exact])
        assert torch.equal(step.log_probs[step.exact], log_probs[step.exact])
    unknown = visible_step(logits, keys, steps, **settings)
    assert torch.equal(unknown.ids, ids)
    one = visible_step(logits, keys, steps, **(settings | {"top_k": most}), widen=False)
    assert torch.equal(one.ids[one.exact], sample_visible(logits, noise, **(settings | {"top_k": most}))[0][one.exact])


@pytest.mark.parametrize("widen", [True, False])
def test_a_draw_that_nothing_bounds_is_that_of_all_ids_in_pieces(widen):
    vocabulary = 900
    rows = NOISE_AT_ONCE // vocabulary + 7
    logits, _ = draws(rows, vocabulary, seed=7)
    keys, steps = torch.arange(rows) * 31 + 2**50, torch.arange(rows)
    noise = gumbel_noise(keys, steps, torch.arange(vocabulary).expand(rows, -1))
    settings = {"temperature": torch.linspace(0.5, 3.0, rows), "top_p": 1.0, "top_k": 0}
    for allowed in (None, torch.arange(vocabulary) % 3 != 0):
        ids, log_probs = sample_visible(logits, noise, allowed=allowed, **settings)
        step = visible_step(logits, keys, steps, allowed=allowed, widen=widen, **settings)
        assert step.exact.all()
        assert torch.equal(step.ids, ids)
        assert torch.equal(step.log_probs, log_probs)
    ranks = (logits > logits.gather(-1, ids[:, None])).sum(-1)
    assert ranks.max() > 128, "the test needs a draw from beyond what another step looks at"
    for bad, forbidden in ((math.nan, None), (0.0, torch.zeros(vocabulary, dtype=torch.bool))):
        broken = logits.clone()
        broken[3, 5] = bad
        if widen:
            with pytest.raises(ValueError, match="nothing can be selected from the logits of"):
                visible_step(broken, keys, steps, allowed=forbidden, **settings)
        else:
            step = visible_step(broken, keys, steps, allowed=forbidden, widen=False, **settings)
            assert (~step.exact).sum() == (1 if forbidden is None else rows)


def test_rows_with_and_without_top_k_are_exact_side_by_side():
    """Evaluations by both protocols decode together: a row without top_k has the nucleus of all ids."""
    vocabulary, rows = 900, 64
    logits, _ = draws(rows, vocabulary, seed=5)
    logits *= torch.linspace(0.0, 2.0, rows)[:, None]
    keys, steps = torch.arange(rows) * 31 + 2**50, torch.arange(rows)
    allowed = torch.arange(vocabulary) % 3 != 0  # a third of the mass can never be drawn
    top_k = torch.where(torch.arange(rows) % 2 == 0, 0, 30)
    noise = gumbel_noise(keys, steps, torch.arange(vocabulary).expand(rows, -1))
    settings = {"temperature": 0.6, "top_p": 0.95, "allowed": allowed}
    ids, log_probs = sample_visible(logits, noise, top_k=top_k, **settings)
    for widen in (True, False):
        step = visible_step(logits, keys, steps, top_k=top_k, largest_top_k=30, widen=widen, **settings)
        assert torch.equal(step.ids[step.exact], ids[step.exact])
        assert torch.equal(step.log_probs[step.exact], log_probs[step.exact])
        assert step.exact.all() if widen else step.exact.sum() > rows // 2
    alone = sample_visible(logits, noise, top_k=0, **settings)[0]
    assert torch.equal(alone[::2], ids[::2])
    settings["top_p"] = torch.where(torch.arange(rows) % 4 == 0, 1.0, 0.95)  # every fourth row has no bound at all
    ids = sample_visible(logits, noise, top_k=top_k, **settings)[0]
    for widen in (True, False):
        step = visible_step(
            logits, keys, steps, top_k=top_k, largest_top_k=30, some_unbounded=True, widen=widen, **settings
        )
        assert step.exact[::4].all()
        assert torch.equal(step.ids[step.exact], ids[step.exact])
    p = torch.softmax((logits / 0.6).masked_fill(~allowed, float("-inf")).double(), -1).sort(-1, descending=True).values
    before = p.cumsum(-1) - p
    rank = (logits.masked_fill(~allowed, float("-inf")) > logits.gather(-1, alone[:, None])).sum(-1)
    assert (before.gather(-1, rank[:, None]) < 0.95 + 1e-6).all(), "every draw is inside the nucleus of all allowed ids"
    assert (rank > 30).any(), "the test needs draws that top_k would not allow"


def test_unusable_logits_are_marked_where_nothing_may_wait():
    logits = torch.randn(3, 600)
    logits[1, 7] = float("nan")
    keys = torch.arange(3)
    settings = {"k": 4, "top_p": 0.95, "noise_scale": 1.0, "tau": 1.0, "noisy": True, "one_sided": True, "end_id": -1}
    assert latent_step(logits, keys, keys, **settings, widen=False).exact.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="nothing can be selected from the logits of 1 rows"):
        latent_step(logits, keys, keys, **settings)


def test_a_tie_in_one_row_does_not_hide_nan_in_another():
    """The tied row has one candidate too many and the other one too few: their number alone looks right."""
    ids = likeliest(torch.tensor([[5.0, 4.0, 3.0, 3.0, 1.0, 0.0], [math.nan, 4.0, 3.0, 2.0, 1.0, 0.0]]), None, 3).ids
    assert ids[0, :2].tolist() == [0, 1]
    assert ((ids >= 0) & (ids < 6)).all()


@pytest.mark.parametrize("top_m", [8, 32, 64])
def test_candidates_that_bounded_noise_cannot_lift_need_not_be_drawn(top_m):
    """Nuclei far wider than the table, of every spread: the table grows no further than noise reaches."""
    rows, vocabulary = 24, 1500
    spread = torch.logspace(-2, 1.2, rows).unsqueeze(-1)
    logits = draws(rows, vocabulary, seed=3)[0] / 3 * spread
    keys, steps = torch.arange(rows) * 104729, torch.arange(rows)
    noise = gumbel_noise(keys, steps, torch.arange(vocabulary).expand(rows, -1))
    scale = torch.linspace(0.0, 1.5, rows)[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]
    one_sided = torch.arange(rows) % 2 == 0
    settings = {"k": 5, "top_p": 0.999, "noise_scale": scale, "tau": 1.0, "one_sided": one_sided}
    full = sample_mixture(logits, noise, **settings)
    fast = sample_mixture_keyed(logits, keys, steps, top_m=top_m, **settings)
    for a, b in zip(full, fast, strict=False):
        assert torch.equal(a, b)


def test_one_sided_noise_never_lowers_a_score():
    logits, _ = draws(64, 50)
    keys = torch.arange(64)
    _, scores, _, log_probs = sample_mixture_keyed(
        logits, keys, keys, k=8, top_p=0.95, noise_scale=1.0, tau=1.0, one_sided=True
    )
    assert (scores >= log_probs).all()
    assert (scores - log_probs).max() <= 4.5 + 1e-5


def test_visible_sampling_follows_the_truncated_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -6.0]]).expand(20000, -1)
    keys = torch.arange(20000)
    ids, log_probs, _ = visible_step(logits, keys, keys * 0, temperature=0.6, top_p=0.95, top_k=3)
    p = torch.softmax(logits[0, :3] / 0.6, -1)
    kept = p[: int(((p.cumsum(0) - p) < 0.95).sum())]
    share = torch.bincount(ids, minlength=5)[: len(kept)] / 20000
    assert torch.allclose(share, kept / kept.sum(), atol=0.015)
    assert ids.max() < len(kept)
    assert torch.allclose(log_probs, torch.log_softmax(logits / 0.6, -1).gather(-1, ids[:, None])[:, 0], atol=1e-6)


def test_noise_is_gumbel_finite_and_independent_between_neighbours():
    n = 1000
    g = gumbel_noise(torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.arange(n).expand(n, n)).double()
    assert g.isfinite().all()
    u = torch.exp(-torch.exp(-g)).flatten().sort().values
    distance = (u - torch.linspace(0, 1, len(u), dtype=torch.float64)).abs().max()
    assert distance < 1.95 / math.sqrt(len(u))  # Kolmogorov-Smirnov, p = 0.001
    bound = 5 / math.sqrt(n * (n - 1))
    centred = (g - g.mean()) / g.std()
    assert abs((centred[1:] * centred[:-1]).mean()) < bound
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < bound
    steps = gumbel_noise(torch.full((n,), 5), torch.arange(n), torch.arange(n).expand(n, n)).double()
    assert abs(((steps - steps.mean())[1:] * (steps - steps.mean())[:-1]).mean() / steps.var()) < bound


def test_a_draw_depends_on_its_identity_only():
    ids = torch.arange(30).expand(8, -1)
    keys, steps = torch.arange(8) * 2**35 + 11, torch.arange(8)
    whole = gumbel_noise(keys, steps, ids)
    assert torch.equal(whole[3:4, 7:9], gumbel_noise(keys[3:4], steps[3:4], ids[3:4, 7:9]))
    identity = {"run_seed": 1, "purpose": "training", "problem_uid": "a/1", "epoch": 0, "sample_index": 0}
    a = trajectory_key(**identity, policy_version=0)
    assert a == trajectory_key(**identity, policy_version=0)
    assert a != trajectory_key(**identity, policy_version=1)
    assert 0 <= a < 2**63


def test_a_row_leaves_latent_mode_when_argmax_or_first_id_is_the_end_token():
    logits = torch.full((2, 6), -5.0)
    logits[0, 4] = 3.0  # argmax is the end token
    logits[1, 2] = 3.0
    keys = torch.arange(2)
    result = latent_step(
        logits, keys, keys, k=2, top_p=0.95, noise_scale=0.0, tau=1.0,
        noisy=torch.tensor([True, False]), one_sided=torch.tensor([True, True]), end_id=4,
    )  # fmt: skip
    assert result.leaves.tolist() == [True, False]
    assert torch.equal(result.scores[1], result.log_probs[1])  # noise off: r is log p (METHOD §2.2)


def test_mix_embeddings_sums_in_float32_and_keeps_the_dtype():
    embedded, weights = torch.randn(4, 3, 8).bfloat16(), torch.softmax(torch.randn(4, 3), -1)
    mixed = mix_embeddings(embedded, weights)
    assert mixed.dtype == torch.bfloat16
    want = (embedded.double() * weights.double().unsqueeze(-1)).sum(-2)
    assert torch.allclose(mixed.double(), want, atol=2e-2)


@pytest.mark.parametrize("noisy", [False, True])
def test_the_rule_that_ends_latent_mode(noisy):
    """METHOD §2.3: with `first` the argmax alone does not end it; without noise both rules are the same."""
    logits = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0)) * 2
    keys = torch.arange(len(logits)) * 7919
    settings = {"k": 3, "top_p": 0.95, "noise_scale": 1.0, "tau": 1.0, "noisy": noisy, "one_sided": True, "end_id": 4}
    both = latent_step(logits, keys, keys, **settings)
    first = latent_step(logits, keys, keys, **settings, argmax_exits=False)
    mixed = latent_step(logits, keys, keys, **settings, argmax_exits=torch.arange(len(logits)) % 2 == 0)
    assert torch.equal(first.leaves, first.ids[:, 0] == 4)
    assert torch.equal(both.leaves, first.leaves | (logits.argmax(-1) == 4))
    assert bool((both.leaves != first.leaves).any()) == noisy
    assert torch.equal(mixed.leaves[::2], both.leaves[::2])
    assert torch.equal(mixed.leaves[1::2], first.leaves[1::2])
    for name in ("ids", "scores", "weights", "log_probs"):
        assert torch.equal(getattr(both, name), getattr(first, name)), "the record does not depend on the rule"
    if noisy:
        del settings["noisy"]
        drawn = latent_draws(logits, keys[:, None], keys, **settings, argmax_exits=False)
        assert torch.equal(drawn[0].leaves, first.leaves)
