"""The charts of a report: which metrics of a run they show, and what each of them means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from latent_grpo.common.figure_names import protocol_of, titled
from latent_grpo.deploy.run.folder import FAILED
from latent_grpo.deploy.view.run_view import RunView

MEAN_OVER = 10  # steps of the smoothed curves


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart. `metric` is a name, or a function of a step's metrics."""

    name: str
    metric: str | Callable[[dict[str, Any]], float | None]
    smoothed: bool = False

    def value(self, metrics: dict[str, Any]) -> float | None:
        """Returns the curve's value in a step's metrics; None: it has none that is finite."""
        found = self.metric(metrics) if callable(self.metric) else metrics.get(self.metric)
        return found if found is not None and math.isfinite(found) else None


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart. `explain` says what it shows and what is healthy, for a reader who sees it for the first time."""

    title: str
    explain: str
    curves: tuple[Curve, ...]
    form: str = "line"  # from 0 up | free | log | percent | stack (shares that add up to 100 %)


CHARTS = (
    Chart(
        "Reward",
        "Mean reward of each step's rollouts, with noise. Training works if the smoothed line rises.",
        (Curve("each step", "rollout/reward"), Curve(f"mean of {MEAN_OVER} steps", "rollout/reward", smoothed=True)),
    ),
    Chart(
        "Chain length",
        "Response steps per rollout, latent and hard together. Look into a sudden fall or rise.",
        (Curve("all steps", "rollout/steps"), Curve("latent steps", "rollout/latent_steps")),
    ),
    Chart(
        "Latent share",
        "Share of a chain's response steps that are latent. A fall means that reasoning moves out of latent mode into "
        "the visible part.",
        (Curve("latent", "rollout/latent_share"),),
        "percent",
    ),
    Chart(
        "Where thinking ends",
        "Latent steps before the end of thinking, over the rollouts that end it.",
        (Curve("exit", "latent/exit_step"),),
    ),
    Chart(
        "Invalid rate",
        "Share of rollouts that used up their token budget without finishing. It should stay near zero.",
        (Curve("invalid", "rollout/invalid_share"),),
        "percent",
    ),
    Chart(
        "Log-prob gap",
        "How far the learner's log-probabilities are from those of the rollout worker. With synchronous training it "
        "is numerical drift alone, and should be tiny and flat. Self-test and alarm judge the means of single "
        "components, K of a latent step and one of a hard step; the others are of whole steps.",
        (
            Curve("latent components, mean", "learner/latent_gap_mean"),
            Curve("hard components, mean", "learner/hard_gap_mean"),
            Curve("steps, mean", "learner/drift_mean"),
            Curve("steps, p99", "learner/drift_p99"),
            Curve("steps, largest", "learner/drift_max"),
        ),
        "log",
    ),
    Chart(
        "Log-prob gap by kind of step",
        "The same gap of whole steps, apart for latent steps, for those that leave latent mode, and for text. One kind "
        "that stands out says where engine and learner disagree; `importance` can weigh or leave out such steps.",
        tuple(Curve(f"{kind}, mean", f"learner/drift_{kind}_mean") for kind in ("latent", "leaving", "visible")),
        "log",
    ),
    Chart(
        "Width of the thoughts",
        "Effective number of tokens in a latent step, exp(entropy of the weights). At 1, thoughts have collapsed to "
        "single tokens; at K, all tokens have the same weight.",
        (Curve("effective width", "latent/effective_width"),),
    ),
    Chart(
        "Entropy of the thoughts",
        "Entropy of the mixture weights in nats. It falls as thoughts concentrate on fewer tokens.",
        (Curve("entropy", "latent/entropy"),),
    ),
    Chart(
        "Thinking ends",
        "Share of rollouts that left latent mode by themselves. The others have no answer to grade.",
        (Curve("left latent mode", "latent/thinking_end_rate"),),
        "percent",
    ),
    Chart(
        "Policy ratio",
        "New probability over old when a step's updates are computed. Values far from 1 mean that the policy moves too "
        "fast.",
        (Curve("mean", "learner/ratio_mean"), Curve("p99", "learner/ratio_p99"), Curve("p1", "learner/ratio_p01")),
        "free",
    ),
    Chart(
        "Clipped steps",
        "Share of response steps whose gradient a clip bound stopped.",
        (
            Curve("low", "learner/clip_fraction_low"),
            Curve("high", "learner/clip_fraction_high"),
            Curve("dual", "learner/clip_fraction_dual"),
        ),
        "percent",
    ),
    Chart(
        "Gradient norm",
        "Norm before clipping. Spikes are an early sign of instability.",
        (Curve("norm", "learner/grad_norm"),),
    ),
    Chart(
        "Groups without signal",
        "Share of groups whose samples all have the same reward, and which therefore teach nothing.",
        (Curve("all equal", "batch/zero_variance_share"),),
        "percent",
    ),
)


def charts(run: RunView) -> list[dict[str, Any]]:
    """Returns the charts for which the run has metrics, as JSON for the page."""
    train = run.metric_rows("train")
    found = [_pass_at_1(run), *(_chart(chart, train) for chart in CHARTS)]
    found += [_stack("Grades", GRADES, _grades(train)), _stack("Where the time goes", TIMES, _time_shares(train))]
    found += _warm_start(run)
    return [chart for chart in found if chart is not None]


GRADES = "Shares of each step's rollouts by the verifier's reason."
TIMES = (
    "Share of each step's wall-clock time. A large wait for rollouts means that workers are the bottleneck, a large "
    "learner share that the learner is."
)


def _chart(chart: Chart, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    series = []
    for curve in chart.curves:
        measured = [(row["step"], curve.value(row["metrics"])) for row in rows]
        points = [(step, value) for step, value in measured if value is not None]
        if not points or (curve.smoothed and len(points) < MEAN_OVER):
            continue
        values = [value for _, value in points]
        series.append(_series(curve.name, [s for s, _ in points], _smoothed(values) if curve.smoothed else values))
        if curve.smoothed:
            series[0]["faint"] = True
    return _json(chart.title, chart.explain, chart.form, series)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Returns the mean of each value and those before it, over at most `MEAN_OVER` values."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - MEAN_OVER) : i + 1] for i in range(len(values)))]


def _pass_at_1(run: RunView) -> dict[str, Any] | None:
    """Returns the chart of evaluations (noise off, held-out problems): a line per task, with its standard error."""
    rows = run.metric_rows("evaluation")
    tasks = list(dict.fromkeys(key for row in rows for key in row["metrics"] if key.endswith("/pass_at_1")))
    protocols = list(dict.fromkeys(protocol_of(key.removesuffix("/pass_at_1")) for key in tasks))
    series = []
    for key in tasks:
        task = key.removesuffix("/pass_at_1")
        has = [row for row in rows if row["metrics"].get(key) is not None]
        errors = [row["metrics"].get(f"{task}/standard_error") or 0.0 for row in has]
        name = task if len(protocols) < 2 else titled(task)
        series.append(_series(name, [r["step"] for r in has], [r["metrics"][key] for r in has], error=_rounded(errors)))
    first = (run.settings.get("evaluation") or {}).get("interim_problems")
    part = "" if first is None else f" These are the first {first:,} problems of each task; the table has all."
    return _json(
        "pass@1",
        "Accuracy on problems that are not trained on: the result of the run, by the protocol "
        f"{' and '.join(protocols)} of evaluation (that of ours has the noise off). Bars are standard errors.{part}",
        "percent",
        series,
    )


def _stack(title: str, explain: str, shares: dict[str, list[tuple[int, float]]]) -> dict[str, Any] | None:
    series = [_series(name, [s for s, _ in points], [v for _, v in points]) for name, points in shares.items()]
    return _json(title, explain, "stack", series)


def _grades(rows: Iterable[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    prefix, rows = "rollout/reason_", list(rows)
    names = sorted({key for row in rows for key in row["metrics"] if key.startswith(prefix)})
    return {
        name.removeprefix(prefix).replace("_", " "): [(r["step"], r["metrics"].get(name) or 0.0) for r in rows]
        for name in names
    }


def _time_shares(rows: Iterable[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Returns every `time/..._s` as a share of `time/step_s`, and the rest as `other`."""
    rows = [row for row in rows if row["metrics"].get("time/step_s")]
    keys = {key for row in rows for key in row["metrics"] if key.startswith("time/") and key.endswith("_s")}
    parts = sorted(keys - {"time/step_s"})
    shares: dict[str, list[tuple[int, float]]] = {key: [] for key in parts}
    other: list[tuple[int, float]] = []
    for row in rows:
        total, left = row["metrics"]["time/step_s"], 1.0
        for key in parts:
            share = (row["metrics"].get(key) or 0.0) / total
            shares[key].append((row["step"], share))
            left -= share
        other.append((row["step"], max(left, 0.0)))
    named = {key.removeprefix("time/").removesuffix("_s").replace("_", " "): points for key, points in shares.items()}
    return named | ({"other": other} if other else {})


def _warm_start(run: RunView) -> list[dict[str, Any] | None]:
    """Returns the charts of Latent-SFT: its two losses, held-out pass@1, lengths and failures."""
    rows, held_out = run.metric_rows("sft"), run.metric_rows("sft_evaluation")
    losses = {"loss": "loss", "KL (latent steps)": "kl", "cross-entropy (text)": "cross_entropy"}
    found = {name: [(r["step"], r["metrics"].get(key)) for r in rows] for name, key in losses.items()}
    series = [
        _series(name, [s for s, v in points if v is not None], [v for _, v in points if v is not None])
        for name, points in found.items()
        if any(v is not None for _, v in points)
    ]
    steps = [row["step"] for row in held_out]
    scores = [row["metrics"]["pass_at_1"] for row in held_out]
    errors = _rounded(row["metrics"].get("standard_error") or 0.0 for row in held_out)
    reasons = dict.fromkeys(key for row in held_out for key in row["metrics"] if key.startswith(FAILED))
    failures = {
        key.removeprefix(FAILED).replace("_", " "): [(r["step"], r["metrics"].get(key) or 0.0) for r in held_out]
        for key in reasons
    }
    if failures:
        right = [(row["step"], 1.0 - sum(row["metrics"].get(key) or 0.0 for key in reasons)) for row in held_out]
        failures = {"correct": right, **failures}
    lengths = Chart(
        "Latent-SFT: chain length",
        "Response steps per held-out sample, noise off.",
        (Curve("all steps", "chain_length"), Curve("latent steps", "latent_length")),
    )
    return [
        _json("Latent-SFT: loss", SFT_LOSS, "line", series),
        _json(
            "Latent-SFT: held-out pass@1",
            "Accuracy on problems that Latent-SFT does not learn from, with the noise off. Bars are standard errors.",
            "percent",
            [_series("held-out", steps, scores, error=errors)] if held_out else [],
        ),
        _chart(lengths, held_out),
        _stack("Latent-SFT: grades", "Shares of the held-out samples by the verifier's reason.", failures),
    ]


SFT_LOSS = (
    "Loss of Latent-SFT, which teaches the model to think in mixtures before RL: how far the mixtures are from the "
    "chain's tokens (KL), and how badly the text after them is predicted (cross-entropy). It counts its own steps."
)


def _series(name: str, x: list[int], y: list[float], **more: Any) -> dict[str, Any]:
    return {"name": name, "x": x, "y": _rounded(y), **more}


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _json(title: str, explain: str, form: str, series: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"title": title, "explain": explain, "form": form, "series": series} if series else None
