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
      const address = location.hash;
      await session.call((client) => client.deleteTask(name));
      if (location.hash === address) location.hash = "#/tasks"; // else the reader has gone on
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
  const state = h("p", { role: "status" });
  const keep = h("button", { type: "button", onclick: () => busy || root.close() }, "Keep it");
  const remove = h("button", { type: "button", class: "danger" }, "Delete for good");
  const buttons = h("div", { class: "row" }, keep, remove);
  const root = h("dialog", { "aria-labelledby": title }, heading, h("p", {}, warning), trouble, state, buttons);
  let busy = false;

  /** @param {boolean} now */
  function setBusy(now) {
    busy = now;
    state.textContent = busy ? "Deleting…" : "";
    for (const button of [keep, remove]) button.setAttribute("aria-disabled", String(busy));
  }

  remove.addEventListener("click", async () => {
    if (busy) return;
    setBusy(true);
    trouble.hidden = true;
    try {
      await act();
      root.close();
    } catch (error) {
      trouble.textContent = inWords(error);
      trouble.hidden = false;
      if (!root.isConnected || root.closest("[hidden]")) document.body.append(root); // else nobody would see it
      if (!root.open) root.showModal();
    } finally {
      setBusy(false);
    }
  });
  root.addEventListener("cancel", (/** @type {Event} */ event) => busy && event.preventDefault());
  // A browser may end a dialog at the second Escape without asking.
  root.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (busy && event.key === "Escape") event.preventDefault();
  });
  const open = () => {
    heading.textContent = question();
    trouble.hidden = true;
    root.showModal();
  };
  return { root, open };
}
