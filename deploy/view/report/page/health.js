// The health panel: the watched figures, their state, and every alarm as a sentence with cause and remedy.
function alarmBanner() {
  const raised = (index.health?.watched || []).filter((rule) => rule.state === "alarm");
  if (!index.health) return null;
  if (!raised.length) return el("p", { class: "card banner fine" }, el("b", {}, "Healthy. "), `At the end, none of the ${index.health.watched.length} watched figures is beyond its limit. `, el("a", { href: "#/health" }, "Health panel"));
  return el("div", { class: "card banner alarm" }, el("b", {}, raised.length === 1 ? "One alarm at the end" : `${raised.length} alarms at the end`),
    el("ul", {}, raised.map((rule) => el("li", {}, rule.message, ". ", el("span", { class: "soft" }, `Likely cause: ${rule.cause}. What to do: ${rule.remedy}.`)))),
    el("a", { href: "#/health" }, "Health panel"));
}

function healthPage() {
  const heading = [el("h1", {}, "Health"), el("p", { class: "lead" }, "These figures show trouble early. Each is the mean over the last steps, with its limit from the section health of the settings.")];
  if (!index.health) return el("div", {}, heading, el("p", { class: "empty" }, index.no_health));
  return el("div", {}, heading,
    el("div", { class: "scroll card flush" }, el("table", { class: "watched" },
      el("thead", {}, el("tr", {}, ["", "figure", "value", "limit", "alarms in the run"].map((name) => el("th", {}, name)))),
      el("tbody", {}, index.health.watched.map((rule) => el("tr", {},
        el("td", {}, el("span", { class: "badge " + { alarm: "bad", fine: "good", unknown: "plain" }[rule.state] }, { alarm: "alarm", fine: "fine", unknown: "no data" }[rule.state])),
        el("td", {}, el("b", {}, rule.name), rule.state === "alarm" ? el("div", { class: "small" }, `${rule.message}. Likely cause: ${rule.cause}. What to do: ${rule.remedy}.`) : null),
        el("td", { class: "num" }, rule.value === null ? "–" : String(rule.value)), el("td", { class: "num" }, (rule.low ? "≥ " : "≤ ") + rule.limit), el("td", { class: "num" }, rule.raised || "–")))))),
    el("h2", {}, "Alarms of the run"),
    index.health.alarms.length ? el("ul", { class: "card alarms" }, index.health.alarms.map((alarm) => el("li", {}, el("b", {}, "step " + alarm.step), " " + alarm.sentence)))
      : el("p", { class: "empty" }, "No alarm was raised."));
}
