// The first page: the result of the run, an example of a thought, and the curves.
function overviewPage() {
  const example = exampleEntry();
  const holder = el("div", {});
  if (example) groupOf(example).then((group) => holder.replaceChildren(lesson(example, group)));
  return el("div", {},
    el("h1", {}, index.compared ? "How these runs went" : "How this run went"),
    el("p", { class: "lead" }, verdict()),
    index.compared ? null : tiles(),
    alarmBanner(),
    holder,
    el("h2", {}, "Curves"),
    index.charts.length ? el("div", { class: "grid" }, index.charts.map(chartCard))
      : el("p", { class: "empty" }, "No metrics have been recorded yet."),
    el("h2", {}, index.compared ? "The runs, and the settings that differ" : "The run"),
    facts(index.facts),
    notes());
}

function scores(tag) {
  const found = Object.entries(index.summary[tag] || {}).filter(([key]) => key.endsWith("/pass_at_1"));
  return new Map(found.map(([key, value]) => [key.slice(0, -"/pass_at_1".length), value]));
}

// A label of `common/figure_names.py` with the protocol that it stands for.
function titled(label) {
  const at = label.lastIndexOf("/reference");
  if (at < 0) return `${label} (protocol ours)`;
  return `${label.slice(0, at)} (protocol reference, noise ${label.endsWith("-noise") ? "on" : "off"})`;
}

function verdict() {
  const before = scores("before"), after = scores("after");
  const parts = [...after].filter(([task]) => before.has(task)).map(([task, value]) =>
    `pass@1 on ${titled(task)} went from ${percent(before.get(task), 1)} to ${percent(value, 1)}`);
  return (parts.length ? parts.join("; ") + ". " : "") + index.state[0].toUpperCase() + index.state.slice(1) + ".";
}

function tiles() {
  const last = (title, name) => {
    const series = index.charts.find((chart) => chart.title === title)?.series.find((s) => !name || s.name === name);
    return series ? series.y.at(-1) : null;
  };
  const before = [...scores("before").values()][0], after = [...scores("after").values()][0];
  const found = [
    ["pass@1", after ?? last("pass@1"), (v) => percent(v, 1), before !== undefined && after !== undefined ? `${signed(100 * (after - before), 1)} points in this run` : "noise off"],
    ["reward", last("Reward"), (v) => number(v, 3), "last step, noise on"],
    ["chain length", last("Chain length"), (v) => number(v, 1), last("Chain length", "latent steps") === null ? "response steps" : `${number(last("Chain length", "latent steps"), 1)} of them latent`],
    ["thought width", last("Width of the thoughts"), (v) => number(v, 2), `effective tokens, of ${index.k}`],
    ["invalid", last("Invalid rate"), (v) => percent(v, 1), "cut off by the budget"],
    ["log-prob gap", last("Log-prob gap", "mean"), (v) => v.toExponential(1), "learner and rollout"],
  ];
  return el("div", { class: "tiles" }, found.filter(([, value]) => value !== null && value !== undefined).map(([name, value, form, note]) =>
    el("div", { class: "card tile" }, el("div", { class: "soft small" }, name), el("div", { class: "figure" }, form(value)), el("div", { class: "soft small" }, note))));
}

// The trajectory that explains the display: correct, of the newest policy, without noise if there is one, with the most
// varied and then the narrowest thoughts.
function exampleEntry() {
  const good = index.trajectories.filter((e) => e.correct && e.finish === "stop" && e.latent > 2);
  if (!good.length) return index.trajectories.find((e) => e.latent > 0);
  const newest = Math.max(...good.map((e) => e.version));
  const variety = (e) => new Set(e.lead.slice(0, 24)).size;
  return good.filter((e) => e.version >= newest - 1)
    .sort((a, b) => (b.purpose === "evaluation") - (a.purpose === "evaluation") || variety(b) - variety(a) || a.width - b.width)[0];
}

function lesson(entry, group) {
  const sample = group.samples[entry.place];
  return el("section", { class: "card lesson" },
    el("h2", {}, "What the model thought: an example"),
    el("p", {}, "This model does not write its chain of thought down. It thinks in ", el("b", {}, "latent steps"),
      `: at each of them it selects ${index.k} likely tokens, mixes their embeddings by weight, and takes the mixture as its next input. Below is one whole response, from left to right. `,
      "Each column is one step, with its strongest token on top; the darker a cell, the larger that token's share of the thought. Then the model leaves latent mode and writes the answer in ordinary tokens (outlined)."),
    taught(),
    el("p", { class: "question" }, el("span", { class: "soft" }, "problem  "), group.question),
    heatmap(entry, sample, { compact: true }),
    written(group),
    el("p", { class: "soft" }, narrative(sample)),
    el("p", {}, el("a", { href: linkTo(entry) }, "Open this response"), " · ", el("a", { href: "#/trajectories" }, "Browse all " + index.trajectories.length.toLocaleString("en"))));
}

// The meaning of a column for a model that had a latent warm start.
function taught() {
  const { warm_start: start, tasks } = index.settings;
  if (start?.chain !== "latent") return null;
  const arithmetic = tasks?.find((task) => task.path === "builtin:chain_arithmetic");
  return el("p", {}, `Its warm start put every ${start.compression} consecutive tokens of a written chain of thought into one step. A column therefore holds such tokens, in any order`,
    arithmetic ? `: a piece of “a + b = c ;”. The chain is computed from left to right, every result modulo ${arithmetic.options?.modulus ?? 11}.` : ".");
}

const written = (group) => group.written ? el("p", {}, "Written out, the correct chain of thought is ", el("span", { class: "question" }, group.written), " Its tokens should appear in the columns.") : null;

// The first thoughts in words.
function narrative(sample) {
  const told = [];
  for (let step = 0; step < Math.min(3, sample.ids.length); step++) told.push(`Step ${step + 1}: ${describe(sample, step)}`);
  return told.join(" ");
}

function describe(sample, step) {
  const weights = weightsOf(sample, step);
  const name = (k) => "“" + tokenText(token(sample.ids[step][k])) + "”";
  const order = weights.map((_, k) => k).sort((a, b) => weights[b] - weights[a]);
  if (weights[order[0]] >= 0.8) return `almost only ${name(order[0])} (${percent(weights[order[0]])}).`;
  const width = Math.exp(entropyOf(weights));
  if (width > 0.85 * weights.length && weights.length > 3) return `nearly equal weights on ${weights.length} tokens, the largest on ${name(order[0])} (${percent(weights[order[0]])}).`;
  const shown = order.filter((k) => weights[k] >= 0.1).slice(0, 3);
  const names = shown.map((k) => `${name(k)} (${percent(weights[k])})`);
  return "a mixture of " + (names.length > 1 ? names.slice(0, -1).join(", ") + " and " + names.at(-1) : names[0]) + ".";
}

function facts(pairs) {
  return el("dl", { class: "card facts" }, pairs.map(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
}

function notes() {
  return index.notes.length ? el("section", { class: "card notes" }, el("h3", {}, "What this report leaves out"), el("ul", {}, index.notes.map((note) => el("li", {}, note)))) : null;
}

function settingsPage() {
  return el("div", {}, el("h1", {}, "Settings"),
    el("p", { class: "lead" }, "The resolved settings of the run, every default included (config.json)."),
    el("pre", { class: "card code" }, JSON.stringify(index.settings, null, 2)));
}
