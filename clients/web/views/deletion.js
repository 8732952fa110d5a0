/** Deletes a task, once the reader has said so twice. */

import { h, newId } from "../elements.js";
import { inWords } from "../session.js";

/**
 * @param {string} name
 * @param {{session: import("../session.js").Session, announce: (text: string) => void}} page
 */
export function deletion(name, { session, announce }) {
  const title = newId();
  const trouble = h("p", { class: "trouble", role: "alert", hidden: true });
  const keep = h("button", { type: "button", onclick: () => dialog.close() }, "Keep it");
  const remove = h("button", { type: "button", class: "danger" }, "Delete for good");
  const dialog = h(
    "dialog",
    { "aria-labelledby": title },
    h("h2", { id: title }, `Delete ${name}?`),
    h("p", {}, "All its versions go, with their calibration. This cannot be undone."),
    trouble,
    h("div", { class: "row" }, keep, remove),
  );
  remove.addEventListener("click", async () => {
    try {
      await session.call((client) => client.deleteTask(name));
      dialog.close();
      location.hash = "#/tasks";
      announce(`${name} is deleted.`);
    } catch (error) {
      trouble.textContent = inWords(error);
      trouble.hidden = false;
    }
  });
  const open = () => {
    trouble.hidden = true;
    dialog.showModal();
  };
  return h(
    "section",
    { class: "panel" },
    h("h2", {}, "Delete"),
    h("div", { class: "row" }, h("button", { type: "button", class: "danger", onclick: open }, `Delete ${name}`)),
    dialog,
  );
}
