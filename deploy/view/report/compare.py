"""Several runs in one report: their curves in the same charts, their results, and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_grpo.common.files import unwritable, write_atomically
from latent_grpo.deploy.run.progress import duration
from latent_grpo.deploy.view.report.build import page
from latent_grpo.deploy.view.report.curves import charts
from latent_grpo.deploy.view.run_view import RunView
from latent_grpo.deploy.view.selection import InspectionError
from latent_grpo.deploy.view.status import Status, status_of

FILE = "comparison.html"
NOT_SETTINGS = ("run_name", "runs_folder")  # they differ between any two runs, and decide nothing
SHARES = "stack"  # a form of charts whose curves add up to 100 %, of which two cannot lie upon each other


def write_comparison(runs: Sequence[RunView], target: Path | None = None) -> Path:
    """Writes one HTML file about several runs and returns its path, by default `comparison.html` beside the first
    one, of runs in an object store here.

    Raises InspectionError where a run is given twice, or the file cannot be written.
    """
    names = _names(runs)
    target = target or (runs[0].folder.path.parent / FILE if runs[0].url is None else Path(FILE))
    try:
        write_atomically(target, page(comparison(runs, names), [], f"{', '.join(names)} · latent-grpo report"))
    except OSError as error:
        raise InspectionError(
            f"the report {target} {unwritable(error)}; make room there, or give another file with --out"
        ) from error
    return target


def _names(runs: Sequence[RunView]) -> list[str]:
    """Returns a name for each run: its folder's, or the whole path where two folders have the same."""
    paths = [run.folder.path.resolve() for run in runs]
    if twice := {str(path) for path in paths if paths.count(path) > 1}:
        raise InspectionError(f"{', '.join(sorted(twice))} is given twice; a comparison needs different runs")
    names = [path.name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths)]


def comparison(runs: Sequence[RunView], names: Sequence[str]) -> dict[str, Any]:
    """Returns what the report's page shows of several runs; it has the keys of :func:`report.build.index`."""
    states = [status_of(run) for run in runs]
    results = [(name, _result(run, state)) for name, run, state in zip(names, runs, states)]
    notes = [f"{name}: {note}" for name, state in zip(names, states) for note in state.notes]
    alarms = [(f"alarm of {n}", f"since step {a.step}: {a.sentence}") for n, s in zip(names, states) for a in s.alarms]
    return {
        "name": " and ".join(names) if len(names) == 2 else f"{len(names)} runs",
        "compared": True,  # the page then has neither trajectories nor health
        "finished": all(run.finished for run in runs),
        "state": "; ".join(f"{name}: {run.state}" for name, run in zip(names, runs)),
        "facts": [*results, *alarms, *differing_settings(runs, names)],
        "settings": {},
        "summary": {},
        "k": None,
        "reasons": {},
        "charts": common_charts(runs, names),
        "health": None,
        "no_health": "Health and trajectories are in the report of a single run: latent-grpo report RUN.",
        "notes": notes,
        "vocabulary": [],
        "trajectories": [],
    }


def _result(run: RunView, state: Status) -> str:
    parts = [run.state]
    for name, value in (("last reward", state.reward), ("pass@1", state.pass_at_1)):
        if value is not None:
            parts.append(f"{name} {value:.3f}")
    if state.seconds_per_step is not None:
        parts.append(f"{duration(state.seconds_per_step)} a step")
    if "minutes" in run.summary:
        parts.append(f"{run.summary['minutes']:g} minutes")
    return ", ".join(parts)


def differing_settings(runs: Sequence[RunView], names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the settings that are not the same in all runs: (key, `a: 0.1 · b: 0.2`)."""
    flat = [_flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    found = []
    for key in keys:
        values = [settings.get(key, "absent") for settings in flat]
        if key not in NOT_SETTINGS and any(value != values[0] for value in values):
            found.append((key, " · ".join(f"{name}: {value}" for name, value in zip(names, values))))
    return found


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Returns `{"optimizer.lr": 0.1}` for `{"optimizer": {"lr": 0.1}}`; lists have numbers for keys."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        return {prefix: "null" if node is None else node}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def common_charts(runs: Sequence[RunView], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a chart for every curve of the single reports, with a line for each run that has it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, run in zip(names, runs):
        for chart in charts(run):
            if chart["form"] == SHARES:
                continue
            for series in _lasting(chart["series"]):
                several = len(_lasting(chart["series"])) > 1
                title = f"{chart['title']}: {series['name']}" if several else chart["title"]
                key = (chart["title"], series["name"] if several else "")
                empty = {"title": title, "explain": chart["explain"], "form": chart["form"], "series": []}
                found.setdefault(key, empty)["series"].append({**series, "name": name})
    return list(found.values())


def _lasting(series: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out the faint curve of single steps where there is a smoothed one."""
    return [one for one in series if not one.get("faint")]
