/** Deletes a task, or a version that does not answer, once the reader has said so twice. */

import { field, h, newId } from "../elements.js";
import { inWords } from "../session.js";

/**
 * @param {import("../../js/abmll.js").TaskInfo} task
 * @param {{session: import("../session.js").Session, announce: (text: string) => void}} page
 * @param {(task: import("../../js/abmll.js").TaskInfo, focused: string) => void} changed Shows the task anew.
 */
export function deletion({ task: name, versions, serving, version: answering }, { session, announce }, changed) {
  const newest = Math.max(...versions.map(({ version }) => version));
  const answers = serving === null ? [`${answering}`] : Object.keys(serving);
  const spare = versions.map(({ version }) => version).filter((one) => one !== newest && !answers.includes(`${one}`));
  const which = h("select", {}, ...spare.map((version) => h("option", {}, `${version}`)));
  const ofVersion = confirmation(
    () => `Delete version ${which.value} of ${name}?`,
    "Its calibration and what was said of its answers go with it. This cannot be undone.",
    async () => {
      const version = Number(which.value);
      await session.call((client) => client.deleteVersion(name, version));
      changed(await session.call((client) => client.task(name)), ".versions");
      announce(`Version ${version} of ${name} is deleted.`);
    },
  );
  const ofTask = confirmation(
    () => `Delete ${name}?`,
    "All its versions go, with their calibration. This cannot be undone.",
    async () => {
      await session.call((client) => client.deleteTask(name));
      location.hash = "#/tasks";
      announce(`${name} is deleted.`);
    },
  );
  const button = (/** @type {string} */ text, /** @type {any} */ dialog) =>
    h("button", { type: "button", class: "danger", onclick: dialog.open }, text);
  return h(
    "section",
    { class: "panel stack" },
    h("h2", {}, "Delete"),
    ...(spare.length === 0
      ? []
      : [
          h("div", { class: "row" }, field("A version that does not answer", which), button("Delete it", ofVersion)),
          ofVersion.root,
        ]),
    h("div", { class: "row" }, button(`Delete ${name}`, ofTask)),
    ofTask.root,
  );
}

/**
 * A dialog that asks before it acts, and says what went wrong.
 *
 * @param {() => string} question
 * @param {string} warning
 * @param {() => Promise<void>} act
 */
function confirmation(question, warning, act) {
  const title = newId();
  const heading = h("h2", { id: title });
  const trouble = h("p", { class: "trouble", role: "alert", hidden: true });
  const keep = h("button", { type: "button", onclick: () => root.close() }, "Keep it");
  const remove = h("button", { type: "button", class: "danger" }, "Delete for good");
  const buttons = h("div", { class: "row" }, keep, remove);
  const root = h("dialog", { "aria-labelledby": title }, heading, h("p", {}, warning), trouble, buttons);
  remove.addEventListener("click", async () => {
    try {
      await act();
      root.close();
    } catch (error) {
      trouble.textContent = inWords(error);
      trouble.hidden = false;
    }
  });
  const open = () => {
    heading.textContent = question();
    trouble.hidden = true;
    root.showModal();
  };
  return { root, open };
}
