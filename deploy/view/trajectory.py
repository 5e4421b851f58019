"""The display of one trajectory in full and of two side by side (`inspect --show` and `--diff`)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from latent_grpo.common.golds import spelled
from latent_grpo.common.learner_record import REASONS
from latent_grpo.common.terminal_text import visible, visible_token
from latent_grpo.deploy.view.run_view import RunView
from latent_grpo.deploy.view.selection import Filters, InspectionError, Row
from latent_grpo.deploy.view.thoughts import (
    Thoughts,
    TokenTexts,
    as_json,
    behaviour_log_probs,
    drawn_noise,
    load,
    run_tokens,
)

BAR = 10  # characters of a weight of 1
NOISE_TOLERANCE = 1e-4  # score - log p is a difference of float32 numbers


def report_left_out(run: RunView, console: Console) -> None:
    """Prints a line for each dump that cannot be read."""
    for line in run.unreadable:
        console.print(Text(f"left out: {line}", style="yellow"))


def print_json(console: Console, content: dict[str, Any]) -> None:
    """Prints JSON, without colours."""
    console.out(json.dumps(content, indent=2, allow_nan=False), highlight=False)


def component_weighting(run: RunView) -> str:
    """Returns the weighting of a run's components (METHOD §3.1)."""
    return run.settings.get("component_weighting") or "mixture"


def format_value(form: str, value: float | None) -> str:
    """Formats a number; `-` for none."""
    return "-" if value is None or not math.isfinite(value) else form.format(value)


def outcome_mark(row: Row) -> Text:
    """Returns the verdict in colour: `✓ correct`, `✗ wrong`, `? ungraded`."""
    if row.reward is None:
        return Text("? ungraded", style="yellow")
    mark = Text("✓ correct", style="green") if row.correct else Text(f"✗ {visible(row.grade_reason)}", style="red")
    return mark.append(f" {row.reward:.3g}", style="yellow") if row.other_reward else mark


def show_trajectory(
    thoughts: Thoughts, siblings: Sequence[Thoughts], tokens: TokenTexts, weighting: str, max_thoughts: int
) -> RenderableType:
    """Returns a trajectory in full: verdict, prompt, thoughts, text, and its group's other samples."""
    t, row = thoughts.trajectory, thoughts.row
    title = Text(f"{row.purpose} step {row.step} · sample {row.sample_index} · policy version {row.version}")
    prompt = Text(visible(tokens.decode(t.prompt_ids)).replace("⏎", "⏎\n"))
    parts: list[RenderableType] = [
        Panel(prompt, title=title, subtitle=Text(visible(row.group_uid)), title_align="left", subtitle_align="right"),
        _verdict(thoughts),
        Text(),
        _thoughts_table(thoughts, tokens, weighting, max_thoughts),
        _noise_line(thoughts),
        Text(),
        Text("answer  ", style="bold").append(visible(t.response_text) or "(no visible text)", style="not bold"),
        Text(),
        group_table(siblings, tokens, row.sample_index),
    ]
    if tokens.missing:
        parts.append(Text(tokens.missing, style="yellow"))
    return Group(*parts)


def _verdict(thoughts: Thoughts) -> Text:
    t, row, record = thoughts.trajectory, thoughts.row, thoughts.record
    reward = "none" if row.reward is None else f"{row.reward:g}"
    line = Text("gold ").append(visible(spelled(row.gold_answer)), style="bold").append(" · parsed ")
    line.append(visible(row.parsed_answer or "nothing"), style="bold").append(" · ").append_text(outcome_mark(row))
    line.append(
        f" (reward {reward}) · finish {t.finish_reason} · {row.length} steps, {row.latent} latent · {visible(t.worker)}"
        f" ({t.engine}) · {row.seconds:.2f} s"
    )
    if record is None:
        return line.append("\nlearner: no record (an evaluation, or a run made before learner records existed)")
    line.append(f"\nlearner: {record.outcome}").append(
        f" ({record.reason}: {REASONS.get(record.reason, '')})" if record.reason else ""
    )
    if thoughts.taught:
        applied = "applied" if record.update_applied else "NOT applied"
        line.append(
            f" · advantage {record.advantage:+.3f} · mean log π {record.mean_old_log_prob:.3f}"
            f"{' · winner of its group' if record.winner else ''} · update {record.update_index} {applied}, "
            f"gradient norm {record.update_grad_norm:.3g}"
        )
    return line


def _thoughts_table(thoughts: Thoughts, tokens: TokenTexts, weighting: str, max_thoughts: int) -> RenderableType:
    """Returns a table of each latent step's K tokens and the hard steps, with a step's figures beside its tokens."""
    t = thoughts.trajectory
    table = Table(header_style="bold", box=None, padding=(0, 1, 0, 0))
    table.add_column("step", justify="right", style="cyan", no_wrap=True)
    table.add_column("token", no_wrap=True)
    table.add_column("weight", no_wrap=True, min_width=BAR + 5)
    table.add_column("p", justify="right", no_wrap=True)
    table.add_column("noise", justify="right", no_wrap=True)
    table.add_column("of the step", style="dim")
    behaviour = behaviour_log_probs(thoughts, weighting)
    latent, shown = len(t.latent_ids), min(len(t.latent_ids), max_thoughts)
    for i in range(shown):
        shape = f"entropy {thoughts.entropy[i]:.2f} · width {thoughts.width[i]:.1f}"
        figures = [shape, *_step_figures(thoughts, behaviour, i)]
        k = len(t.latent_ids[i])
        for line in range(max(k, len(figures))):
            cells = _component(thoughts, tokens, i, line) if line < k else ("", "", "", "")
            table.add_row(str(i + 1) if line == 0 else "", *cells, "".join(figures[line : line + 1]))
        table.add_row()
    if shown < latent:
        table.add_row("…", "", "", "", "", f"{latent - shown} more latent steps: --thoughts {latent}")
    for i, token in enumerate(t.hard_ids):
        figures = _step_figures(thoughts, behaviour, latent + i)
        p = f"{math.exp(t.hard_log_probs[i]):.3f}"
        table.add_row(str(latent + i + 1), Text(visible_token(tokens[token])), "hard", p, "", figures[0])
        for figure in figures[1:]:
            table.add_row("", "", "", "", "", figure)
    return table


def _component(thoughts: Thoughts, tokens: TokenTexts, step: int, k: int) -> tuple[RenderableType, ...]:
    t = thoughts.trajectory
    weight = float(thoughts.weights[step, k])
    bar = Text("█" * round(weight * BAR), style="magenta").append(f" {weight:.2f}", style="default")
    token = Text(visible_token(tokens[t.latent_ids[step, k]]), style="bold" if k == 0 else "")
    return token, bar, f"{math.exp(t.latent_log_probs[step, k]):.3f}", f"{thoughts.noise[step, k]:+.2f}"


def _step_figures(thoughts: Thoughts, behaviour: np.ndarray, step: int) -> list[str]:
    """Returns lines with log pi at the rollout and in the learner, and what the learner did with the step."""
    r, clip = thoughts.record, thoughts.clip(step)
    if r is None or not thoughts.taught:
        return [f"log π {behaviour[step]:.3f}"]
    lines = [
        f"log π {behaviour[step]:.3f} at the rollout",
        f"learner {r.old_log_probs[step]:.3f} → {r.new_log_probs[step]:.3f}",
        f"ratio {r.ratios[step]:.3f} · advantage {r.step_advantages[step]:+.2f}",
    ]
    special = [f"clipped ({clip})"] * bool(clip) + [f"flip {r.flip_shares[step]:.0%}"] * bool(r.flip_shares[step])
    return lines + ([" · ".join(special)] if special else [])


def _noise_line(thoughts: Thoughts) -> Text:
    drawn = drawn_noise(thoughts)
    if drawn is None:
        return Text("no noise was drawn", style="dim")
    gap = float(np.abs(drawn - thoughts.noise).max())
    if gap <= NOISE_TOLERANCE:
        return Text(f"noise = score - log p; the trajectory's key gives the same noise again (±{gap:.0e})", "dim")
    return Text(
        f"noise = score - log p differs by up to {gap:.3g} from the noise of the trajectory's key: the record and the "
        "run's settings do not belong together",
        style="red",
    )


def group_table(siblings: Sequence[Thoughts], tokens: TokenTexts, chosen: int) -> RenderableType:
    """Returns a table of the group's samples; thoughts are shown by their leading tokens."""
    table = Table(title="its group", title_justify="left", header_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("sample", "", "parsed", "length", "width", "advantage"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    table.add_column("leading tokens of its thoughts")
    for s in siblings:
        leading = " ".join(visible_token(tokens[ids[0]]) for ids in s.trajectory.latent_ids[:24])
        more = " …" if len(s.trajectory.latent_ids) > 24 else ""
        table.add_row(
            f"{'▸ ' if s.row.sample_index == chosen else ''}{s.row.sample_index}",
            outcome_mark(s.row),
            Text(visible(s.row.parsed_answer or "-")),
            str(s.row.length),
            f"{s.width.mean():.2f}" if len(s.width) else "-",
            format_value("{:+.2f}", s.row.advantage),
            Text(leading + more),
        )
    return table


def diff(
    run: RunView,
    step_a: int,
    step_b: int,
    filters: Filters,
    *,
    max_thoughts: int = 64,
    machine: bool = False,
    console: Console,
) -> None:
    """Shows the same problem at two steps, side by side.

    Without `--problem` it is one whose grade changed, or else the first.
    """
    before, after = (_by_problem(run, step, filters) for step in (step_a, step_b))
    common = [problem for problem in before if problem in after]
    if not common:
        raise InspectionError(
            f"--diff {step_a} {step_b}: no problem was dumped at both steps"
            + (f" that matches {filters}" if filters.choosing else "")
            + ". Training rarely repeats a problem, but evaluations do: set dump.evaluation=true, and compare the "
            "steps of two evaluations (0 is the one before training)"
        )
    changed = [p for p in common if before[p].correct != after[p].correct]
    became_correct = [problem for problem in changed if after[problem].correct]
    problem = (became_correct or changed or common)[0]
    pair = load(run, [before[problem], after[problem]])
    tokens, weighting = run_tokens(run), component_weighting(run)
    if machine:
        both = [as_json(thoughts, tokens, weighting) for thoughts in pair]
        counts = {"common_problems": len(common), "changed_grade": len(changed)}
        shown = {"problem": problem, **counts, "before": both[0], "after": both[1], "left_out": run.unreadable}
        print_json(console, shown)
        return
    console.print(
        Panel(
            Text(visible(tokens.decode(pair[0].trajectory.prompt_ids))),
            title=Text(visible(problem)),
            title_align="left",
        )
    )
    console.print(_side_by_side(pair, tokens, max_thoughts))
    if tokens.missing:
        console.print(Text(tokens.missing, style="yellow"))
    console.print(
        Text(
            f"{len(common)} problems at both steps: {len(became_correct)} became correct, "
            f"{len(changed) - len(became_correct)} became wrong · "
            "choose another with --problem UID",
            style="dim",
        )
    )
    report_left_out(run, console)


def _by_problem(run: RunView, step: int, filters: Filters) -> dict[str, Row]:
    """Returns the first sample of each problem at a step, of any purpose."""
    rows = run.rows(dataclasses.replace(filters, steps=((step, step),)))
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.problem_uid, row)
    return found


def _side_by_side(pair: Sequence[Thoughts], tokens: TokenTexts, max_thoughts: int) -> RenderableType:
    table = Table(header_style="bold", box=None, padding=(0, 3, 0, 0))
    table.add_column("step", justify="right", style="cyan")
    for thoughts in pair:
        row = thoughts.row
        header = Text(f"step {row.step}, version {row.version}\n").append_text(outcome_mark(row))
        header.append(f", answer {visible(row.parsed_answer or 'none')}", style="default")
        table.add_column(header)
        table.add_column("width", justify="right")
    left_out: list[int] = []
    for i in range(max(t.trajectory.num_steps for t in pair)):
        says = any(len(t.trajectory.latent_ids) <= i < t.trajectory.num_steps for t in pair)
        if i >= max_thoughts and not says:
            left_out.append(i)
            continue
        cells: list[RenderableType] = []
        for thoughts in pair:
            cells += _diff_cells(thoughts, tokens, i)
        table.add_row(str(i + 1), *cells)
    if left_out:
        table.add_row("…", f"{len(left_out)} more latent steps: --thoughts {left_out[-1] + 1}")
    return table


def _diff_cells(thoughts: Thoughts, tokens: TokenTexts, step: int) -> list[RenderableType]:
    t = thoughts.trajectory
    latent = len(t.latent_ids)
    if step >= t.num_steps:
        return ["", ""]
    if step >= latent:
        return [Text(visible_token(tokens[t.hard_ids[step - latent]])), "hard"]
    mixture = Text()
    for k, token in enumerate(t.latent_ids[step]):
        weight = float(thoughts.weights[step, k])
        if k >= 5 or weight < 0.01:
            break
        mixture.append(visible_token(tokens[token]), style="bold magenta" if weight >= 0.5 else "magenta")
        mixture.append(f" {weight:.2f}  ", style="dim")
    return [mixture, f"{thoughts.width[step]:.1f}"]
