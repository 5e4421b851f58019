// Addresses, themes, and the start of the page.
const TABS = [["#/", "Overview"], ["#/trajectories", "Trajectories"], ["#/health", "Health"], ["#/settings", "Settings"]];

async function pageOf(path, query) {
  const parts = path.split("/").slice(1).map(decodeURIComponent);
  if (parts[0] === "trajectories") return trajectoriesPage(query);
  if (parts[0] === "trajectory" && parts.length === 5) return trajectoryPage(...parts.slice(1), query.get("at"));
  if (parts[0] === "group" && parts.length === 4) return groupPage(...parts.slice(1));
  if (parts[0] === "health") return healthPage();
  if (parts[0] === "settings") return settingsPage();
  return overviewPage();
}

async function navigate() {
  const [path, query] = (location.hash.slice(1) || "/").split("?");
  let shown;
  try {
    shown = await pageOf(path, new URLSearchParams(query));
  } catch (error) {
    shown = el("p", { class: "empty" }, "This address could not be opened: " + error.message);
    console.error(error);
  }
  byId("view").replaceChildren(shown);
  const section = path.split("/")[1];
  byId("tabs").querySelectorAll("a").forEach((tab) => tab.toggleAttribute("aria-current",
    tab.getAttribute("href") === (path === "/" ? "#/" : section.startsWith("traj") || section === "group" ? "#/trajectories" : "#/" + section)));
  window.scrollTo(0, 0);
  document.documentElement.dataset.ready = path;
  performance.mark("ready");
}

const remembered = (value) => {
  try {  // a page from a file may have no storage
    if (value !== undefined) localStorage.setItem("latent-grpo-theme", value);
    return localStorage.getItem("latent-grpo-theme");
  } catch { return null; }
};

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = { light: "☀ light", dark: "☾ dark", system: "◐ auto" }[theme];
  byId("theme").dataset.theme = theme;
}

function nextTheme() {
  const order = ["system", "light", "dark"];
  const theme = order[(order.indexOf(byId("theme").dataset.theme) + 1) % order.length];
  remembered(theme);
  setTheme(theme);
  redrawAll();
}

async function start() {
  setTheme(["light", "dark"].includes(remembered()) ? remembered() : "system");
  byId("theme").addEventListener("click", nextTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redrawAll());
  index = JSON.parse(await unpacked("index"));
  byId("name").textContent = index.name;
  byId("tabs").append(...TABS.slice(0, index.compared ? 1 : undefined).map(([href, name]) => el("a", { href }, name)));
  window.addEventListener("hashchange", navigate);
  await navigate();
}

start().catch((error) => {
  byId("view").replaceChildren(el("p", { class: "empty" }, "The report could not be opened: " + error.message));
  console.error(error);
});
