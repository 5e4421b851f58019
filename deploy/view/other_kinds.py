"""What `inspect` shows of a Latent-SFT and of an evaluation, instead of a table of training steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from latent_grpo.common.figure_names import label, protocol_of
from latent_grpo.deploy.run.folder import FAILED, SFT_PURPOSE
from latent_grpo.deploy.view.run_view import RunView
from latent_grpo.deploy.view.trajectory import format_value

Column = tuple[str, str, str]  # title, key of a row, format
SFT_COLUMNS: tuple[Column, ...] = (
    ("loss", "loss", "{:.3f}"),
    ("KL", "kl", "{:.3f}"),
    ("cross-entropy", "cross_entropy", "{:.3f}"),
    ("held-out pass@1", "pass_at_1", "{:.3f}"),
    ("length", "chain_length", "{:.1f}"),
    ("latent", "latent_length", "{:.1f}"),
    ("invalid", "invalid_rate", "{:.1%}"),
)
EVALUATION_COLUMNS: tuple[Column, ...] = (
    ("pass@1", "pass_at_1", "{:.3f}"),
    ("length", "chain_length", "{:.1f}"),
    ("latent", "latent_length", "{:.1f}"),
    ("invalid", "invalid_rate", "{:.1%}"),
)


def sft_steps(run: RunView) -> list[dict[str, Any]]:
    """Returns the evaluated steps of Latent-SFT, and its last one, with losses and held-out figures."""
    losses = {row["step"]: row["metrics"] for row in run.metric_rows("sft")}
    held_out = {row["step"]: row["metrics"] for row in run.metric_rows("sft_evaluation")}
    dumped: dict[int, int] = {}
    for file in run.store.files(purpose=SFT_PURPOSE):
        dumped[file.step] = dumped.get(file.step, 0) + run.count(file)
    shown = sorted(held_out.keys() | ({max(losses)} if losses else set()))
    return [{"step": s, "dumped": dumped.get(s, 0), "metrics": losses.get(s, {}) | held_out.get(s, {})} for s in shown]


def sft_table(run: RunView) -> RenderableType:
    """Returns the table of :func:`sft_steps`."""
    steps = sft_steps(run)
    if not steps:
        return Text("no step of Latent-SFT has been recorded yet", style="yellow")
    rows = [
        ({"step": str(s["step"]), **s["metrics"]}, [_failures(s["metrics"]), str(s["dumped"] or "-")]) for s in steps
    ]
    note = f"samples of an evaluation: --purpose {SFT_PURPOSE} --step {steps[-1]['step']}"
    table = _table("step", SFT_COLUMNS, [row for row, _ in rows], ["failures", "dumped"], [more for _, more in rows])
    return Group(table, Text(note, style="dim"))


def label_of(task: dict[str, Any]) -> str:
    """Returns the label of a task of `evaluation.json`; files of before the protocols are of this project's."""
    return label(task["task"], task.get("protocol", "ours"), task.get("noise", "off"))


def evaluation_table(run: RunView) -> RenderableType:
    """Returns a table of an evaluation's tasks."""
    results = run.evaluation.get("tasks", [])
    if not results:
        return Text("the evaluation has no results yet", style="yellow")
    rows = [{"task": r["task"], **r} for r in results]
    more = [[f"{r['problems']:,}", f"{r['samples']:,}", protocol_of(label_of(r))] for r in results]
    table = _table("task", EVALUATION_COLUMNS, rows, ["problems", "samples", "protocol"], more)
    return Group(table, Text("trajectories: --task NAME, --failed, --correct", style="dim"))


def _table(
    name: str,
    columns: Sequence[Column],
    rows: Sequence[dict[str, Any]],
    more: Sequence[str],
    cells: Sequence[Sequence[str]],
) -> Table:
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column(name, justify="right" if name == "step" else "left")
    kept = [c for c in columns if any(row.get(c[1]) is not None for row in rows)]
    for title, *_ in kept:
        table.add_column(title, justify="right")
    for title in more:
        table.add_column(title, justify="right")
    for row, rest in zip(rows, cells, strict=True):
        table.add_row(str(row[name]), *(format_value(form, row.get(key)) for _, key, form in kept), *rest)
    return table


def _failures(metrics: dict[str, Any]) -> str:
    """`wrong 50%, no answer 5%`."""
    shares = {key.removeprefix(FAILED): value for key, value in metrics.items() if key.startswith(FAILED)}
    named = (f"{reason.replace('_', ' ')} {share:.0%}" for reason, share in shares.items())
    return ", ".join(named) or "-"
