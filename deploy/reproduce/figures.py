"""The contents of a suite's report: its figures as plain values, and the tables that Markdown and HTML lay out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from latent_grpo.deploy.evaluation.scores import is_error
from latent_grpo.deploy.reproduce.claims import Estimate, JudgedClaim, Results, error_of_difference, estimate, judge_all
from latent_grpo.deploy.reproduce.manifest import SuiteManifest
from latent_grpo.deploy.reproduce.results import UnitResult, error_of, is_proportion
from latent_grpo.deploy.reproduce.suite import Suite, units

Columns = tuple[tuple[str, str], ...]
COLUMNS: Columns = (
    ("pass_at_1", "pass@1"),
    ("chain_length", "chain length"),
    ("latent_length", "latent steps"),
    ("invalid_rate", "invalid rate"),
)
MASSES = ("answer", "other_numbers", "fillers")
RULES = (
    "pass@1 has the noise off. Intervals are 95 %: Student's over seeds and, where it is known, one run's error over "
    "problems, which is not divided by the number of seeds since all are asked the same problems; with one seed the "
    "latter alone, which knows nothing of the spread between seeds. Those of proportions are shown up to 0 and 1. A "
    "difference is reproduced if its mean reaches what is wanted and its interval lies above 0; `at least equal` if "
    "its interval does not reach below minus a margin (0.05 where the claim says no other). Undecided: the interval "
    "also holds values that say the opposite."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRow:
    """An arm or a start over its seeds. Metrics have the names of :class:`deploy.reproduce.results.UnitResult`."""

    name: str
    title: str
    is_start: bool
    start: str  # the start of the arm; a start's own name
    metrics: dict[str, Estimate]
    gain: Estimate | None  # of pass@1 over the start; None for a start, and where no seed has both
    each: dict[str, dict[str, float]]  # seed -> metrics
    tasks: dict[str, dict[str, Estimate]]  # empty where only one task was evaluated
    seconds_per_step: float | None
    minutes: float


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The evaluated pass@1 at a step, over seeds."""

    step: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class MassPoint:
    """The masses of the last latent step at a training step, mean over seeds (`deploy.reproduce.probe`)."""

    step: int
    answer: float
    other_numbers: float
    fillers: float


@dataclass(frozen=True, slots=True)
class UnitCount:
    """How many units of a suite there are, and how many have finished."""

    finished: int
    all: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteReport:
    """Everything that a suite's report shows; `report.json` is its `dataclasses.asdict`."""

    title: str
    profile: str
    runner: str
    complete: bool
    units: UnitCount
    arms: list[ArmRow]
    protocol: str  # of evaluation, by which all averages and claims are
    claims: list[JudgedClaim]
    curves: dict[str, list[CurvePoint]]  # by arm
    masses: dict[str, list[MassPoint]]  # by arm
    manifest: SuiteManifest
    minutes: float


def figures(suite: Suite, results: Results, manifest: SuiteManifest) -> SuiteReport:
    """Returns the report of the units that have finished."""
    total = len(list(units(suite)))
    rows = []
    for name, title, is_start in _lines(suite):
        of_unit = [results[name, seed] for seed in suite.seeds if (name, seed) in results]
        if of_unit:
            rows.append(_row(suite, name, title, is_start, of_unit, results))
    commits = {f"{name}-seed{seed}": r.provenance.get("commit") for (name, seed), r in results.items()}
    return SuiteReport(
        title=suite.title,
        profile=suite.profile,
        runner=suite.runner,
        complete=len(results) == total,
        units=UnitCount(len(results), total),
        arms=rows,
        protocol=", ".join(dict.fromkeys(result.protocol for result in results.values())) or "ours",
        claims=judge_all(suite, results),
        curves=_curves(suite, results),
        masses=_masses(suite, results),
        manifest=dataclasses.replace(manifest, units=commits),
        minutes=round(sum(r.minutes for r in results.values()), 1),
    )


def _lines(suite: Suite) -> list[tuple[str, str, bool]]:
    """Returns (name, title, is a start), each start before its arms."""
    lines = []
    for name, start in suite.starts.items():
        lines.append((name, start.title, True))
        lines += [(arm_name, arm.title, False) for arm_name, arm in suite.arms.items() if arm.start == name]
    return lines


def _row(suite: Suite, name: str, title: str, is_start: bool, found: list[UnitResult], results: Results) -> ArmRow:
    gain = None
    if not is_start:
        start = suite.arms[name].start
        pairs = [(r, results[start, r.seed]) for r in found if (start, r.seed) in results]
        if pairs:
            errors = [error_of_difference(a.metrics["standard_error"], b.metrics["standard_error"]) for a, b in pairs]
            values = [a.metrics["pass_at_1"] - b.metrics["pass_at_1"] for a, b in pairs]
            gain = estimate(values, errors)
    tasks = list(dict.fromkeys(task for r in found for task in r.tasks))
    speeds = [r.seconds_per_step for r in found if r.seconds_per_step]
    return ArmRow(
        name=name,
        title=title,
        is_start=is_start,
        start=name if is_start else suite.arms[name].start,
        metrics=_estimates([r.metrics for r in found]),
        gain=gain,
        each={str(r.seed): r.metrics for r in found},
        tasks={t: _estimates([r.tasks[t] for r in found if t in r.tasks]) for t in tasks} if len(tasks) > 1 else {},
        seconds_per_step=sum(speeds) / len(speeds) if speeds else None,
        minutes=sum(r.minutes for r in found),
    )


def _estimates(of_seeds: list[dict[str, float]]) -> dict[str, Estimate]:
    """Returns metric -> its mean over seeds with its interval as shown, which includes the standard errors."""
    shown = {}
    for name in dict.fromkeys(name for metrics in of_seeds for name in metrics if not is_error(name)):
        having = [metrics for metrics in of_seeds if name in metrics]
        found = estimate([metrics[name] for metrics in having], [error_of(metrics, name) for metrics in having])
        shown[name] = found.of_proportion if is_proportion(name) else found
    return shown


def _curves(suite: Suite, results: Results) -> dict[str, list[CurvePoint]]:
    """Returns arm -> evaluated pass@1 over steps from its start on: mean, lowest and highest seed."""
    curves = {}
    for name, arm in suite.arms.items():
        by_step: dict[int, list[float]] = {}
        for seed in suite.seeds:
            if (name, seed) not in results:
                continue
            start = results.get((arm.start, seed))
            points = [(0, start.metrics["pass_at_1"])] if start else []
            points += [(int(p["step"]), p["pass_at_1"]) for p in results[name, seed].evaluations]
            for step, value in points:
                by_step.setdefault(step, []).append(value)
        if by_step:
            curves[name] = [CurvePoint(step, sum(v) / len(v), min(v), max(v)) for step, v in sorted(by_step.items())]
    return curves


def _masses(suite: Suite, results: Results) -> dict[str, list[MassPoint]]:
    """Returns arm -> the last latent step's masses over steps, mean over seeds (`deploy.reproduce.probe`)."""
    found = {}
    for name, arm in suite.arms.items():
        by_step: dict[int, list[dict[str, float]]] = {}
        for seed in suite.seeds:
            if (name, seed) not in results or not results[name, seed].probe:
                continue
            start = results.get((arm.start, seed))
            for point in [*(start.probe if start else []), *results[name, seed].probe]:
                by_step.setdefault(int(point["step"]), []).append(point)
        if by_step:
            found[name] = [
                MassPoint(step, *(sum(p[kind] for p in points) / len(points) for kind in MASSES))
                for step, points in sorted(by_step.items())
            ]
    return found


# --- tables that both layouts show ---------------------------------------------------------------------------------


def _sampled(report: SuiteReport) -> list[str]:
    """Returns the names of the pass@k columns: the largest k that most arms have, and k = 1."""
    names = {name for row in report.arms for name in row.metrics if name.startswith("sampled_pass_at_")}
    ordered = sorted(names, key=lambda name: int(name.rpartition("_")[2]))
    return ordered if len(ordered) <= 2 else [ordered[0], ordered[-1]]


def arm_table(report: SuiteReport) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table of arms."""
    sampled = _sampled(report)
    header = ["arm", "seeds", "pass@1", "gain over its start", *_titles(COLUMNS[1:], sampled), "s / step"]
    rows = []
    for row in report.arms:
        at_1 = row.metrics["pass_at_1"]
        cells = [("" if row.is_start else "· ") + row.title, str(at_1.seeds), _interval(at_1, "{:.3f}")]
        cells.append("" if row.gain is None else _interval(row.gain, "{:+.3f}"))
        cells += _values(row.metrics, COLUMNS[1:], sampled)
        cells.append(f"{row.seconds_per_step:.2f}" if row.seconds_per_step else "")
        rows.append(cells)
    return header, rows


def task_tables(report: SuiteReport) -> list[tuple[str, list[str], list[list[str]]]]:
    """Returns (title, header, rows) for each arm that was evaluated on several tasks, with one row per task."""
    sampled = _sampled(report)
    header = ["task", *_titles(COLUMNS, sampled)]
    return [
        (row.title, header, [[task, *_values(found, COLUMNS, sampled)] for task, found in row.tasks.items()])
        for row in report.arms
        if row.tasks
    ]


def _titles(columns: Columns, sampled: list[str]) -> list[str]:
    return [title for _, title in columns] + [f"pass@{name.rpartition('_')[2]}, noise on" for name in sampled]


def _values(found: dict[str, Estimate], columns: Columns, sampled: list[str]) -> list[str]:
    """Returns a cell for each of :func:`_titles`: success rates with their interval, the others as means."""
    cells = []
    for name in (*(name for name, _ in columns), *sampled):
        value = found.get(name)
        if value is None:
            cells.append("-")
        elif name == "pass_at_1" or name in sampled:
            cells.append(_interval(value, "{:.3f}"))
        else:
            cells.append(f"{value.mean:.1%}" if name == "invalid_rate" else f"{value.mean:.1f}")
    return cells


def _interval(value: Estimate, form: str) -> str:
    text = form.format(value.mean)
    if value.low is None or value.high is None:
        return text
    return f"{text} [{form.format(value.low)}, {form.format(value.high)}]"


def seed_table(report: SuiteReport) -> tuple[list[str], list[list[str]]]:
    """Returns a table of every seed's pass@1."""
    seeds = sorted({seed for row in report.arms for seed in row.each}, key=int)
    rows = [
        [row.title, *(f"{row.each[s]['pass_at_1']:.3f}" if s in row.each else "-" for s in seeds)]
        for row in report.arms
    ]
    return ["arm", *(f"seed {seed}" for seed in seeds)], rows


def claim_table(report: SuiteReport) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table of claims."""
    rows = [[c.text, c.source, c.verdict, c.numbers] for c in report.claims]
    return ["claim", "source", "verdict", f"numbers (protocol {report.protocol})"], rows


def mass_table(report: SuiteReport) -> tuple[list[str], list[list[str]]]:
    """Returns a table of each arm's first and last probe."""
    rows = []
    for name, points in report.masses.items():
        for point in points if len(points) < 2 else (points[0], points[-1]):
            rows.append([name, f"{point.step:g}", *(f"{getattr(point, kind):.3f}" for kind in MASSES)])
    return ["arm", "step", "answer", "other numbers", "fillers"], rows


def rules(report: SuiteReport) -> str:
    """Returns by what rules the figures and verdicts are."""
    return f"All figures are by the protocol {report.protocol} of evaluation. {RULES}"


def facts(report: SuiteReport) -> list[tuple[str, str]]:
    """Returns what the numbers were made with, in words; where sessions differ, all of their values."""
    manifest = report.manifest
    sessions = manifest.sessions
    names = list(dict.fromkeys(name for session in sessions for name in session.data))
    return [
        ("profile", f"{report.profile}, runner {report.runner}"),
        ("protocol of evaluation", report.protocol),
        ("units", f"{report.units.finished} of {report.units.all} finished, {report.minutes} minutes in all"),
        ("seeds", ", ".join(map(str, manifest.seeds))),
        ("commit", _counted((s.commit for s in sessions), "session")),
        ("commit of the units", _counted(map(str, manifest.units.values()), "unit")),
        ("versions", _counted((", ".join(f"{n} {v}" for n, v in s.versions.items()) for s in sessions), "session")),
        ("grader", _counted((s.grader for s in sessions), "session")),
        *((f"data: {name}", _counted((s.data[name] for s in sessions if name in s.data), "session")) for name in names),
        ("machine", manifest.machine),
        ("started", f"{sessions[0].time}, {len(sessions)} session(s)"),
    ]


def _counted(values: Iterable[str], what: str) -> str:
    """Formats counts as `a (2 sessions), b (1 session)`."""
    return ", ".join(f"{value} ({n} {what}{'s' * (n > 1)})" for value, n in Counter(values).items())
