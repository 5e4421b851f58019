"""Verdicts follow from the numbers, and from nothing else."""

import math

import pytest
from pydantic import ValidationError

from latent_grpo.deploy.reproduce.claims import STUDENT, estimate, judge
from latent_grpo.deploy.reproduce.figures import figures
from latent_grpo.deploy.reproduce.manifest import Session, SuiteManifest
from latent_grpo.deploy.reproduce.page import page
from latent_grpo.deploy.reproduce.report import markdown
from latent_grpo.deploy.reproduce.results import UnitResult, is_proportion
from latent_grpo.deploy.reproduce.suite import Claim, Suite

SUITE = Suite.model_validate({
    "title": "s", "profile": "p", "seeds": [0, 1, 2],
    "starts": {"latent": {"title": "l"}, "explicit": {"title": "e"}},
    "arms": {
        "mixture": {"title": "m", "start": "latent"},
        "uniform": {"title": "u", "start": "latent"},
        "grpo": {"title": "g", "start": "explicit"},
    },
})  # fmt: skip


def results(**of_units):
    """name=[pass@1 of seed 0, 1, ...]; keywords `metric` by (value, {metrics})."""
    found = {}
    for name, values in of_units.items():
        for seed, value in enumerate(values):
            metrics = value if isinstance(value, dict) else {"pass_at_1": value, "standard_error": 0.015}
            found[name, seed] = UnitResult(unit=name, seed=seed, is_start=name in SUITE.starts, metrics=metrics)
    return found


def verdict(test, found, suite=SUITE):
    return judge(suite, Claim(text="c", test=test), found)


GAIN = {"kind": "difference", "arm": "mixture", "than": "latent", "at_least": 0.25}


def test_an_interval_over_seeds_is_students():
    found = estimate([0.1, 0.2, 0.6])
    spread = math.sqrt(((0.2) ** 2 + 0.1**2 + 0.3**2) / 2 / 3)
    assert found.mean == pytest.approx(0.3)
    assert found.high - found.mean == pytest.approx(STUDENT[1] * spread)
    alone = estimate([0.5], [0.02])
    assert (alone.low, alone.high) == pytest.approx((0.5 - 1.96 * 0.02, 0.5 + 1.96 * 0.02))
    assert estimate([0.5]).low is None
    assert estimate([1.0], [0.0]).low is None, "all right: that error is not known"


def test_seeds_do_not_average_away_what_their_common_problems_leave_open():
    """Three runs at 95 % of 128 problems, all alike: each is known to 4 points only, and so is their mean."""
    error = math.sqrt(0.95 * 0.05 / 128)
    found = estimate([0.951, 0.951, 0.951], [error] * 3)
    assert found.high - found.mean == pytest.approx(1.96 * error)
    spread = 0.01 / math.sqrt(3)
    both = estimate([0.94, 0.95, 0.96], [0.03, 0.0, 0.01])
    problems = math.sqrt((0.03**2 + 0.01**2) / 2)  # the one that is not known does not count
    assert both.mean - both.low == pytest.approx(math.hypot(4.303 * spread, 1.96 * problems))


@pytest.mark.parametrize("degrees", range(1, 31))
def test_the_quantiles_are_students(degrees):
    """97.5 % of its density lie below each: integrated here, over x = sqrt(degrees) tan(angle)."""
    constant = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(math.pi)
    end, pieces = math.atan(STUDENT[degrees - 1] / math.sqrt(degrees)), 2000
    angles = [end * (i + 0.5) / pieces for i in range(pieces)]
    share = 0.5 + constant * sum(math.cos(angle) ** (degrees - 1) for angle in angles) * end / pieces
    assert share == pytest.approx(0.975, abs=3e-5)


def test_eleven_seeds_have_an_interval_of_students_and_a_hundred_no_narrower_one_than_the_normal():
    eleven = estimate([0.0] * 5 + [0.5] + [1.0] * 5)
    assert eleven.high - 0.5 == pytest.approx(2.228 * 0.5 / math.sqrt(11))
    hundred = estimate([0.0, 1.0] * 50)
    assert hundred.high - 0.5 == pytest.approx(2.042 * math.sqrt(25 / 99) / 10)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([0.75, 0.76, 0.77], "reproduced"),
        ([0.65, 0.66, 0.67], "not reproduced"),  # a gain, but below 25 points
        ([0.99, 0.95, 0.30], "not reproduced"),  # the mean would do, the seeds disagree
        ([0.10, 0.10, 0.10], "not reproduced"),
    ],
)
def test_a_gain_needs_its_size_and_an_interval_above_zero(after, expected):
    assert verdict(GAIN, results(latent=[0.45, 0.46, 0.44], mixture=after))[0] == expected


def test_differences_are_taken_seed_by_seed():
    """Starts that differ more than the gain do not hide it."""
    kind, numbers = verdict({**GAIN, "at_least": 0.0}, results(latent=[0.2, 0.5, 0.8], mixture=[0.25, 0.56, 0.84]))
    assert kind == "reproduced"
    assert "+0.050" in numbers


def test_a_gain_over_its_own_start_is_not_a_difference_of_results():
    found = results(latent=[0.4] * 3, mixture=[0.7, 0.71, 0.69], explicit=[0.6] * 3, grpo=[0.8, 0.81, 0.79])
    test = {"kind": "difference", "arm": "mixture", "than": "grpo"}
    assert verdict(test, found)[0] == "not reproduced"
    assert verdict({**test, "gain": True}, found)[0] == "reproduced"


def test_gains_from_starts_that_are_not_matched_are_not_compared():
    test = {"kind": "difference", "arm": "mixture", "than": "grpo", "gain": True, "matched": 0.1}
    found = results(latent=[0.5, 0.5, 0.7], explicit=[0.45, 0.5, 0.2], mixture=[0.8, 0.8, 0.9], grpo=[0.55, 0.6, 0.2])
    kind, numbers = verdict(test, found)
    assert kind == "reproduced"
    assert "+0.200" in numbers
    assert "(2 seeds)" in numbers
    assert numbers.endswith("; seed 2 left out: starts of 0.700 and 0.200")
    only = {key: value for key, value in found.items() if key[1] == 2}
    assert verdict(test, only)[0] == "not testable here"
    with pytest.raises(ValidationError, match="it needs gain: true"):
        verdict({**test, "gain": False}, found)


EQUAL = {"kind": "difference", "arm": "mixture", "than": "uniform", "equal_will_do": True}


def exact(*values):
    """Of so many problems that they leave nothing open."""
    return [{"pass_at_1": value, "standard_error": 1e-4} for value in values]


def test_equal_is_told_from_better():
    found = results(mixture=exact(0.70, 0.72, 0.71), uniform=exact(0.71, 0.71, 0.71))
    assert verdict({**EQUAL, "equal_will_do": False}, found)[0] == "not reproduced"
    assert verdict(EQUAL, found)[0] == "reproduced"
    same = results(mixture=[{"chain_length": 3.0}], uniform=[{"chain_length": 3.0}])
    assert verdict({**EQUAL, "equal_will_do": False, "metric": "chain_length"}, same)[0] == "not reproduced"


@pytest.mark.parametrize(
    ("values", "error", "expected", "said"),
    [
        ([0.30, 0.76, 0.70], 1e-4, "not reproduced", "undecided: the interval reaches below -0.05"),  # noise, no proof
        ([0.86, 0.95, 0.20], 1e-4, "not reproduced", "undecided: the interval reaches below -0.05"),
        ([0.60, 0.61, 0.62], 1e-4, "not reproduced", "worse"),
        ([0.69, 0.695, 0.70], 1e-4, "reproduced", "not below -0.05"),  # a little less, for sure
        ([0.80, 0.85, 0.90], 1e-4, "reproduced", "not below -0.05"),
        ([0.71, 0.71, 0.71], 0.03, "not reproduced", "undecided"),  # the seeds agree, their problems are few
        ([0.70], 0.0, "reproduced", "not below -0.05"),  # no interval: the mean decides
        ([0.60], 0.0, "not reproduced", "worse"),
    ],
)
def test_at_least_equal_needs_an_interval_above_minus_the_margin(values, error, expected, said):
    def side(of_seeds):
        return [{"pass_at_1": value, "standard_error": error} for value in of_seeds]

    kind, numbers = verdict(EQUAL, results(mixture=side(values), uniform=side([0.71] * len(values))))
    assert kind == expected
    assert said in numbers


def test_more_noise_never_makes_at_least_equal_easier():
    held = [
        verdict(EQUAL, results(mixture=exact(0.7 - noise, 0.7, 0.7 + noise), uniform=exact(0.7, 0.7, 0.7)))[0]
        for noise in (0.0, 0.01, 0.03, 0.1, 0.3)
    ]
    assert held == ["reproduced"] * 2 + ["not reproduced"] * 3
    wide = {**EQUAL, "margin": 0.5}
    assert verdict(wide, results(mixture=exact(0.6, 0.7, 0.8), uniform=exact(0.7, 0.7, 0.7)))[0] == "reproduced"


def test_a_rule_takes_its_own_bound_only():
    with pytest.raises(ValidationError, match=r"at_least \(0.2\) has no effect with equal_will_do"):
        Claim(text="c", test={**EQUAL, "at_least": 0.2})
    with pytest.raises(ValidationError, match="margin has an effect only with equal_will_do: true"):
        Claim(text="c", test={**GAIN, "margin": 0.1})


def test_a_difference_whose_interval_holds_zero_is_undecided():
    kind, numbers = verdict(
        {"kind": "difference", "arm": "mixture", "than": "uniform"},
        results(mixture=exact(0.60, 0.80, 0.60), uniform=exact(0.7, 0.7, 0.7)),
    )
    assert kind == "not reproduced"
    assert "undecided: the interval includes 0" in numbers


def test_what_was_not_run_is_not_testable_and_named():
    kind, numbers = verdict(GAIN, results(mixture=[0.9]))
    assert kind == "not testable here"
    assert "latent" in numbers
    kind, numbers = verdict({**GAIN, "metric": "sampled_pass_at_32"}, results(mixture=[0.9], latent=[0.4]))
    assert kind == "not testable here"
    assert "sampled_pass_at_32" in numbers
    assert verdict({"kind": "untestable", "reason": "no data"}, {}) == ("not testable here", "no data")


def test_one_seeds_pass_at_k_has_the_interval_of_its_problems():
    def sampled(value):
        return [{"sampled_pass_at_32": value, "sampled_error_at_32": 0.02}]

    test = {"kind": "difference", "arm": "mixture", "than": "latent", "metric": "sampled_pass_at_32"}
    kind, numbers = verdict(test, results(latent=sampled(0.95), mixture=sampled(0.97)))
    assert kind == "not reproduced"
    assert "the interval includes 0" in numbers
    assert verdict(test, results(latent=sampled(0.85), mixture=sampled(0.97)))[0] == "reproduced"


@pytest.mark.parametrize("equal_will_do", [False, True])
def test_one_seeds_latent_share_decides_nothing_since_its_error_is_not_known(equal_will_do):
    def shares(*values):
        return [{"latent_share": value} for value in values]

    test = {**EQUAL, "metric": "latent_share", "equal_will_do": equal_will_do}
    kind, numbers = verdict(test, results(mixture=shares(0.8), uniform=shares(0.6)))
    assert kind == "not reproduced"
    assert "undecided: one seed, and no error of latent_share over problems is known" in numbers
    several = results(mixture=shares(0.8, 0.81, 0.79), uniform=shares(0.6, 0.6, 0.6))
    assert verdict(test, several)[0] == "reproduced", "seeds give an interval"


def test_the_interval_of_a_latent_share_lies_between_0_and_1():
    assert is_proportion("latent_share")
    assert not is_proportion("latent_length")


def test_a_ratio_of_lengths():
    found = results(grpo=[{"chain_length": 40.0}], mixture=[{"chain_length": 16.0}])
    test = {"kind": "ratio", "arm": "grpo", "than": "mixture", "at_least": 2.2}
    assert verdict(test, found)[0] == "reproduced"
    assert verdict({**test, "at_least": 2.6}, found)[0] == "not reproduced"


def test_a_decline_in_any_seed_counts():
    def run(seed, curve):
        points = [{"step": 20.0 * i, "pass_at_1": value} for i, value in enumerate(curve)]
        return UnitResult(unit="mixture", seed=seed, is_start=False, metrics={}, evaluations=points)

    test = {"kind": "no_decline", "arm": "mixture", "drop": 0.03}
    rising = {("mixture", 0): run(0, [0.5, 0.8, 0.79])}
    assert verdict(test, rising)[0] == "reproduced"
    kind, numbers = verdict(test, rising | {("mixture", 1): run(1, [0.5, 0.8, 0.6])})
    assert kind == "not reproduced"
    assert "best 0.800 at step 20, last 0.600 at step 40" in numbers


def test_a_run_that_only_falls_from_its_start_on_declines():
    points = [{"step": step, "pass_at_1": 0.2} for step in (20.0, 40.0)]
    found = {
        ("latent", 0): UnitResult(unit="latent", seed=0, is_start=True, metrics={"pass_at_1": 0.5}),
        ("mixture", 0): UnitResult(unit="mixture", seed=0, is_start=False, metrics={}, evaluations=points),
    }
    kind, numbers = verdict({"kind": "no_decline", "arm": "mixture"}, found)
    assert kind == "not reproduced"
    assert "best 0.500 at step 0, last 0.200 at step 40" in numbers


def test_mass_must_leave_the_answer_and_reach_the_fillers():
    def unit(name, answer, fillers):
        probe = [
            {"step": 0.0 if name == "latent" else 160.0, "answer": answer, "other_numbers": 0.1, "fillers": fillers}
        ]
        return UnitResult(unit=name, seed=0, is_start=name == "latent", metrics={}, probe=probe)

    test = {"kind": "mass_moves", "arm": "uniform"}
    start = {("latent", 0): unit("latent", 0.3, 0.5)}
    assert verdict(test, start | {("uniform", 0): unit("uniform", 0.1, 0.8)})[0] == "reproduced"
    assert verdict(test, start | {("uniform", 0): unit("uniform", 0.1, 0.4)})[0] == "not reproduced"
    assert verdict(test, {("uniform", 0): unit("uniform", 0.1, 0.8)})[0] == "not testable here"


def test_proportions_are_shown_between_0_and_1_and_verdicts_do_not_change():
    def metrics(at_1, at_32, invalid, length):
        rates = {"pass_at_1": at_1, "invalid_rate": invalid, "sampled_pass_at_1": at_1, "sampled_pass_at_32": at_32}
        return rates | {"standard_error": 0.02, "chain_length": length}

    start = [metrics(p, 0.5, 0.0, 0.1) for p in (0.0, 0.02, 0.0)]
    after = [
        metrics(p, q, i, n) for p, q, i, n in ((0.98, 1.0, 0.0, 0.1), (0.99, 0.97, 0.0, 0.9), (1.0, 0.98, 0.03, 2))
    ]
    found = results(latent=start, mixture=after)
    claim = Claim(
        text="c", test={"kind": "difference", "arm": "mixture", "than": "latent", "metric": "sampled_pass_at_32"}
    )
    suite = SUITE.model_copy(update={"claims": {"gain": claim}})
    session = Session(time="t", commit="c", versions={}, grader="g")
    manifest = SuiteManifest(suite="s", profile="p", runner="r", seeds=[0, 1, 2], machine="m", sessions=[session])
    report = figures(suite, found, manifest)
    latent, mixture = report.arms
    for row in (latent, mixture):
        for name in ("pass_at_1", "sampled_pass_at_32", "invalid_rate"):
            assert 0.0 <= row.metrics[name].low <= row.metrics[name].high <= 1.0
    free = estimate([metrics["sampled_pass_at_32"] for metrics in after])
    assert free.high > 1.0
    at_32 = mixture.metrics["sampled_pass_at_32"]
    assert (at_32.low, at_32.high) == (free.low, 1.0)
    assert "0.983 [0.945, 1.000]" in markdown(report)
    assert "0.983 [0.945, 1.000]" in page(report)
    assert mixture.metrics["chain_length"].low < 0.0  # no proportion
    assert mixture.gain.high > 1.0  # a difference
    assert report.claims[0].verdict == "reproduced"
    assert report.claims[0].numbers.startswith("mixture - latent, sampled_pass_at_32: +0.483 [+0.445, +0.521]")


def test_a_mean_reward_above_1_is_no_proportion():
    shaped = estimate([1.05, 1.15])
    assert shaped.of_proportion == shaped
