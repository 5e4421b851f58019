"""A suite's report as one self-contained HTML file, with plotly's script packed inside."""

from __future__ import annotations

import base64
import gzip
import html
import json
from functools import lru_cache
from typing import Any

from latent_grpo.deploy.reproduce.figures import (
    CurvePoint,
    MassPoint,
    SuiteReport,
    arm_table,
    claim_table,
    facts,
    mass_table,
    rules,
    seed_table,
    task_tables,
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; }
th, td { border-bottom: 1px solid #ddd; padding: 4px 10px; text-align: left; vertical-align: top; }
th { background: #f5f5f5; }
.reproduced { color: #1a7f37; font-weight: 600; }
.not-reproduced { color: #b42318; font-weight: 600; }
.not-testable-here { color: #6b7280; }
"""
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")

DRAW = """
(async () => {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const script = document.createElement("script");
  script.textContent = text;
  document.head.append(script);
  for (const [id, figure] of Object.entries(JSON.parse(document.getElementById("figures").textContent)))
    Plotly.newPlot(id, figure.data, figure.layout, { displaylogo: false, responsive: true });
})();
"""


def page(report: SuiteReport) -> str:
    """Returns the whole file as text."""
    body = [f"<h1>{html.escape(report.title)}</h1>"]
    if not report.complete:
        body.append(f"<p><b>Incomplete</b>: {report.units.finished} of {report.units.all} units.</p>")
    body += [f"<p>{html.escape(rules(report))}</p>", "<h2>Arms</h2>", _html_table(*arm_table(report))]
    body += ["<h2>Each seed</h2>", _html_table(*seed_table(report))]
    if tables := task_tables(report):
        body.append("<h2>Each task</h2>")
        body += [f"<h3>{html.escape(title)}</h3>{_html_table(header, rows)}" for title, header, rows in tables]
    if report.claims:
        body += ["<h2>Claims</h2>", _html_table(*claim_table(report), verdict=2)]
    figures = {}
    for number, (title, figure) in enumerate(_plots(report)):
        figure.update_layout(template="none", margin={"t": 20, "b": 50}).update_yaxes(automargin=True)
        figures[f"plot{number}"] = json.loads(figure.to_json())
        body.append(f"<h2>{html.escape(title)}</h2><div id='plot{number}'></div>")
    if report.masses:
        body.append(_html_table(*mass_table(report)))
    body += ["<h2>Made with</h2>", _html_table(["", ""], [list(pair) for pair in facts(report)])]
    data = json.dumps(figures).replace("<", "\\u003c")  # no text in it can end the element
    body.append(f"<script type='application/json' id='figures'>{data}</script>")
    body.append(f"<script type='application/gzip' id='plotly'>{_plotly()}</script><script>{DRAW}</script>")
    head = f"<meta charset='utf-8'><title>{html.escape(report.title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


@lru_cache(maxsize=1)
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _html_table(header: list[str], rows: list[list[str]], verdict: int | None = None) -> str:
    def cell(index: int, text: str) -> str:
        kind = f" class='{text.replace(' ', '-')}'" if index == verdict else ""
        return f"<td{kind}>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = ("<tr>" + "".join(cell(i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _plots(report: SuiteReport) -> list[tuple[str, Any]]:
    import plotly.graph_objects as go

    plots = []
    if report.arms:
        plots.append(("pass@1 of the arms", _bars(go, report)))
    if report.curves:
        plots.append(("pass@1 during training (band: lowest to highest seed)", _bands(go, report.curves)))
    if report.masses:
        plots.append(("Probability of what the last latent step holds", _mass_lines(go, report.masses)))
    return plots


def _bars(go: Any, report: SuiteReport) -> Any:
    rows = list(reversed(report.arms))
    values = [row.metrics["pass_at_1"] for row in rows]
    above = [0.0 if v.high is None else v.high - v.mean for v in values]
    below = [0.0 if v.low is None else v.mean - v.low for v in values]
    figure = go.Figure(
        go.Bar(
            x=[v.mean for v in values],
            y=[row.title for row in rows],
            orientation="h",
            error_x={"type": "data", "symmetric": False, "array": above, "arrayminus": below},
            marker_color=["#c7c7c7" if row.is_start else COLORS[0] for row in rows],
        )
    )
    return figure.update_layout(
        xaxis={"title": "pass@1", "range": [0, 1]}, height=90 + 34 * len(rows), margin={"t": 20}
    )


def _bands(go: Any, curves: dict[str, list[CurvePoint]]) -> Any:
    figure = go.Figure()
    for index, (name, points) in enumerate(curves.items()):
        color, steps = COLORS[index % len(COLORS)], [p.step for p in points]
        figure.add_scatter(
            x=[*steps, *reversed(steps)],
            y=[*(p.high for p in points), *(p.low for p in reversed(points))],
            fill="toself", fillcolor=color, opacity=0.15, line={"width": 0}, hoverinfo="skip", showlegend=False,
            legendgroup=name,
        )  # fmt: skip
        figure.add_scatter(x=steps, y=[p.mean for p in points], name=name, legendgroup=name, line={"color": color})
    return figure.update_layout(xaxis={"title": "step"}, yaxis={"title": "pass@1", "range": [0, 1]}, height=480)


def _mass_lines(go: Any, masses: dict[str, list[MassPoint]]) -> Any:
    figure = go.Figure()
    for index, (name, points) in enumerate(masses.items()):
        for kind, dash in (("answer", "solid"), ("other_numbers", "dot"), ("fillers", "dash")):
            figure.add_scatter(
                x=[p.step for p in points], y=[getattr(p, kind) for p in points],
                name=f"{name}: {kind.replace('_', ' ')}",
                line={"color": COLORS[index % len(COLORS)], "dash": dash},
            )  # fmt: skip
    return figure.update_layout(xaxis={"title": "step"}, yaxis={"title": "probability"}, height=480)
