"""The verdicts on a suite's claims, computed from its results. Pure.

A difference is taken seed by seed (both sides at one seed share model, data order and problems), then averaged. Its
95 % interval (:func:`estimate`) covers the spread between seeds and the uncertainty from the evaluation's problems.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from latent_grpo.deploy.reproduce.results import UnitResult, error_of, has_error
from latent_grpo.deploy.reproduce.suite import (
    Claim,
    Difference,
    MassMoves,
    NoDecline,
    Ratio,
    Suite,
    Untestable,
    named_in,
)

Verdict = Literal["reproduced", "not reproduced", "not testable here"]
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantile of Student's distribution at 1, 2, ... 30 degrees of freedom; the last one is used beyond."""
NORMAL = 1.960
Results = dict[tuple[str, int], UnitResult]
"""(start or arm, seed) -> result, finished ones only."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds with its 95 % interval, or None where nothing gives an interval."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def of_proportion(self) -> Estimate:
        """The estimate of a proportion, with its interval cut at 0 and 1; a mean beyond them is left unchanged."""
        if self.low is None or self.high is None or not 0.0 <= self.mean <= 1.0:
            return self
        return dataclasses.replace(self, low=max(self.low, 0.0), high=min(self.high, 1.0))

    def text(self, form: str = "{:+.3f}") -> str:
        """Returns mean, interval and number of seeds: `+0.031 [+0.012, +0.050] (3 seeds)`."""
        shown = form.format(self.mean)
        if self.low is not None:
            shown += f" [{form.format(self.low)}, {form.format(self.high)}]"
        return f"{shown} ({self.seeds} seed{'s' if self.seeds > 1 else ''})"


@dataclass(frozen=True, slots=True)
class JudgedClaim:
    """A claim of a suite and what its runs say of it."""

    claim: str
    text: str
    source: str
    verdict: Verdict
    numbers: str


def estimate(values: Sequence[float], errors: Iterable[float] = ()) -> Estimate:
    """Returns the mean over seeds with the half-width sqrt((t s / sqrt(n))^2 + (1.96 e)^2).

    s is the standard deviation of the n seeds' `values`, and t is Student's quantile. e is the root mean square of the
    known `errors`, the values' standard errors over problems (0 is not known: no such error, or all right, or all
    wrong). All seeds get the same problems, so e is not divided by sqrt(n): another set of problems would move them
    all. That is conservative for a difference of two arms, whose `errors` (:func:`error_of_difference`) treat their
    answers to the same problems as independent.
    """
    n, known = len(values), [error for error in errors if error > 0]
    mean = sum(values) / n
    if n == 1 and not known:
        return Estimate(mean, None, None, n)
    between = 0.0
    if n > 1:
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
        between = STUDENT[min(n - 1, len(STUDENT)) - 1] * deviation / math.sqrt(n)
    over_problems = math.sqrt(sum(e**2 for e in known) / len(known)) if known else 0.0
    half = math.hypot(between, NORMAL * over_problems)
    return Estimate(mean, mean - half, mean + half, n)


def error_of_difference(*errors: float) -> float:
    """Returns the standard error of a sum or difference of values with these errors; 0 (not known) if one is 0."""
    return math.hypot(*errors) if all(errors) else 0.0


def judge_all(suite: Suite, results: Results) -> list[JudgedClaim]:
    """Judges every claim of the suite."""
    return [
        JudgedClaim(name, claim.text, claim.source, *judge(suite, claim, results))
        for name, claim in suite.claims.items()
    ]


def judge(suite: Suite, claim: Claim, results: Results) -> tuple[Verdict, str]:
    """Returns the verdict, and its numbers in one sentence."""
    test = claim.test
    if isinstance(test, Untestable):
        return "not testable here", test.reason
    seeds = [seed for seed in suite.seeds if all((name, seed) in results for name in _needed(suite, claim))]
    if not seeds:
        missing = [name for name in _needed(suite, claim) if not any((name, seed) in results for seed in suite.seeds)]
        return "not testable here", f"not run: {', '.join(missing) or 'these arms at a common seed'}"
    if isinstance(test, Difference):
        return _difference(suite, test, results, seeds)
    if isinstance(test, Ratio):
        return _ratio(test, results, seeds)
    if isinstance(test, NoDecline):
        return _no_decline(suite, test, results, seeds)
    return _mass_moves(suite, test, results, seeds)


def _needed(suite: Suite, claim: Claim) -> list[str]:
    names = named_in(claim)
    if getattr(claim.test, "gain", False):
        names += [suite.arms[name].start for name in names if name in suite.arms]
    return list(dict.fromkeys(names))


def _difference(suite: Suite, test: Difference, results: Results, seeds: list[int]) -> tuple[Verdict, str]:
    def side(name: str, seed: int) -> tuple[float, list[float]]:
        """Returns the metric, or its gain over the start, and the standard errors of its parts."""
        value, error = _metric(results[name, seed], test.metric)
        if test.gain and name in suite.arms:
            before, error_before = _metric(results[suite.arms[name].start, seed], test.metric)
            return value - before, [error, error_before]
        return value, [error]

    unlike = _unmatched(suite, test, results, seeds)
    left_out = "".join(f"; seed {seed} left out: starts of {a:.3f} and {b:.3f}" for seed, (a, b) in unlike.items())
    seeds = [seed for seed in seeds if seed not in unlike]
    if not seeds:
        return "not testable here", f"no seed has starts within {test.matched:g} of each other{left_out}"
    try:
        pairs = [(side(test.arm, seed), side(test.than, seed)) for seed in seeds]
    except KeyError as error:
        return "not testable here", f"the results have no {error.args[0]}"
    found = estimate([a[0] - b[0] for a, b in pairs], [error_of_difference(*a[1], *b[1]) for a, b in pairs])
    if found.low is None and not has_error(test.metric):  # the mean alone would decide, by whatever it is
        holds, remark = False, f"; undecided: one seed, and no error of {test.metric} over problems is known"
    elif test.equal_will_do:
        holds, remark = _at_least_equal(found, test.margin)
    else:
        holds, remark = _better(found, test.at_least)
    what = f"{'gain in ' if test.gain else ''}{test.metric}"
    numbers = f"{test.arm} - {test.than}, {what}: {found.text()}{remark}{left_out}"
    return ("reproduced" if holds else "not reproduced"), numbers


def _unmatched(suite: Suite, test: Difference, results: Results, seeds: list[int]) -> dict[int, tuple[float, float]]:
    """Returns the seeds whose two starts differ by more than `test.matched`, with the starts' pass@1."""
    if test.matched is None:
        return {}
    names = [suite.arms[name].start if name in suite.arms else name for name in (test.arm, test.than)]
    starts = {seed: tuple(results[name, seed].metrics["pass_at_1"] for name in names) for seed in seeds}
    return {seed: (a, b) for seed, (a, b) in starts.items() if abs(a - b) > test.matched}


def _better(found: Estimate, at_least: float) -> tuple[bool, str]:
    """Returns whether it holds, and a remark. Without an interval the mean stands for its ends."""
    wanted = f"; wanted at least {at_least:+g}" if at_least else ""
    low, high = _ends(found)
    if low <= 0 <= high and found.low is not None:
        return False, f"{wanted}; undecided: the interval includes 0"
    return found.mean >= at_least and low > 0, wanted


def _ends(found: Estimate) -> tuple[float, float]:
    return (found.mean if found.low is None else found.low), (found.mean if found.high is None else found.high)


def _at_least_equal(found: Estimate, margin: float) -> tuple[bool, str]:
    """Does what :func:`_better` does, with a difference down to -`margin` counted as equal."""
    low, high = _ends(found)
    floor = 0 - margin  # not -margin: a margin of 0 is no "-0"
    if low >= floor:
        return True, f"; not below {floor:g}"
    return False, f"; undecided: the interval reaches below {floor:g}" if high >= 0 else "; worse"


def _metric(result: UnitResult, name: str) -> tuple[float, float]:
    """Returns the value and its standard error over problems (0: not known)."""
    return result.metrics[name], error_of(result.metrics, name)


def _ratio(test: Ratio, results: Results, seeds: list[int]) -> tuple[Verdict, str]:
    pairs = [
        (_metric(results[test.arm, s], test.metric)[0], _metric(results[test.than, s], test.metric)[0]) for s in seeds
    ]
    if any(b == 0 for _, b in pairs):
        return "not testable here", f"{test.than} has {test.metric} 0"
    found = estimate([a / b for a, b in pairs])
    shown = ", ".join(f"{a:.1f} / {b:.1f}" for a, b in pairs)
    numbers = (
        f"{test.metric} {test.arm} / {test.than} = {found.text('{:.2f}')}: {shown}; wanted at least {test.at_least:g}"
    )
    return ("reproduced" if found.mean >= test.at_least else "not reproduced"), numbers


def _no_decline(suite: Suite, test: NoDecline, results: Results, seeds: list[int]) -> tuple[Verdict, str]:
    parts, holds = [], True
    for seed in seeds:
        curve = [(point["step"], point["pass_at_1"]) for point in results[test.arm, seed].evaluations]
        if len(curve) < 2:
            return "not testable here", f"{test.arm} was evaluated {len(curve)} time(s); set evaluation.every"
        start = results.get((suite.arms[test.arm].start, seed)) if test.arm in suite.arms else None
        if start is not None:
            curve.insert(0, (0.0, start.metrics["pass_at_1"]))
        best_step, best = max(curve, key=lambda point: point[1])
        last_step, last = curve[-1]
        holds &= last >= best - test.drop
        parts.append(f"seed {seed}: best {best:.3f} at step {best_step:g}, last {last:.3f} at step {last_step:g}")
    return ("reproduced" if holds else "not reproduced"), "; ".join(parts) + f"; allowed drop {test.drop:g}"


def _mass_moves(suite: Suite, test: MassMoves, results: Results, seeds: list[int]) -> tuple[Verdict, str]:
    parts, holds = [], True
    for seed in seeds:
        start = results.get((suite.arms[test.arm].start, seed)) if test.arm in suite.arms else None
        probe = [*(start.probe if start else []), *results[test.arm, seed].probe]
        if len(probe) < 2:
            return "not testable here", f"{test.arm} has no probed evaluations (several steps, answers of one token)"
        first, last = probe[0], probe[-1]
        holds &= last["answer"] < first["answer"] and last["fillers"] > first["fillers"]
        parts.append(
            f"seed {seed}, step {first['step']:g} to {last['step']:g}: answer {first['answer']:.3f} -> "
            f"{last['answer']:.3f}, fillers {first['fillers']:.3f} -> {last['fillers']:.3f}"
        )
    return ("reproduced" if holds else "not reproduced"), "; ".join(parts)
