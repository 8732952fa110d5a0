/** The view of one task: its versions, which of them answers, and how far its confidence held. */

import { h, mayMoveFocus, table } from "../elements.js";
import { moment, percent } from "../figures.js";
import { inWords } from "../session.js";
import { curves } from "./curves.js";
import { deletion } from "./deletion.js";
import { recalibration } from "./recalibration.js";
import { servingForm } from "./serving.js";

/** @param {{session: import("../session.js").Session, announce: (text: string) => void}} page */
export function taskView(page) {
  const { session } = page;
  const title = h("h1", {}, "Task");
  const body = h("div", { class: "stack" });
  let name = "";

  /** @param {string} wanted */
  async function enter(wanted) {
    leave();
    name = wanted;
    title.textContent = name;
    ask.href = `#/ask?task=${encodeURIComponent(name)}`;
    body.replaceChildren(h("p", { class: "empty" }, "Reading the task."));
    try {
      show(await session.call((client) => client.task(wanted)));
    } catch (error) {
      if (name !== wanted) return;
      body.replaceChildren(h("p", { class: "trouble", role: "alert" }, inWords(error)));
    }
  }

  /**
   * @param {import("../../js/abmll.js").TaskInfo} task
   * @param {string} [focused] What has the focus then, by a selector: the control that had it is made anew.
   * @param {string} [note] What there is to say of the newest version.
   */
  function show(task, focused, note) {
    if (task.task !== name) return; // the reader has gone on
    const near = mayMoveFocus(body);
    const held = h("div", { class: "stack" });
    const global = task.task === "global";
    body.replaceChildren(
      h(
        "div",
        { class: "panel versions", tabindex: -1 },
        history(task),
        note && h("p", {}, note),
        task.error && h("p", { class: "trouble" }, inWords(task.error)),
      ),
      ...(global ? [] : [servingForm(task, page, show)]),
      h("section", { class: "panel" }, h("h2", {}, "How far its confidence held"), versions(task, held), held),
      ...(global ? [] : [deletion(task, page, show)]),
    );
    if (task.status === "ready" && task.version !== null) judge(task.version, held);
    if (focused && near) body.querySelector(focused)?.focus();
  }

  /**
   * @param {import("../../js/abmll.js").TaskInfo} task
   * @param {HTMLElement} held
   */
  function versions(task, held) {
    const usable = task.versions.filter(({ status }) => status === "ready");
    if (usable.length < 2) return null;
    const choose = h("select", { id: "judged-version" }, ...usable.map(({ version }) => h("option", {}, `${version}`)));
    choose.value = `${task.version}`;
    choose.addEventListener("change", () => judge(Number(choose.value), held));
    return h("div", { class: "field short" }, h("label", { for: "judged-version" }, "Version"), choose);
  }

  /**
   * @param {number} version
   * @param {HTMLElement} held
   */
  async function judge(version, held) {
    held.dataset.version = `${version}`;
    held.replaceChildren(h("p", { class: "empty" }, `Reading how far version ${version} held.`));
    try {
      const { validation, feedback } = await session.call((client) => client.reliability(name, { version }));
      if (held.dataset.version !== `${version}`) return; // the reader has chosen another
      held.replaceChildren(
        curves("On validation tasks", validation, "Not known: the calibration of this version keeps no curves."),
        curves(
          "By feedback",
          feedback,
          "Nothing yet: none of its answers has been judged. Texts that are not calibrated do not count.",
        ),
        ...(feedback === null || name === "global" ? [] : [recalibration(name, version, page, show)]),
      );
    } catch (error) {
      if (held.dataset.version !== `${version}`) return;
      held.replaceChildren(h("p", { class: "trouble", role: "alert" }, inWords(error)));
    }
  }

  // A dialog out of sight would keep everything else from being used.
  function leave() {
    for (const dialog of body.querySelectorAll("dialog[open]")) dialog.close();
  }

  const ask = h("a", {}, "Ask it");
  const back = h("p", { class: "back" }, h("a", { href: "#/tasks" }, "All tasks"), " · ", ask);
  return { root: h("section", {}, back, title, body), enter, leave };
}

/** @param {import("../../js/abmll.js").TaskInfo} task */
function history({ versions, serving, version: answering, calibrated, base_model: base }) {
  const share = (/** @type {number} */ version) => {
    if (serving === null) return version === answering ? "answers, as the newest" : "";
    const part = serving[version];
    return part ? `answers ${percent(part, 0)}` : "";
  };
  const rows = [...versions]
    .reverse()
    .map((one) => [
      `${one.version}`,
      one.status === "damaged" ? `damaged: ${one.error}` : share(one.version),
      one.shots === null ? "–" : `${one.shots}`,
      h("time", {}, moment(one.created)),
      one.id === null ? "–" : h("code", {}, one.id),
    ]);
  const state = calibrated ? "calibrated" : "not calibrated";
  const caption = `Versions, newest first; ${state}, over ${base ?? "an unknown model"}`;
  return table(caption, ["Version", "Answers", "Examples", "Made", "Hash"], rows);
}
