"""The builder of a report: it packs a run's data and the page's program into one HTML file."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from latent_grpo.common.config import ConfigError
from latent_grpo.common.errors import MetricsError
from latent_grpo.common.files import unwritable, write_atomically
from latent_grpo.common.learner_record import REASONS
from latent_grpo.common.store import DumpError
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.view.report.curves import charts
from latent_grpo.deploy.view.report.panel import panel
from latent_grpo.deploy.view.report.sample import Sample, sample
from latent_grpo.deploy.view.run_facts import facts
from latent_grpo.deploy.view.run_view import RunView, open_run
from latent_grpo.deploy.view.selection import Filters, InspectionError
from latent_grpo.deploy.view.thoughts import run_tokens

FILE = "report.html"
SAMPLE = 1000  # trajectories, unless told otherwise
QUICK_BYTES = 12 * 2**20  # up to this size of trajectory dumps, a report is written within a second or two
PARTS = ("dom", "data", "charts", "overview", "health", "browse", "heatmap", "trajectory", "start")
"""The page's program: files of page/ in the order in which they are loaded."""


def write_report(run: RunView, target: Path | None = None, filters: Filters | None = None, limit: int = SAMPLE) -> Path:
    """Writes the report and returns its path (`report.html` in the run's folder unless given; of a run in an
    object store `NAME.html` here).

    A run without dumps gives a report without trajectories that says so; a filter without a match is an error.
    Raises InspectionError and DumpError.
    """
    made = _sample(run, filters or Filters(), limit)
    target = target or (run.folder.path / FILE if run.url is None else Path(f"{run.folder.name}.html"))
    try:
        write_atomically(target, page(index(run, made), made.groups, f"{run.folder.name} · latent-grpo report"))
    except OSError as error:
        raise InspectionError(
            f"the report {target} {unwritable(error)}; make room there, or give another file with --out"
        ) from error
    return target


def report_note(folder: RunFolder, quick_bytes: int = QUICK_BYTES) -> str:
    """Returns the last line of `train`: the report, or the command for it if dumps exceed `quick_bytes`."""
    look = f"in the terminal: latent-grpo inspect {folder.path}"
    size = sum(file.stat().st_size for file in folder.trajectories.rglob("*.parquet"))
    if size > quick_bytes:
        return f"report: latent-grpo report {folder.path} ({size / 2**20:,.0f} MB of dumps to read) · {look}"
    try:
        path = write_report(open_run(folder.path))
    except (ConfigError, DumpError, MetricsError) as error:  # the run itself is complete
        return f"no report was written: {error}"
    return f"report {path} (open it in a browser) · {look}"


def _sample(run: RunView, filters: Filters, limit: int) -> Sample:
    try:
        rows = run.rows(filters)
    except (InspectionError, DumpError) as error:
        if filters.choosing:
            raise
        return Sample(notes=[f"No trajectories: {error}."])
    return sample(run, rows, limit, run_tokens(run), run.settings.get("component_weighting") or "mixture")


def index(run: RunView, made: Sample) -> dict[str, Any]:
    """Returns what the page needs at once; groups are unpacked when they are shown."""
    health, no_health = panel(run)
    return {
        "name": run.folder.name,
        "finished": run.finished,
        "state": run.state,
        "facts": facts(run),
        "settings": run.settings,
        "summary": run.summary,
        "k": run.settings.get("k"),
        "reasons": REASONS,
        "charts": charts(run),
        "health": health,
        "no_health": no_health,
        "notes": [*made.notes, *(f"Left out: {line}." for line in run.unreadable)],  # the panel's reading among them
        "vocabulary": made.vocabulary,
        "trajectories": made.trajectories,
    }


# --- the file ------------------------------------------------------------------------------------------------------


def page(index: dict[str, Any], groups: list[dict[str, Any]], title: str) -> str:
    """Returns the whole file as text. The same data give the same bytes."""
    files = resources.files("latent_grpo.deploy.view.report") / "page"
    program = "\n".join((files / f"{part}.js").read_text(encoding="utf-8") for part in PARTS)
    program = f'"use strict";\n(() => {{\n{program}\n}})();'
    plotly, plotly_hash = _plotly()
    policy = (
        f"default-src 'none'; script-src {_hash(program)} {plotly_hash}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    packed = [_packed("index", json.dumps(index)), *(_packed(f"g{i}", json.dumps(g)) for i, g in enumerate(groups))]
    parts = {
        "title": html.escape(title),
        "policy": policy,
        "style": (files / "style.css").read_text(encoding="utf-8"),
        "data": "\n".join([*packed, plotly]),
        "program": program,
    }
    whole = (files / "index.html").read_text(encoding="utf-8")
    head, *rest = whole.split("{{")
    return head + "".join(parts[name] + text for name, text in (piece.split("}}", 1) for piece in rest))


@lru_cache(maxsize=1)
def _plotly() -> tuple[str, str]:
    """Returns the JavaScript of Plotly's Python package, packed, and its hash for the page's policy."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    return _packed("plotly", source), _hash(source)


def _packed(name: str, text: str) -> str:
    """Compresses a text and encodes it in base64, so that nothing in it can end the element that holds it."""
    data = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
    return f'<script type="application/gzip" id="{name}">{data}</script>'


def _hash(program: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(program.encode()).digest()).decode() + "'"
