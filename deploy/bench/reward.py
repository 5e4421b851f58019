"""A benchmark of grading, on generated answers like those of GSM8K and MATH, right and wrong.

Throughput is that of a rollout worker: calls of `VerifierPool.grade_many` with a step's samples. No two cases of one
problem have the same answer, so grading equal answers only once does not help. Rates are per second of processor time,
of this process and of the graders together, so that other load on the machine does not count; the rate by the clock is
given beside them. Latency is that of a single case in a call of its own, including the way through the pipe.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import psutil
from rich.table import Table

from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.reward.pool import VerifierPool

Case = tuple[str, str, str]
BATCH = 512
SINGLE_CASES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardBenchmark:
    """The figures of one workload; times in milliseconds, rates in gradings per second."""

    workload: str
    cases: int
    correct: int
    timeouts: int
    ungraded: int
    per_core_second: float
    per_second: float
    p50_ms: float
    p99_ms: float
    worst_ms: float
    goal_per_core_second: float


def measure(cases: int, processes: int, seed: int) -> list[RewardBenchmark]:
    """Measures both workloads on one warm pool."""
    workloads: tuple[tuple[str, Callable[[random.Random], Iterator[Case]], float], ...] = (
        ("GSM8K-like", gsm8k_like, 2000.0),
        ("MATH-like", math_like, 300.0),
    )
    with VerifierPool(processes=processes) as pool:
        pool.grade_many([("math", r"\boxed{(x+1)^2}", "x^2+2x+1")])  # starts the processes and imports the algebra
        return [_measure(pool, name, make(random.Random(seed)), cases, goal) for name, make, goal in workloads]


def _measure(pool: VerifierPool, name: str, stream: Iterator[Case], cases: int, goal: float) -> RewardBenchmark:
    drawn = [next(stream) for _ in range(cases + min(cases, SINGLE_CASES))]
    grades = []
    processor, clock = _processor_seconds(pool), time.perf_counter()
    for start in range(0, cases, BATCH):
        grades += pool.grade_many(drawn[start : min(start + BATCH, cases)])
    processor, clock = _processor_seconds(pool) - processor, time.perf_counter() - clock
    single = []
    for case in drawn[cases:]:
        started = time.perf_counter()
        pool.grade_many([case])
        single.append(1000 * (time.perf_counter() - started))
    p50, p99 = np.percentile(single, [50, 99])
    return RewardBenchmark(
        workload=name,
        cases=cases,
        correct=sum(grade.reason == "correct" for grade in grades),
        timeouts=sum(grade.reason == "timeout" for grade in grades),
        ungraded=sum(grade.reason == "ungraded" for grade in grades),
        per_core_second=cases / processor,
        per_second=cases / clock,
        p50_ms=float(p50),
        p99_ms=float(p99),
        worst_ms=max(single),
        goal_per_core_second=goal,
    )


def _processor_seconds(pool: VerifierPool) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pool.process_ids()]
    return time.process_time() + sum(t.user + t.system for t in times)


# --- the workloads ---------------------------------------------------------------------------------------------------


def gsm8k_like(rng: random.Random) -> Iterator[Case]:
    """Yields several responses to each problem with a whole number as the answer; about half are right."""
    spellings: tuple[Callable[[int], str], ...] = (
        str,
        lambda n: f"{n:,}",
        lambda n: rf"\${n}",
        lambda n: f"{n} dollars",
        lambda n: rf"{n}\text{{ apples}}",
        lambda n: f"{n}.00",
        lambda n: f"x = {n}",
    )
    while True:
        gold = rng.randint(1_000, 1_000_000)
        stated = [(spelling, gold + offset) for spelling in spellings for offset in (0, 0, 0, -1, 1, 7)]
        for spelling, number in dict.fromkeys(rng.sample(stated, 8)):
            yield "number", _response(rng, spelling(number)), str(gold)


def math_like(rng: random.Random) -> Iterator[Case]:
    """Yields three responses to each problem of MATH's kind: right as in the gold, right in another form, and wrong."""
    while True:
        gold, same, wrong = rng.choice(_FORMS)(rng)
        for stated in (gold, same, wrong):
            yield "math", _response(rng, stated), gold


Form = tuple[str, str, str]  # gold, the same in another form, something else


def _whole(rng: random.Random) -> Form:
    n = rng.randint(2, 10**5)
    return str(n), f"{n:,}", str(n + rng.choice((-1, 1, 10)))


def _fraction(rng: random.Random) -> Form:
    top, bottom = rng.randint(1, 999), rng.randint(2, 999)
    return rf"\frac{{{top}}}{{{bottom}}}", f"{2 * top}/{2 * bottom}", rf"\frac{{{top + 1}}}{{{bottom}}}"


def _root(rng: random.Random) -> Form:
    a, b = rng.randint(2, 99), rng.choice((2, 3, 5, 6, 7, 10, 11, 13))
    return rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}", rf"{a + 1}\sqrt{{{b}}}"


def _multiple_of_pi(rng: random.Random) -> Form:
    a, b = rng.randint(1, 999), rng.randint(2, 99)
    return rf"\frac{{{a}\pi}}{{{b}}}", rf"\frac{{{a}}}{{{b}}}\pi", rf"\frac{{{a + 1}\pi}}{{{b}}}"


def _polynomial(rng: random.Random) -> Form:
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    return f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})", f"x^2+{a + b}x+{a * b + 1}"


def _pair(rng: random.Random) -> Form:
    a, b, c = rng.randint(-99, 99), rng.randint(1, 99), rng.randint(2, 9)
    return rf"\left({a},\frac{{{b}}}{{{c}}}\right)", f"({a}, {b}/{c})", f"({b}, {a})"


def _interval(rng: random.Random) -> Form:
    a, b = rng.randint(-99, 0), rng.randint(1, 99)
    return rf"({a},{b}]\cup[{b + 2},\infty)", rf"[{b + 2},\infty)\cup({a},{b}]", rf"({a},{b})\cup[{b + 2},\infty)"


def _several(rng: random.Random) -> Form:
    a, b, c = rng.sample(range(-999, 999), 3)
    return f"{a}, {b}, {c}", rf"\{{{c},{a},{b}\}}", f"{a}, {b}"


def _complex(rng: random.Random) -> Form:
    a, b = rng.randint(1, 99), rng.randint(2, 99)
    return f"{a}+{b}i", f"{b}i+{a}", f"{a}-{b}i"


def _matrix(rng: random.Random) -> Form:
    a, b, c, d = (rng.randint(-99, 99) for _ in range(4))
    rows = rf"{a} & {b} \\ {c} & {d}"
    other = rf"{a} & {b} \\ {c - 1} & {d}"
    return (
        rf"\begin{{pmatrix}} {rows} \end{{pmatrix}}",
        rf"\begin{{bmatrix}} {rows} \end{{bmatrix}}",
        rf"\begin{{pmatrix}} {other} \end{{pmatrix}}",
    )


# Roughly in the shares of MATH's answers, of which two thirds are numbers.
_FORMS = (
    *([_whole] * 10),
    *([_fraction] * 4),
    *([_root] * 2),
    *(_multiple_of_pi, _polynomial, _polynomial, _pair, _interval, _several, _complex, _matrix),
)


def _response(rng: random.Random, answer: str) -> str:
    """Returns a response of some 600 characters that ends in the boxed answer."""
    steps = (f"{rng.randint(1, 999)} + {rng.randint(1, 999)} is a step on the way. " for _ in range(16))
    return "".join(steps) + rf"So the answer is \boxed{{{answer}}}."


# --- the report ------------------------------------------------------------------------------------------------------


def show(results: list[RewardBenchmark]) -> None:
    """Prints the table of the command."""
    table = Table(title="latent-grpo bench reward")
    for heading in ("workload", "gradings", "per core and s", "goal", "per s", "p50 ms", "p99 ms", "worst ms"):
        table.add_column(heading, justify="right", no_wrap=heading == "workload")
    for r in results:
        rates = (f"{rate:,.0f}" for rate in (r.per_core_second, r.goal_per_core_second, r.per_second))
        times = (f"{value:.2f}" for value in (r.p50_ms, r.p99_ms, r.worst_ms))
        table.add_row(r.workload, f"{r.cases:,}", *rates, *times)
    TextConsole().print(table)
