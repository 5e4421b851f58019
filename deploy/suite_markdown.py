"""A suite's report as Markdown."""

from __future__ import annotations

from deploy.suite_figures import RULES, arm_table, claim_table, facts, mass_table, seed_table, task_tables


def markdown(report: dict) -> str:
    parts = [f"# {report['title']}", ""]
    if not report["complete"]:
        parts += [f"**Incomplete**: {report['units']['finished']} of {report['units']['all']} units have finished.", ""]
    parts += [RULES, "", "## Arms", "", *_md_table(*arm_table(report)), "", "pass@1 of each seed:", ""]
    parts += [*_md_table(*seed_table(report)), ""]
    for title, header, rows in task_tables(report):
        parts += [f"Tasks of {title}:", "", *_md_table(header, rows), ""]
    if report["claims"]:
        parts += ["## Claims", "", *_md_table(*claim_table(report)), ""]
    if report["curves"]:
        parts += ["## Curves", "", "Evaluated pass@1 from the start to the last step:", ""]
        parts += [*_md_table(["arm", "from step 0 on"], _curve_rows(report)), ""]
    if report["masses"]:
        parts += ["## The last latent step", "", "Probability of what its mixture holds, noise off:", ""]
        parts += [*_md_table(*mass_table(report)), ""]
    parts += ["## Made with", "", *_md_table(["", ""], [list(pair) for pair in facts(report)]), ""]
    return "\n".join(parts)


def _curve_rows(report: dict) -> list[list[str]]:
    return [[name, " ".join(f"{p['mean']:.2f}" for p in points)] for name, points in report["curves"].items()]


def _md_table(header: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *map(line, rows)]
