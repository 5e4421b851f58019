"""The commands `inspect` and `report`, which read a run without changing it and share their filters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latent_grpo.common.terminal_text import TextConsole

reading = typer.Typer()
MATCHES = 20  # listed without --limit
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its URL.")]
Step = Annotated[list[str] | None, typer.Option(help="Only this step, or this range: 10-40. May be repeated.")]
Purpose = Annotated[str | None, typer.Option(help="Only this purpose: training, evaluation, ...; default: all.")]
Task = Annotated[str | None, typer.Option(help="Only tasks whose name contains this text.")]
Failed = Annotated[bool, typer.Option("--failed", help="Only trajectories that the verifier does not call correct.")]
Correct = Annotated[bool, typer.Option("--correct", help="Only trajectories that the verifier calls correct.")]
Reason = Annotated[
    str | None,
    typer.Option(help="Only this reason, of the grade, the finish or the learner: wrong, length, masked, ..."),
]
Group = Annotated[str | None, typer.Option(help="Only groups whose uid contains this text.")]
Problem = Annotated[str | None, typer.Option(help="Only problems whose uid contains this text.")]
Sample = Annotated[int | None, typer.Option("--sample-index", help="Only this sample of each group.")]
MinLength = Annotated[int | None, typer.Option(help="Fewest response steps, latent and hard together.")]
MaxLength = Annotated[int | None, typer.Option(help="Most response steps, latent and hard together.")]
Sort = Annotated[
    str, typer.Option(help="Order: step, length, latent, reward, seconds, advantage; -length: descending.")
]
Lineage = Annotated[int | None, typer.Option(help="Lineage of a resumed run; default: its live history.")]


@reading.command()
def inspect(
    run: RunArgument,
    step: Step = None,
    purpose: Purpose = None,
    task: Task = None,
    failed: Failed = False,
    correct: Correct = False,
    reason: Reason = None,
    group: Group = None,
    problem: Problem = None,
    sample_index: Sample = None,
    min_length: MinLength = None,
    max_length: MaxLength = None,
    sort: Sort = "step",
    lineage: Lineage = None,
    show: Annotated[int | None, typer.Option(help="Show the match of this number in full.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help=f"Most matches to list; default: {MATCHES}; 0: all.")] = None,
    thoughts: Annotated[int, typer.Option(min=1, help="Most latent steps to show in full.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
    diff: Annotated[tuple[int, int] | None, typer.Option(help="Compare one problem at these two steps.")] = None,
) -> None:
    """Shows a run in the terminal: its steps, its trajectories, and what the model thought in one of them."""
    from latent_grpo.deploy.view import inspect as overview
    from latent_grpo.deploy.view.run_view import open_run
    from latent_grpo.deploy.view.selection import Filters, InspectionError, parse_steps
    from latent_grpo.deploy.view.trajectory import diff as compare

    ignored = {"--step": step or None, "--show": show, "--limit": limit}
    given = [option for option, value in ignored.items() if value is not None]
    if diff is not None and given:
        raise InspectionError(
            f"--diff and {given[0]} exclude each other: --diff names both steps itself; choose the problem to compare "
            "with --problem UID"
        )
    filters = Filters(
        steps=parse_steps(step or []), purpose=purpose, task=task, failed=failed, correct=correct, reason=reason,
        group=group, problem=problem, sample_index=sample_index, min_length=min_length, max_length=max_length,
        sort=sort, lineage=lineage,
    )  # fmt: skip
    view, console = open_run(run), TextConsole()
    if diff is not None:
        compare(view, *diff, filters, max_thoughts=thoughts, machine=json, console=console)
    else:
        limit = MATCHES if limit is None else limit
        overview.inspect(view, filters, show=show, limit=limit, max_thoughts=thoughts, machine=json, console=console)


@reading.command()
def report(
    run: Annotated[list[str], typer.Argument(metavar="RUN...", help="A run's folder or URL; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; default: report.html in the run's folder, comparison.html beside runs (of URLs: here)."
        ),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Most trajectories in the report.")] = 1000,
    step: Step = None,
    purpose: Purpose = None,
    task: Task = None,
    failed: Failed = False,
    correct: Correct = False,
    reason: Reason = None,
    group: Group = None,
    problem: Problem = None,
    min_length: MinLength = None,
    max_length: MaxLength = None,
    lineage: Lineage = None,
) -> None:
    """Writes one HTML file about a run: curves, health, and trajectories to browse offline; or about several runs."""
    from latent_grpo.deploy.view.report.build import write_report
    from latent_grpo.deploy.view.report.compare import write_comparison
    from latent_grpo.deploy.view.run_view import open_run
    from latent_grpo.deploy.view.selection import Filters, InspectionError, parse_steps

    filters = Filters(
        steps=parse_steps(step or []), purpose=purpose, task=task, failed=failed, correct=correct, reason=reason,
        group=group, problem=problem, min_length=min_length, max_length=max_length, lineage=lineage,
    )  # fmt: skip
    views = [open_run(folder) for folder in run]
    if len(views) > 1 and filters.choosing:
        raise InspectionError(f"{filters}: filters choose trajectories, which a report of several runs does not have")
    path = write_report(views[0], out, filters, sample) if len(views) == 1 else write_comparison(views, out)
    TextConsole(highlight=False, soft_wrap=True).print(f"report {path} ({path.stat().st_size / 2**20:.1f} MB)")


Machine = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]


@reading.command()
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's folder or URL; default: the newest one in runs/.")
    ] = None,
    json: Machine = False,
) -> None:
    """Says what a run does: its step, pace, time left and alarms, from its files alone, while it goes on or after."""
    from latent_grpo.deploy.view import status as reading_status
    from latent_grpo.deploy.view.run_view import open_run
    from latent_grpo.deploy.view.trajectory import print_json

    found = reading_status.status_of(open_run(run or reading_status.newest_run(Path("runs")), ()))
    if json:
        print_json(TextConsole(), found.as_json())
    else:
        reading_status.show(found, TextConsole(highlight=False))


@reading.command()
def runs(
    folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="The folder or URL that runs are in.")] = "runs",
    json: Machine = False,
) -> None:
    """Lists the runs of a folder: which of them go on, how far they are, at what pace, and with which alarms."""
    from latent_grpo.deploy.view import status as reading_status
    from latent_grpo.deploy.view.trajectory import print_json

    found = reading_status.all_statuses(folder)
    if json:
        print_json(TextConsole(), {"runs": [one.as_json() for one in found]})
    else:
        reading_status.show_all(found, TextConsole(highlight=False))
