"""The report of a suite: one set of figures as report.json, report.md and report.html (its plots need no network).

results ─► figures ─┬─► report.json
                    ├─► markdown (here) ─► report.md
                    └─► page ────────────► report.html
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from latent_grpo.common.files import write_atomically
from latent_grpo.deploy.reproduce.figures import (
    SuiteReport,
    arm_table,
    claim_table,
    facts,
    figures,
    mass_table,
    rules,
    seed_table,
    task_tables,
)
from latent_grpo.deploy.reproduce.manifest import read_manifest
from latent_grpo.deploy.reproduce.page import page
from latent_grpo.deploy.reproduce.results import read_result
from latent_grpo.deploy.reproduce.suite import Suite, unit_folder, units


def write_report(suite: Suite, folder: Path) -> tuple[Path, Path, Path]:
    """Writes report.md, report.html and report.json from the units that have finished."""
    found = {
        (unit.name, unit.seed): result
        for unit in units(suite)
        if (result := read_result(unit_folder(folder, unit))) is not None
    }
    report = figures(suite, found, read_manifest(folder))
    paths = (folder / "report.md", folder / "report.html", folder / "report.json")
    for path, text in zip(
        paths, (markdown(report), page(report), json.dumps(dataclasses.asdict(report), indent=1) + "\n"), strict=True
    ):
        write_atomically(path, text)
    return paths


def markdown(report: SuiteReport) -> str:
    """Returns the report as Markdown."""
    parts = [f"# {report.title}", ""]
    if not report.complete:
        parts += [f"**Incomplete**: {report.units.finished} of {report.units.all} units have finished.", ""]
    parts += [rules(report), "", "## Arms", "", *_md_table(*arm_table(report)), "", "pass@1 of each seed:", ""]
    parts += [*_md_table(*seed_table(report)), ""]
    for title, header, rows in task_tables(report):
        parts += [f"Tasks of {title}:", "", *_md_table(header, rows), ""]
    if report.claims:
        parts += ["## Claims", "", *_md_table(*claim_table(report)), ""]
    if report.curves:
        parts += ["## Curves", "", "Evaluated pass@1 from the start to the last step:", ""]
        parts += [*_md_table(["arm", "from step 0 on"], _curve_rows(report)), ""]
    if report.masses:
        parts += ["## The last latent step", "", "Probability of what its mixture holds, noise off:", ""]
        parts += [*_md_table(*mass_table(report)), ""]
    parts += ["## Made with", "", *_md_table(["", ""], [list(pair) for pair in facts(report)]), ""]
    return "\n".join(parts)


def _curve_rows(report: SuiteReport) -> list[list[str]]:
    return [[name, " ".join(f"{p.mean:.2f}" for p in points)] for name, points in report.curves.items()]


def _md_table(header: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *map(line, rows)]
