// One trajectory in full, its group beside it, and the same problem at other policy versions.
function missing() {
  return el("div", {}, el("h1", {}, "Not in this report"),
    el("p", { class: "lead" }, "The trajectory of this address is not in the report's sample. `latent-grpo inspect` finds every dumped trajectory."),
    el("p", {}, el("a", { href: "#/trajectories" }, "All trajectories of this report")));
}

async function trajectoryPage(purpose, step, uid, sample, chosen) {
  const entry = find(purpose, step, uid, sample)[0];
  if (!entry) return missing();
  const group = await groupOf(entry), full = group.samples[entry.place];
  const picture = el("div", { tabindex: 0, "aria-label": "the response; arrow keys change the step" }), panel = el("div", { "aria-live": "polite" });
  let current = 0;
  const select = (at) => {
    current = at;
    if (!picture.querySelector(`[data-step="${at}"]`)) picture.replaceChildren(heatmap(entry, full, { selected: at, onselect: select }));
    picture.querySelectorAll(".selected").forEach((cell) => cell.classList.remove("selected"));
    picture.querySelectorAll(`[data-step="${at}"]`).forEach((cell) => cell.classList.add("selected"));
    panel.replaceChildren(stepPanel(full, at));
    history.replaceState(null, "", linkTo(entry) + "?at=" + (at + 1));
  };
  const total = full.ids.length + full.hard.length;
  const first = Math.min(Math.max(Number(chosen || 1) - 1, 0), total - 1);
  current = first;
  picture.append(heatmap(entry, full, { selected: first, onselect: select }));
  picture.addEventListener("keydown", (event) => {
    const at = current + ({ ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? 0);
    if (at === current || at < 0 || at >= total) return;
    event.preventDefault();
    select(at);
    picture.querySelector(`[data-step="${at}"]`)?.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  panel.append(total ? stepPanel(full, first) : el("p", { class: "empty" }, "This sample was interrupted before its first step."));
  return el("div", {},
    el("p", { class: "crumbs soft small" }, el("a", { href: "#/trajectories" }, "trajectories"), " › ", el("a", { href: groupLink(entry) }, entry.uid), " › sample " + entry.sample),
    el("h1", { class: "row wrap" }, badge(entry), el("span", { class: "question" }, group.question.trim())),
    el("p", { class: "lead" }, "Answered ", el("b", {}, entry.parsed ?? "nothing"), ", gold ", el("b", {}, entry.gold), `. From ${place(entry)}, policy version ${entry.version}, ${entry.length} steps, ${entry.latent} of them latent.`),
    fate(entry, full),
    neighbours(entry),
    el("h2", {}, full.ids.length ? "The thoughts" : "The response"),
    written(group),
    el("p", { class: "soft small" }, "Each column is one step; select a column to see it in full. * marks a clipped ratio."),
    el("section", { class: "card flush" }, picture),
    panel,
    texts(group, entry),
    el("h2", {}, "Its group"),
    groupTable(entry),
    elsewhere(entry));
}

function fate(entry, sample) {
  if (!sample.update) return el("p", { class: "soft" }, entry.purpose === "training" ? "This trajectory has no learner record." : "This is not a training rollout, so it has no learner record.");
  const u = sample.update;
  const parts = [{ trained: "Trained on at every step.", masked: "In the update, with its advantage set to 0 at some steps or all.", skipped: "Its update was not applied.", filtered: "Its group was not trained on." }[u.outcome] ?? u.outcome];
  if (u.reason) parts.push(`${u.reason.replace(/_/g, " ")}: ${index.reasons[u.reason] ?? ""}.`);
  if (entry.advantage !== null) parts.push(`Advantage ${signed(entry.advantage)}.`);
  if (u.winner) parts.push("Of the samples of its group with an advantage above 0 it is the most likely one, so only it trains the first step.");
  if (u.index !== null) parts.push(`Update ${u.index + 1} of the step, gradient norm ${number(u.grad_norm, 3)}.`);
  return el("p", {}, el("span", { class: "badge plain" }, "learner"), " ", parts.join(" "));
}

function neighbours(entry) {
  const at = index.trajectories.indexOf(entry), previous = index.trajectories[at - 1], next = index.trajectories[at + 1];
  return el("p", { class: "row small" }, previous ? el("a", { href: linkTo(previous) }, "◂ previous") : null, next ? el("a", { href: linkTo(next) }, "next ▸") : null);
}

function stepPanel(sample, step) {
  const latent = sample.ids.length, thought = step < latent;
  const figures = [["log π at the rollout", number(sample.rollout[step], 4)]];
  if (sample.old) figures.push(["log π old, in the learner", number(sample.old[step], 4)], ["log π new", number(sample.new[step], 4)],
    ["ratio", number(sample.ratio[step], 4) + (sample.clip[step] ? `, clipped (${sample.clip[step]})` : "")], ["advantage", signed(sample.advantage[step], 3)],
    ["share of flipped gradients", percent(sample.flip[step])]);
  if (!thought) {
    const text = tokenText(token(sample.hard[step - latent]));
    return el("section", { class: "card step" }, el("h3", {}, `Step ${step + 1}: token “${text}”`),
      el("p", { class: "soft" }, `An ordinary token, probability ${percent(Math.exp(sample.hard_logp[step - latent]), 1)} at the sampling temperature.`), facts(figures));
  }
  const weights = weightsOf(sample, step), entropy = entropyOf(weights);
  figures.unshift(["entropy of the weights", number(entropy, 3) + " nats"], ["effective width", number(Math.exp(entropy), 2) + " of " + weights.length + " tokens"],
    ["probability of these tokens together", percent(sample.logp[step].reduce((sum, p) => sum + Math.exp(p), 0), 1)]);
  return el("section", { class: "card step" }, el("h3", {}, `Step ${step + 1}: ${describe(sample, step)}`),
    el("div", { class: "two" },
      el("div", { class: "scroll" }, el("table", { class: "components" },
        el("thead", {}, el("tr", {}, ["token", "weight in the thought", "model's probability", "noise added"].map((name) => el("th", {}, name)))),
        el("tbody", {}, weights.map((w, k) => el("tr", {}, el("td", { class: "tok" }, tokenText(token(sample.ids[step][k]))),
          el("td", {}, el("span", { class: "weight" }, el("span", { style: { width: percent(w, 1).replace(" ", "") } })), " ", percent(w, 1)),
          el("td", { class: "num" }, percent(Math.exp(sample.logp[step][k]), 1)), el("td", { class: "num" }, sample.noisy ? signed(sample.noise[step][k]) : "off")))))),
      facts(figures)));
}

function texts(group, entry) {
  return el("div", { class: "two" },
    el("section", { class: "card" }, el("h3", {}, "Prompt"), el("pre", { class: "text" }, group.prompt)),
    el("section", { class: "card" }, el("h3", {}, "Visible response"), el("pre", { class: "text" }, entry.text === "" ? "(nothing)" : entry.text)));
}

function groupTable(entry) {
  const siblings = find(entry.purpose, entry.step, entry.uid);
  if (siblings.length < 2) return el("p", { class: "soft" }, "This report has no other sample of its group.");
  return el("div", {}, el("p", { class: "soft small" }, "Leading tokens of the thoughts, outlined where they differ from those of this sample."),
    el("div", { class: "list" }, siblings.map((other) => groupItem(other, entry))));
}

function groupItem(other, entry) {
  return el("a", { class: "item card" + (other === entry ? " current" : ""), href: linkTo(other) },
    el("div", { class: "row wrap small" }, el("b", {}, "sample " + other.sample), badge(other), el("span", {}, "answer ", el("b", {}, other.parsed ?? "none")),
      el("span", { class: "soft" }, other.length + " steps"), other.width === null ? null : el("span", { class: "soft" }, "width " + number(other.width)),
      other.advantage === null ? null : el("span", { class: "soft" }, "advantage " + signed(other.advantage)),
      other.why ? el("span", { class: "badge plain", title: index.reasons[other.why] ?? "" }, other.why.replace(/_/g, " ")) : null),
    strip(other, other === entry ? null : entry));
}

async function groupPage(purpose, step, uid) {
  const entries = find(purpose, step, uid);
  if (!entries.length) return missing();
  const group = await groupOf(entries[0]);
  const correct = entries.filter((entry) => entry.correct).length;
  return el("div", {}, el("p", { class: "crumbs soft small" }, el("a", { href: "#/trajectories" }, "trajectories"), " › " + uid),
    el("h1", { class: "question" }, group.question.trim()),
    el("p", { class: "lead" }, `${entries.length} samples of one prompt at ${place(entries[0])}: ${correct} correct, gold `, el("b", {}, entries[0].gold), "."),
    entries.map((entry) => el("section", { class: "card flush" },
      el("div", { class: "row wrap small pad" }, el("a", { href: linkTo(entry) }, "sample " + entry.sample), badge(entry), el("span", {}, "answer ", el("b", {}, entry.parsed ?? "none")),
        entry.advantage === null ? null : el("span", { class: "soft" }, "advantage " + signed(entry.advantage))),
      heatmap(entry, group.samples[entry.place], { compact: true }))),
    elsewhere(entries[0]));
}

const ELSEWHERE = 6;  // shown in full below a trajectory

function elsewhere(entry) {
  const others = index.trajectories.filter((e) => e.problem === entry.problem && (e.step !== entry.step || e.purpose !== entry.purpose));
  if (!others.length) return null;
  const holder = el("div", {});
  others.slice(0, ELSEWHERE).forEach(async (other) => {
    const card = el("section", { class: "card flush" });
    holder.append(card);
    const group = await groupOf(other);
    card.append(el("div", { class: "row wrap small pad" }, el("a", { href: linkTo(other) }, place(other)), el("span", { class: "soft" }, "policy version " + other.version), badge(other), el("span", {}, "answer ", el("b", {}, other.parsed ?? "none"))),
      heatmap(other, group.samples[other.place], { compact: true }));
  });
  return el("div", {}, el("h2", {}, "The same problem at other policy versions"), holder,
    others.length > ELSEWHERE ? el("a", { href: "#/trajectories?" + new URLSearchParams({ q: entry.problem }) }, "All trajectories of this problem") : null);
}
