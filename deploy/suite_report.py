"""The report of a suite: one set of figures as report.json, report.md and report.html (its plots need no network).

results ─► suite_figures ─┬─► report.json
                          ├─► suite_markdown ─► report.md
                          └─► suite_page ─────► report.html
"""

from __future__ import annotations

import json
from pathlib import Path

from deploy.results import read_result
from deploy.run_folder import write_atomically
from deploy.suite import Suite, unit_folder, units
from deploy.suite_figures import figures
from deploy.suite_markdown import markdown
from deploy.suite_page import page


def write_report(suite: Suite, folder: Path) -> tuple[Path, Path, Path]:
    """From the units that have finished: report.md, report.html, report.json."""
    found = {
        (unit.name, unit.seed): result
        for unit in units(suite)
        if (result := read_result(unit_folder(folder, unit))) is not None
    }
    report = figures(suite, found, json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    paths = tuple(folder / f"report.{kind}" for kind in ("md", "html", "json"))
    for path, text in zip(paths, (markdown(report), page(report), json.dumps(report, indent=1) + "\n"), strict=True):
        write_atomically(path, text)
    return paths
