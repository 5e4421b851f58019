// A response as a table with one column per step and one row per token rank; below, the figures of each step.
const WINDOW = 200;  // steps in the table at a time

function heatmap(entry, sample, { compact = false, selected = -1, onselect = null } = {}) {
  const latent = sample.ids.length, total = latent + sample.hard.length;
  const holder = el("div", { class: "heat-holder" });
  const show = (start) => {
    const end = Math.min(start + WINDOW, total);
    const steps = Array.from({ length: end - start }, (_, i) => start + i);
    const table = el("table", { class: "heat" + (compact ? " compact" : ""), "aria-label": "latent steps by token rank, colour is weight" },
      el("thead", {}, el("tr", {}, el("th", { class: "side" }, "step"), steps.map((step) => el("th", { class: step === selected ? "selected" : "", "data-step": step }, step + 1)))),
      el("tbody", {}, rankRows(sample, steps, selected), compact ? null : figureRows(sample, steps, selected)));
    if (onselect) table.addEventListener("click", (event) => {
      const cell = event.target.closest("[data-step]");
      if (cell) onselect(Number(cell.dataset.step));
    });
    const pager = total > WINDOW ? el("div", { class: "row soft small" },
      el("button", { type: "button", disabled: start === 0, onclick: () => show(start - WINDOW) }, "◂ earlier"),
      `steps ${start + 1} to ${end} of ${total}`,
      el("button", { type: "button", disabled: end === total, onclick: () => show(start + WINDOW) }, "later ▸")) : null;
    holder.replaceChildren(...[pager, el("div", { class: "scroll" }, table)].filter(Boolean));
  };
  show(selected > 0 ? Math.floor(selected / WINDOW) * WINDOW : 0);
  return holder;
}

function rankRows(sample, steps, selected) {
  const latent = sample.ids.length, ranks = latent ? sample.ids[0].length : 1;
  const weights = new Map(steps.filter((step) => step < latent).map((step) => [step, weightsOf(sample, step)]));
  const order = new Map([...weights].map(([step, w]) => [step, w.map((_, k) => k).sort((a, b) => w[b] - w[a])]));
  return Array.from({ length: ranks }, (_, rank) => el("tr", {}, el("th", { class: "side" }, rank === 0 ? "strongest" : rank + 1),
    steps.map((step) => {
      if (step >= latent) return rank === 0 ? hardCell(sample, step, ranks, selected) : null;
      const k = order.get(step)[rank], w = weights.get(step)[k], text = tokenText(token(sample.ids[step][k]));
      return el("td", {
        class: "cell" + (step === selected ? " selected" : "") + (w > 0.7 ? " strong" : ""), "data-step": step, style: { "--w": w.toFixed(3) },
        title: `step ${step + 1}: “${text}” has ${percent(w, 1)} of the thought; the model gave it probability ${percent(Math.exp(sample.logp[step][k]), 1)}` + (sample.noisy ? `, noise added ${signed(sample.noise[step][k])}` : ""),
      }, el("span", { class: "tok" }, text), el("span", { class: "pct" }, percent(w)));
    })));
}

function hardCell(sample, step, ranks, selected) {
  const i = step - sample.ids.length, text = tokenText(token(sample.hard[i]));
  return el("td", { class: "hard" + (step === selected ? " selected" : ""), rowspan: ranks, "data-step": step, title: `step ${step + 1}: token “${text}”, probability ${percent(Math.exp(sample.hard_logp[i]), 1)}` },
    el("span", { class: "tok" }, text), el("span", { class: "pct" }, percent(Math.exp(sample.hard_logp[i]))));
}

function figureRows(sample, steps, selected) {
  const latent = sample.ids.length, k = latent ? sample.ids[0].length : 1;
  const figure = (name, hint, of) => el("tr", { class: "figures" }, el("th", { class: "side", title: hint }, name), steps.map((step) => {
    const [text, style, cls] = of(step);
    return el("td", { "data-step": step, class: (cls || "") + (step === selected ? " selected" : ""), style }, text);
  }));
  const rows = [];
  if (latent) rows.push(figure("width", "effective number of tokens in the thought: exp(entropy)", (step) => {
    if (step >= latent) return ["", {}];
    const width = Math.exp(entropyOf(weightsOf(sample, step)));
    return [number(width, 1), { "--h": k > 1 ? (width - 1) / (k - 1) : 0 }, "level"];
  }));
  if (sample.advantage) {
    const largest = Math.max(...sample.advantage.map((a) => Math.abs(a ?? 0)), 1e-9);
    rows.push(figure("advantage", "above 0: training makes the step more likely; below 0: less likely; 0: no gradient", (step) => {
      const a = sample.advantage[step];
      return [a === 0 ? "0" : signed(a, 1), { "--a": Math.abs(a ?? 0) / largest }, a > 0 ? "up" : a < 0 ? "down" : "none"];
    }));
    rows.push(figure("ratio", "new probability over old when the step's update was computed", (step) => [number(sample.ratio[step]) + (sample.clip[step] ? "*" : ""), {}, sample.clip[step] ? "clipped" : ""]));
  }
  return rows;
}
