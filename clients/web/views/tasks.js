/** The view that lists the tasks. */

import { h, table } from "../elements.js";
import { moment } from "../figures.js";
import { inWords } from "../session.js";

/** @param {{session: import("../session.js").Session}} page */
export function tasksView({ session }) {
  const list = h("div", { class: "panel" }, h("p", { class: "empty" }, "Reading the tasks."));

  async function enter() {
    try {
      const tasks = await session.call((client) => client.tasks());
      list.replaceChildren(listed(tasks));
    } catch (error) {
      const again = h("button", { type: "button", onclick: enter }, "Try again");
      list.replaceChildren(h("p", { class: "trouble", role: "alert" }, inWords(error)), again);
    }
  }
  return { root: h("section", {}, h("h1", {}, "Tasks"), list), enter };
}

/** @param {import("../../js/abmll.js").TaskSummary[]} tasks */
function listed(tasks) {
  const rows = tasks.map((task) => [
    h("a", { href: `#/tasks/${encodeURIComponent(task.task)}` }, task.task),
    `${task.version}`,
    task.shots === null ? "–" : `${task.shots}`,
    task.status === "damaged" ? "damaged" : task.calibrated ? "calibrated" : "not calibrated",
    h("time", {}, moment(task.created)),
  ]);
  const hint = h(
    "p",
    { class: "hint" },
    "Nothing is taught yet. ",
    h("a", { href: "#/teach" }, "Teach the first task"),
    ".",
  );
  const columns = ["Task", "Version", "Examples", "Confidence", "Made"];
  return h(
    "div",
    {},
    table("All tasks, with the version that answers; every task begins as global", columns, rows),
    tasks.length < 2 && hint,
  );
}
