// The list of trajectories. Its whole state is in the address, so that every selection has a link.
const PAGE = 40;
const NO_FILTER = { q: "", purpose: "", step: "", task: "", grade: "", reason: "", min: "", max: "", sort: "run", n: String(PAGE) };
const SORTS = {
  run: ["order of the run", () => 0],
  newest: ["newest first", (a, b) => b.step - a.step],
  longest: ["longest first", (a, b) => b.length - a.length],
  shortest: ["shortest first", (a, b) => a.length - b.length],
  widest: ["widest thoughts first", (a, b) => (b.width ?? -1) - (a.width ?? -1)],
  narrowest: ["narrowest thoughts first", (a, b) => (a.width ?? Infinity) - (b.width ?? Infinity)],
  advantage: ["largest advantage first", (a, b) => (b.advantage ?? -Infinity) - (a.advantage ?? -Infinity)],
};

const reasonsOf = (entry) => [entry.grade, entry.finish, entry.outcome, entry.why].filter(Boolean);

function searchable(entry) {
  entry.searchable ||= [entry.question, entry.text, entry.gold, entry.parsed ?? "", entry.problem, entry.uid, leadingTokens(entry).join(" ")].join("\n").toLowerCase();
  return entry.searchable;
}

function matches(entry, f) {
  return (!f.purpose || entry.purpose === f.purpose) && (!f.step || entry.step === Number(f.step)) && (!f.task || entry.task === f.task) &&
    (!f.grade || (f.grade === "correct") === entry.correct) && (!f.reason || reasonsOf(entry).includes(f.reason)) &&
    (!f.min || entry.length >= Number(f.min)) && (!f.max || entry.length <= Number(f.max)) &&
    (!f.q || f.q.toLowerCase().split(/\s+/).every((word) => searchable(entry).includes(word)));
}

function trajectoriesPage(query) {
  const f = { ...NO_FILTER, ...Object.fromEntries(query) };
  const results = el("div", {});
  const unique = (of) => [...new Set(index.trajectories.flatMap(of))];
  const refresh = () => {
    const set = Object.entries(f).filter(([key, value]) => value !== NO_FILTER[key]);
    history.replaceState(null, "", "#/trajectories" + (set.length ? "?" + new URLSearchParams(set) : ""));
    results.replaceChildren(...list(f, refresh));
  };
  const change = (key) => (event) => { f[key] = event.target.value; f.n = String(PAGE); refresh(); };
  const choice = (key, label, values, any) => el("label", {}, label, el("select", { name: key, onchange: change(key) },
    any === undefined ? null : el("option", { value: "" }, any),
    values.map(([value, text]) => el("option", { value, selected: String(value) === f[key] }, text))));
  const plainChoice = (key, label, values, any) => choice(key, label, values.map((v) => [v, String(v).replace(/_/g, " ")]), any);
  const length = (key, label) => el("label", {}, label, el("input", { type: "number", min: 0, name: key, value: f[key], oninput: change(key) }));
  results.replaceChildren(...list(f, refresh));
  return el("div", {}, el("h1", {}, "Trajectories"),
    el("form", { class: "card filters", onsubmit: (event) => event.preventDefault() },
      el("label", { class: "wide" }, "Search", el("input", { type: "search", name: "q", value: f.q, placeholder: "question, answer, thought, problem …", oninput: change("q") })),
      plainChoice("grade", "Grade", ["correct", "failed"], "any"),
      plainChoice("step", "Step", unique((e) => e.step).sort((a, b) => a - b), "all"),
      plainChoice("purpose", "Purpose", unique((e) => e.purpose), "all"),
      plainChoice("task", "Task", unique((e) => e.task), "all"),
      plainChoice("reason", "Reason", unique(reasonsOf).sort(), "any"),
      length("min", "Length from"), length("max", "to"),
      choice("sort", "Order", Object.entries(SORTS).map(([key, [text]]) => [key, text]))),
    results);
}

function list(f, refresh) {
  const found = index.trajectories.filter((entry) => matches(entry, f));
  if (!index.trajectories.length) return [el("p", { class: "empty" }, "This report holds no trajectories."), notes()].filter(Boolean);
  if (!found.length) return [el("p", { class: "empty" }, `None of the ${index.trajectories.length.toLocaleString("en")} trajectories in this report matches.`)];
  found.sort(SORTS[f.sort]?.[1] ?? SORTS.run[1]);
  const count = Number(f.n) || PAGE;
  const correct = found.filter((entry) => entry.correct).length;
  return [
    el("p", { class: "soft", id: "count" }, `${found.length.toLocaleString("en")} of ${index.trajectories.length.toLocaleString("en")} trajectories · ${percent(correct / found.length)} correct`),
    el("div", { class: "list" }, found.slice(0, count).map(listItem)),
    found.length > count ? el("button", { type: "button", class: "more", onclick: () => { f.n = String(count + PAGE); refresh(); } }, `Show ${Math.min(PAGE, found.length - count)} more`) : null,
  ].filter(Boolean);
}

function listItem(entry) {
  return el("a", { class: "item card", href: linkTo(entry) },
    el("div", { class: "row wrap spread" },
      el("span", { class: "row grow" }, badge(entry), el("span", { class: "question one" }, entry.question.trim())),
      el("span", { class: "soft small row wrap" },
        el("span", {}, "answer ", el("b", {}, entry.parsed ?? "none"), " · gold ", el("b", {}, entry.gold)),
        el("span", {}, place(entry)), el("span", {}, "sample " + entry.sample), el("span", {}, entry.length + " steps"),
        entry.width === null ? null : el("span", {}, "width " + number(entry.width)),
        entry.advantage === null ? null : el("span", {}, "advantage " + signed(entry.advantage)),
        entry.finish === "stop" ? null : el("span", { class: "badge bad" }, entry.finish))),
    strip(entry));
}

// The leading token of each thought; the darker, the larger its weight.
function strip(entry, against) {
  if (!entry.lead.length) return el("div", { class: "strip soft small" }, "no latent steps");
  const cells = entry.lead.map((place, step) => {
    const other = against && against.lead[step] !== place;
    return el("span", { class: "cell" + (other ? " other" : ""), style: { "--w": entry.share[step] / 100 }, title: `step ${step + 1}: ${tokenText(token(place))} ${entry.share[step]} %` }, tokenText(token(place)));
  });
  return el("div", { class: "strip" }, cells, entry.latent > entry.lead.length ? el("span", { class: "soft" }, "…") : null);
}
