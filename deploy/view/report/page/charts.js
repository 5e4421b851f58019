// Plotly draws the curves. Its bundle is unpacked once, after the page is shown.
let plotly = null;

function loadPlotly() {
  plotly ||= unpacked("plotly").then((source) => {
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
    return window.Plotly;
  });
  return plotly;
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const lines = () => ["series-1", "series-2", "series-3", "series-4", "series-5", "series-6", "series-7"].map(color);
const harmless = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");  // Plotly interprets tags in names

// Plotly draws a single value, or a curve of zeros, in the middle of an axis from -1 to 1.
function rangesOf(chart) {
  const steps = new Set(chart.series.flatMap((series) => series.x));
  const tops = chart.series.flatMap((series) => series.y.map((y, i) => y + (series.error?.[i] ?? 0))).filter(Number.isFinite);
  const lows = chart.series.flatMap((series) => series.y).filter(Number.isFinite);
  const [step] = steps, top = Math.max(...tops);
  return {
    x: steps.size === 1 ? { range: [step - 1, step + 1], tickvals: [step] } : {},
    y: tops.length && Math.min(...lows) >= 0 && (steps.size === 1 || top === 0) ? { range: [0, 1.1 * top || 1] } : {},
  };
}

function layoutOf(chart) {
  const axis = { gridcolor: color("line"), zerolinecolor: color("line"), linecolor: color("line"), tickfont: { size: 11 }, automargin: true };
  const ranges = rangesOf(chart);
  const percents = chart.form === "percent" || chart.form === "stack";
  return {
    height: 210,
    margin: { l: 44, r: 10, t: 6, b: 32 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "inherit", color: color("soft"), size: 12 },
    xaxis: { ...axis, ...ranges.x, title: { text: "step", standoff: 4, font: { size: 11 } } },
    yaxis: { ...axis, type: chart.form === "log" ? "log" : "linear", exponentformat: "power",
      ...(percents ? { tickformat: ".3~%" } : {}), ...(chart.form === "log" ? { dtick: 1 } : {}),
      ...(chart.form === "stack" ? { range: [0, 1] } : chart.form === "free" || chart.form === "log" ? {} : { rangemode: "tozero", ...ranges.y }) },
    hovermode: "x unified",
    hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text") } },
    showlegend: chart.series.length > 1,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
    dragmode: "zoom",
  };
}

const MEANING = { correct: "up", wrong: "down" };  // series whose colour has a meaning

function traceOf(chart, series, i) {
  const stroke = MEANING[series.name] ? color(MEANING[series.name]) : lines()[i % lines().length];
  const few = series.x.length < 25;
  const trace = {
    type: "scatter", x: series.x, y: series.y, name: harmless(series.name),
    mode: few ? "lines+markers" : "lines", line: { color: stroke, width: series.faint ? 1 : 2 },
    opacity: series.faint ? 0.4 : 1, marker: { size: 6 },
  };
  if (series.error) trace.error_y = { type: "data", array: series.error, color: stroke, thickness: 1.2, width: 3 };
  if (chart.form === "stack") Object.assign(trace, { stackgroup: "all", mode: "lines", line: { color: stroke, width: 0.5 }, hovertemplate: "%{y:.1%}" });
  return trace;
}

async function draw(chart, target) {
  const library = await loadPlotly();
  if (!target.isConnected) return;
  const traces = chart.series.map((series, i) => traceOf(chart, series, i));
  await library.react(target, traces, layoutOf(chart), { displayModeBar: false, responsive: true });
}

// A chart is drawn when it is about to become visible, one after the other, so that the page stays responsive.
let drawing = Promise.resolve();
const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    watcher.unobserve(target);
    drawing = drawing.then(() => draw(target.chart, target)).then(() => {
      target.setAttribute("data-drawn", "");
      performance.mark("drawn");
      return new Promise((resolve) => setTimeout(resolve));
    }).catch((error) => console.error(error));
  }
}, { rootMargin: "100px" });

function chartCard(chart) {
  const target = el("div", { class: "plot" });
  target.chart = chart;
  watcher.observe(target);
  return el("section", { class: "card chart" }, el("h3", {}, chart.title), el("p", { class: "soft small" }, chart.explain), target);
}

// Draws all charts again after a change of colours.
function redrawAll() {
  for (const target of document.querySelectorAll(".plot[data-drawn]")) draw(target.chart, target);
}
