/** The page: which view is shown, the theme, and the dialog that asks for a key. */

import { Session } from "./session.js";
import { askView } from "./views/ask.js";
import { healthView } from "./views/health.js";
import { taskView } from "./views/task.js";
import { tasksView } from "./views/tasks.js";
import { teachView } from "./views/teach.js";

/** @param {string} id */
const get = (id) => /** @type {any} */ (document.getElementById(id));
const main = get("main");

const session = new Session(askForKey, (known) => (get("forget").hidden = !known));
const page = { session, announce };
const views = {
  ask: askView(page),
  teach: teachView(page),
  tasks: tasksView(page),
  task: taskView(page),
  health: healthView(page),
};
/** @type {any} */
let shown = null;

for (const view of Object.values(views)) {
  view.root.hidden = true;
  main.append(view.root);
}

/** Says something to those who do not see it appear. */
function announce(/** @type {string} */ text) {
  const live = get("live");
  live.textContent = "";
  setTimeout(() => (live.textContent = text), 50); // the same words twice are said twice
}

/** @returns {{view: any, name: string, nav: string, version: string}} */
function route() {
  const [, first = "", second] = location.hash.split("/");
  const [nav = "", query = ""] = first.split("?");
  const task = nav === "tasks" && second ? decoded(second) : "";
  if (task) return { view: views.task, name: task, nav, version: "" };
  const asked = new URLSearchParams(query);
  const [name, version] = [asked.get("task") ?? "", asked.get("version") ?? ""];
  const known = ["teach", "tasks", "health"].includes(nav) ? /** @type {"teach" | "tasks" | "health"} */ (nav) : "ask";
  return { view: views[known], name, nav: known, version };
}

/**
 * A name out of an address; empty where it is none.
 *
 * @param {string} text
 */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return ""; // a % that begins no character
  }
}

/** @param {boolean} moved Whether the reader went there, rather than opened the page. */
function show(moved) {
  const { view, name, nav, version } = route();
  if (shown && shown !== view) {
    shown.root.hidden = true;
    shown.leave?.();
  }
  shown = view;
  view.root.hidden = false;
  view.enter?.(name, version);
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === `#/${nav}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const heading = view.root.querySelector("h1");
  document.title = `${heading.textContent} – abmll`;
  if (!moved) return;
  window.scrollTo(0, 0);
  heading.tabIndex = -1;
  heading.focus();
}

/**
 * @param {string} reason Why the last key was refused; empty without one.
 * @returns {Promise<string | null>}
 */
function askForKey(reason) {
  const dialog = get("key-dialog");
  get("key-reason").textContent = reason;
  get("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue || null);
    dialog.returnValue = "";
    get("key-cancel").onclick = () => dialog.close("");
    get("key-form").onsubmit = (/** @type {Event} */ event) => {
      event.preventDefault();
      const key = get("key").value.trim();
      get("key").value = "";
      dialog.close(key);
    };
  });
}

const system = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : system.matches;
}

function showTheme() {
  get("theme").setAttribute("aria-pressed", String(isDark()));
}

get("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // Then it holds until the page is left.
  }
  showTheme();
});
system.addEventListener("change", showTheme);
get("forget").addEventListener("click", () => {
  session.use(null);
  location.reload(); // what it had opened goes with it
});
get("skip").addEventListener("click", (/** @type {Event} */ event) => {
  event.preventDefault(); // the address names the view
  main.focus();
});
addEventListener("hashchange", () => show(true));
showTheme();
show(false);
