"""The commands `latent-grpo status [RUN]` and `latent-grpo runs [FOLDER]`: what runs, how far it is, and its alarms.

Everything is read from the run's files and its lock, so any terminal that sees the folder can ask, on any machine,
while the run goes on or long after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from latent_grpo.common.errors import LatentGRPOError
from latent_grpo.common.remote_url import is_url
from latent_grpo.common.terminal_text import visible
from latent_grpo.deploy.run.folder import in_use
from latent_grpo.deploy.run.health import Alarm, last_active
from latent_grpo.deploy.run.progress import Pace, duration, end_of
from latent_grpo.deploy.run.storage.copy import remote_runs
from latent_grpo.deploy.run.storage.lease import held_by
from latent_grpo.deploy.run.storage.store import Store
from latent_grpo.deploy.run.storage.twin import read_twin
from latent_grpo.deploy.view.run_view import RunView, open_run
from latent_grpo.deploy.view.selection import InspectionError
from latent_grpo.deploy.view.trajectory import format_value

STATE_STYLES = {"running": "green", "finished": "", "stopped": "yellow", "unreadable": "red"}
COPY_LATE_S = 120.0  # by which the copy of a running run may be behind: eight passes of its upload
LATE = 5.0  # steps that take so many times as long as usual are said


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a run does now. Numbers are None where the run has not measured them."""

    run: str
    folder: str
    kind: str  # train, sft or evaluate
    state: Literal["running", "finished", "stopped", "unreadable"]
    phase: str = ""  # RL, Latent-SFT or evaluation
    step: int = 0
    steps: int = 0  # wanted in this phase; Latent-SFT may end before
    lineage: int = 0  # times that it was resumed
    seconds_per_step: float | None = None  # of the last steps
    left_s: float | None = None  # of this phase; None unless it is running
    last_step_s: float | None = None  # seconds since its last step was recorded
    reward: float | None = None  # of the last step
    pass_at_1: float | None = None  # of the newest evaluation, mean over its tasks
    alarms: tuple[Alarm, ...] = ()  # that last
    notes: tuple[str, ...] = ()  # what is odd, and what could not be read

    def as_json(self) -> dict[str, Any]:
        """Returns the status as JSON."""
        return dataclasses.asdict(self)


def status_of(view: RunView, now: float | None = None) -> Status:
    """Returns the status of an open run at a time in seconds since 1970, by default now.

    Raises InspectionError and MetricsError where its files cannot be read.
    """
    now = time.time() if now is None else now
    holder, notes = _holder(view)
    notes += _copy_notes(view, running=holder is not None, now=now)
    state: Literal["running", "finished", "stopped"]
    state = "running" if holder else "finished" if view.finished else "stopped"
    phase, kind, steps = _phase(view)
    rows = view.metric_rows(kind)
    clock = [now]
    pace = Pace(steps, "steps", lambda: clock[0])
    for row in _last_lineage(rows):
        clock[0] = float(row["time"])
        pace.advance(row["step"])
    clock[0] = now
    since = max(now - float(rows[-1]["time"]), 0.0) if rows else None
    each = pace.seconds_each
    if state == "running" and each and since is not None and since > LATE * each + 60.0:
        notes.append(f"no step for {duration(since)}, while one took {duration(each)}: an evaluation, or it is stuck")
    return Status(
        run=view.folder.name, folder=view.url or str(view.folder.path), kind=view.kind, state=state, phase=phase,
        step=rows[-1]["step"] if rows else 0, steps=steps, lineage=int(view.identity.get("lineage", 0)),
        seconds_per_step=each, left_s=pace.left_s if state == "running" else None, last_step_s=since,
        reward=rows[-1]["metrics"].get("rollout/reward") if rows else None, pass_at_1=_pass_at_1(view),
        alarms=tuple(last_active(view.alarms)),
        notes=(*notes, *view.unreadable),
    )  # fmt: skip


def _holder(view: RunView) -> tuple[str | None, list[str]]:
    """Returns who writes into the run, and a note where that cannot be found out."""
    if view.url is not None:
        return held_by(Store(view.url)), []
    try:
        return in_use(view.folder.path), []
    except OSError as error:
        return None, [f"whether it runs cannot be told: its lock cannot be read ({error.strerror})"]


def _copy_notes(view: RunView, *, running: bool, now: float) -> list[str]:
    """Says where a run's copy in an object store is behind: by more than a few passes of its upload, or at its end."""
    twin = None if view.url is not None else read_twin(view.folder.path)
    recorded = [float(rows[-1]["time"]) for kind in ("train", "sft") if (rows := view.metric_rows(kind))]
    if twin is None or not twin.snapshots or not recorded or (twin.written_at or 0.0) >= max(recorded):
        return []  # without snapshots the folder is behind, and not the copy
    age = "was never whole" if twin.written_at is None else f"is {duration(now - twin.written_at)} old"
    if running:
        late = now - (twin.written_at or min(recorded)) > COPY_LATE_S
        return [f"its copy {twin.url} {age}: read the run's log for why its upload fails"] if late else []
    return [f"its copy {twin.url} {age} and lacks the last steps: latent-grpo push {view.folder.path}"]


def _phase(view: RunView) -> tuple[str, str, int]:
    """Returns the phase that a run is in, the kind of its metrics, and the number of its steps."""
    warm = view.settings.get("warm_start") or {}
    started = bool(view.metric_rows("train"))
    if view.kind == "evaluate":
        return "evaluation", "evaluation", 0
    if view.kind == "sft" or (not started and view.metric_rows("sft") and not view.finished):
        return "Latent-SFT", "sft", int(warm.get("max_steps", 0))
    return "RL", "train", view.wanted_steps


def _last_lineage(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the steps since the last restart: what lies before it was not this session's time."""
    return [row for row in rows if row["lineage"] == rows[-1]["lineage"]]


def _pass_at_1(view: RunView) -> float | None:
    for row in reversed(view.metric_rows("evaluation") or view.metric_rows("sft_evaluation")):
        metrics = row["metrics"].items()
        scores = [v for name, v in metrics if name.rpartition("/")[2] == "pass_at_1" and v is not None]
        if scores:
            return sum(scores) / len(scores)
    return None


def newest_run(root: Path) -> Path:
    """Returns the run below a folder that was written to last. Raises InspectionError where there is none."""
    return _runs(root)[0]


def all_statuses(root: str | Path, now: float | None = None) -> list[Status]:
    """Returns the status of every run in a folder, the one written to last first; of an object store's by their names.

    A run that cannot be read is in it with the reason. Raises InspectionError where the folder has none.
    """
    if is_url(str(root)):
        if not (urls := remote_runs(str(root))):
            raise InspectionError(f"{root} has no run in it; `latent-grpo train runs_folder={root}` makes one")
        return [_status_or_reason(url, now) for url in urls]
    return [_status_or_reason(path, now) for path in _runs(Path(root))]


def _status_or_reason(path: str | Path, now: float | None) -> Status:
    try:
        return status_of(open_run(path, ()), now)
    except Exception as error:  # whatever one run's files hold, the others are listed
        why = str(error) if isinstance(error, LatentGRPOError | OSError) else f"damaged files: {error!r:.100}"
        return Status(run=str(path).rpartition("/")[2], folder=str(path), kind="", state="unreadable", notes=(why,))


def _runs(root: Path) -> list[Path]:
    if not root.is_dir():
        raise InspectionError(f"{root}: no such folder; give the folder that runs are in (setting runs_folder)")
    try:
        found = [path for path in root.iterdir() if _has_run(path)]
    except OSError as error:
        raise InspectionError(f"{root} cannot be read: {error.strerror}; ask its owner for the right to") from error
    if not found:
        raise InspectionError(f"{root} has no run in it; `latent-grpo train` makes one, in the folder runs_folder")
    return sorted(found, key=_written, reverse=True)


def _has_run(folder: Path) -> bool:
    """Whether a folder has a run in it, or may have: one that this user may not enter is listed as unreadable."""
    try:
        return all((folder / name).exists() for name in ("config.json", "run.json"))
    except OSError:
        return True


def _written(run: Path) -> float:
    """When a run was written to, in seconds since 1970; one that this user may not enter comes after all others."""
    times = [0.0]
    for name in ("metrics.jsonl", "run.json"):
        with contextlib.suppress(OSError):
            times.append((run / name).stat().st_mtime)
    return max(times)


# --- for people ----------------------------------------------------------------------------------------------------


def show(status: Status, console: Console) -> None:
    """Prints one run's status, a fact per line."""
    grid = Table.grid(padding=(0, 2))
    state = Text(status.state, style=STATE_STYLES[status.state])
    rows: list[tuple[str, RenderableType]] = [("state", state), ("step", _progress(status))]
    if status.seconds_per_step is not None:
        rows.append(("pace", f"{duration(status.seconds_per_step)} a step"))
    if status.left_s is not None:
        rows.append(("left", f"{duration(status.left_s)}, until {end_of(status.left_s)}"))
    if status.last_step_s is not None:
        rows.append(("last step", f"{duration(status.last_step_s)} ago"))
    if status.reward is not None:
        rows.append(("reward", f"{status.reward:.3f}"))
    if status.pass_at_1 is not None:
        rows.append(("pass@1", f"{status.pass_at_1:.3f}"))
    if status.lineage:
        rows.append(("resumed", f"{status.lineage} times"))
    for name, value in rows:
        grid.add_row(Text(name, style="dim"), value if isinstance(value, Text) else Text(str(value)))
    alarms = [Text(f"alarm since step {a.step}: {visible(a.sentence)}", style="red") for a in status.alarms]
    notes = [Text(visible(note), style="yellow") for note in status.notes]
    console.print(Text(visible(status.folder), style="bold"), Group(grid, *alarms, *notes))


def show_all(statuses: Sequence[Status], console: Console) -> None:
    """Prints a line for each run, and below them what is wrong with which."""
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("step", "pace", "left", "reward", "pass@1", "alarms"):
        table.add_column(name, justify="right", no_wrap=name != "step")
    for status in statuses:
        each, left = status.seconds_per_step, status.left_s
        table.add_row(
            Text(visible(status.run)),
            Text(status.state, style=STATE_STYLES[status.state]),
            _progress(status),
            "-" if each is None else duration(each),
            "-" if left is None else duration(left),
            format_value("{:.3f}", status.reward),
            format_value("{:.3f}", status.pass_at_1),
            Text(str(len(status.alarms)) if status.alarms else "-", style="red" if status.alarms else ""),
        )
    console.print(table)
    for status in statuses:
        for line in (*(f"alarm since step {a.step}: {a.message}" for a in status.alarms), *status.notes):
            console.print(Text(visible(f"{status.run}: {line}"), style="yellow"), soft_wrap=True)


def _progress(status: Status) -> str:
    if status.state == "unreadable" or status.kind == "evaluate":
        return "-" if status.state == "unreadable" else "evaluation"
    return f"{status.phase} {status.step:,}/{status.steps:,}"
