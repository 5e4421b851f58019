// Characters that control, reorder or hide text are shown as codes; line ends stay.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const plain = (text) => text.replace(UNSEEN, (c) => "⟨" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");

// Every text reaches the page through this function, as a text node: a model's text is shown, never interpreted.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : name === "title" ? plain(value) : value);
  }
  const shown = children.flat(3).filter((child) => child !== null && child !== undefined && child !== false);
  node.append(...shown.map((child) => (child instanceof Node ? child : plain(String(child)))));
  return node;
}

const byId = (id) => document.getElementById(id);

function number(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 10 ** -digits) return value.toExponential(1);
  return value.toFixed(digits);
}

const signed = (value, digits = 2) => (value > 0 ? "+" : "") + number(value, digits);
const percent = (value, digits = 0) => (value === null || value === undefined ? "–" : (100 * value).toFixed(digits) + " %");

// A token with visible spaces and line ends.
const tokenText = (text) => (text === "" ? "∅" : plain(text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥")));

function badge(entry) {
  if (entry.reward === null) return el("span", { class: "badge unsure" }, "ungraded");
  const word = entry.correct
    ? el("span", { class: "badge good" }, "correct")
    : el("span", { class: "badge bad" }, entry.grade.replace(/_/g, " "));
  // a reward that the verifier's word does not imply: partial, shaped, below 0
  return entry.other ? el("span", { class: "row" }, word, el("span", { class: "badge unsure" }, "reward " + number(entry.reward, 3))) : word;
}

const place = (entry) => (entry.purpose === "training" ? "" : entry.purpose.replace(/_/g, " ") + " · ") + "step " + entry.step;
