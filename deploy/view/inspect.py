"""The command `latent-grpo inspect RUN`, which shows a run in the terminal.

Without a filter it shows the run and its steps, with filters the trajectories that match. One match, or `--show N`, is
shown in full, thought by thought, with its group beside it; `--diff A B` compares one problem at two policy versions.

Model text is hostile: it is shown through `visible` (`common.terminal_text`) and as rich `Text`, never as markup.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from latent_grpo.common.golds import spelled
from latent_grpo.common.terminal_text import visible
from latent_grpo.deploy.run.health import FILE, last_active, log_prob_gap
from latent_grpo.deploy.view.other_kinds import evaluation_table, sft_steps, sft_table
from latent_grpo.deploy.view.run_facts import facts
from latent_grpo.deploy.view.run_view import RunView
from latent_grpo.deploy.view.selection import Filters, InspectionError, Row
from latent_grpo.deploy.view.thoughts import (
    as_json,
    load,
    row_json,
    run_tokens,
)
from latent_grpo.deploy.view.trajectory import (
    component_weighting,
    format_value,
    outcome_mark,
    print_json,
    report_left_out,
    show_trajectory,
)

OVERVIEW_ROWS = 40


def _gap(metrics: Mapping[str, float | None]) -> float | None:
    """Returns what the self-test and the alarm judge; of a run of 0.2.0 or earlier, the mean gap of whole steps."""
    found = log_prob_gap(metrics)
    return metrics.get("learner/drift_mean") if found is None else found


OVERVIEW: tuple[tuple[str, str | Callable[[Mapping[str, float | None]], float | None], str], ...] = (
    ("reward", "rollout/reward", "{:.3f}"),
    ("length", "rollout/steps", "{:.1f}"),
    ("latent", "rollout/latent_steps", "{:.1f}"),
    ("invalid", "rollout/invalid_share", "{:.1%}"),
    ("gap", _gap, "{:.1e}"),
    ("grad norm", "learner/grad_norm", "{:.3g}"),
    ("groups", "batch/groups", "{:.0f}"),
    ("s", "time/step_s", "{:.2f}"),
)


def inspect(
    run: RunView,
    filters: Filters,
    *,
    show: int | None = None,
    limit: int = 20,
    max_thoughts: int = 64,
    machine: bool = False,
    console: Console,
) -> None:
    """Prints the overview or the matches, as JSON for a `machine`. Raises InspectionError and DumpError."""
    shown: Any  # an object for JSON, or what rich prints
    if not filters.choosing and show is None and filters.sort == "step":
        shown = overview_json(run) if machine else overview(run)
    else:
        shown = _chosen(run, filters, show, limit, max_thoughts, machine)
    if machine:
        print_json(console, shown | {"left_out": run.unreadable})
        return
    console.print(shown)
    report_left_out(run, console)


def _chosen(run: RunView, filters: Filters, show: int | None, limit: int, max_thoughts: int, machine: bool) -> Any:
    rows = run.rows(filters)
    if show is not None and not 1 <= show <= len(rows):
        raise InspectionError(f"--show {show}: {len(rows)} trajectories match; give a number from 1 to {len(rows)}")
    if show is None and len(rows) > 1:
        listed = rows[: limit or None]
        if machine:
            return {"matches": len(rows), "trajectories": [row_json(row) for row in listed]}
        return listing(run, listed, len(rows))
    row = rows[(show or 1) - 1]
    thoughts, tokens = load(run, [row])[0], run_tokens(run)
    weighting = component_weighting(run)
    if machine:
        return as_json(thoughts, tokens, weighting) | {"group": [row_json(r) for r in run.group(row)]}
    siblings = load(run, run.group(row))
    return show_trajectory(thoughts, siblings, tokens, weighting, max_thoughts)


# --- overview ------------------------------------------------------------------------------------------------------


def overview(run: RunView) -> RenderableType:
    """Returns the run's facts and a table of its steps; of many steps, evenly spaced ones that were dumped."""
    grid = Table.grid(padding=(0, 2))
    for name, value in facts(run):
        grid.add_row(Text(name, style="dim"), Text(visible(value)))
    panel = Panel(grid, title=Text(run.folder.name), title_align="left", border_style="cyan")
    return Group(panel, *_alarm_lines(run), _steps_table(run))


def _alarm_lines(run: RunView) -> list[Text]:
    """Returns the alarms that were not over at the end, with cause and remedy."""
    lines = [Text(f"alarm since step {a.step}: {visible(a.sentence)}", style="red") for a in last_active(run.alarms)]
    over = sum(alarm.state == "over" for alarm in run.alarms)
    return lines + ([Text(f"{over} earlier alarms are over: {FILE}", style="dim")] if over else [])


def _steps_table(run: RunView) -> RenderableType:
    if run.kind == "evaluate":
        return evaluation_table(run)
    steps = overview_steps(run)
    if run.kind == "sft" or (not steps and sft_steps(run)):
        return sft_table(run)
    if not steps:
        return Text("no step has been recorded yet", style="yellow")
    chosen = _spread([s for s in steps if s["dumped"]] or steps, OVERVIEW_ROWS)
    table = Table(title_justify="left", header_style="bold", box=None, padding=(0, 2, 0, 0))
    columns = [c for c in OVERVIEW if any(_figure(s["metrics"], c[1]) is not None for s in chosen)]
    table.add_column("step", justify="right")
    for name, *_ in columns:
        table.add_column(name, justify="right")
    table.add_column("dumped", justify="right")
    for step in chosen:
        cells = [format_value(form, _figure(step["metrics"], key)) for _, key, form in columns]
        table.add_row(str(step["step"]), *cells, str(step["dumped"] or "-"))
    note = f"{len(chosen)} of {len(steps)} recorded steps · trajectories of one: --step {chosen[-1]['step']}"
    return Group(table, Text(note, style="dim"))


def _figure(metrics: Mapping[str, float | None], key: str | Callable[..., float | None]) -> float | None:
    return key(metrics) if callable(key) else metrics.get(key)


def overview_steps(run: RunView) -> list[dict[str, Any]]:
    """Returns every recorded training step with its metrics and its number of dumped trajectories."""
    dumped: dict[int, int] = {}
    for file in run.store.files():
        dumped[file.step] = dumped.get(file.step, 0) + run.count(file)
    metrics = {row["step"]: row["metrics"] for row in run.metric_rows("train")}
    return [
        {"step": step, "dumped": dumped.get(step, 0), "metrics": metrics.get(step, {})}
        for step in sorted(metrics.keys() | dumped.keys())
    ]


def overview_json(run: RunView) -> dict[str, Any]:
    """Returns what the overview shows, as JSON."""
    return {
        "run": run.folder.name,
        "facts": dict(facts(run)),
        "summary": run.summary,
        "manifest": {} if run.manifest is None else run.manifest.model_dump(mode="json", exclude_unset=True),
        "alarms": [dataclasses.asdict(a) for a in run.alarms],
        "steps": overview_steps(run),
        "sft": sft_steps(run),
        "evaluation": run.evaluation,
    }


def _spread(items: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Returns at most `count` items, evenly spaced, first and last included."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


# --- the list ------------------------------------------------------------------------------------------------------


def listing(run: RunView, rows: Sequence[Row], total: int) -> RenderableType:
    """Returns a table with one line per trajectory, whose number `--show` takes."""
    table = Table(header_style="bold", box=None, padding=(0, 1, 0, 0))
    learned = any(row.outcome for row in rows)
    for name in ("#", "step", "problem", "sample", "", "parsed", "gold", "length"):
        side: JustifyMethod = "left" if name in ("problem", "") else "right"
        table.add_column(name, justify=side, no_wrap=name != "problem", overflow="fold")
    if learned:
        table.add_column("A", justify="right", no_wrap=True)
        table.add_column("learner", overflow="fold")
    for number, row in enumerate(rows, start=1):
        cells: list[RenderableType] = [
            str(number),
            f"{row.step}" if row.purpose == "training" else f"{row.step} {row.purpose}",
            Text(visible(row.problem_uid)),
            str(row.sample_index),
            outcome_mark(row),
            Text(visible(row.parsed_answer or "-")),
            Text(visible(spelled(row.gold_answer))),
            f"{row.length} ({row.latent})" + ("" if row.finish_reason == "stop" else f" {row.finish_reason}"),
        ]
        if learned:
            cells += [format_value("{:+.2f}", row.advantage), row.why or row.outcome or "-"]
        table.add_row(*cells)
    note = f"{len(rows)} of {total} · one in full: add --show NUMBER · all: --limit 0"
    return Group(table, Text(note, style="dim"))
