/** Which versions of a task answer: the newest, one, or several that share the questions. */

import { field, h, numberIn } from "../elements.js";
import { inWords } from "../session.js";

/**
 * @param {import("../../js/abmll.js").TaskInfo} task
 * @param {{session: import("../session.js").Session, announce: (text: string) => void}} page
 * @param {(task: import("../../js/abmll.js").TaskInfo, focused: string) => void} changed
 */
export function servingForm({ task: name, versions, serving, version: answering }, { session, announce }, changed) {
  const usable = versions.filter(({ status }) => status === "ready").map(({ version }) => version);
  const pinned = serving === null ? [] : Object.keys(serving);
  const kind = pinned.length === 0 ? "newest" : pinned.length === 1 ? "one" : "share";
  const trouble = h("p", { class: "trouble", role: "alert", hidden: true });
  const which = h("select", {}, ...usable.map((version) => h("option", {}, `${version}`)));
  which.value = `${answering}`;
  const shares = usable.map((version) => {
    const input = h("input", { type: "number", min: 0, max: 100, step: "any" });
    const share = serving === null ? Number(version === answering) : (serving[version] ?? 0);
    input.value = `${Number((100 * share).toFixed(4))}`;
    return { version, input };
  });

  const choice = (/** @type {string} */ value, /** @type {string} */ label, /** @type {Node | null} */ more = null) => {
    const radio = h("input", {
      type: "radio",
      name: "serving",
      value,
      id: `serving-${value}`,
      checked: value === kind,
    });
    return h("div", { class: "choice" }, radio, h("label", { for: radio.id }, label), more);
  };
  const parts = h(
    "div",
    { class: "shares" },
    ...shares.map(({ version, input }) => field(`Version ${version}, %`, input)),
  );
  const form = h(
    "form",
    { class: "panel serving", novalidate: true },
    h(
      "fieldset",
      { class: "plain" },
      h("legend", {}, h("h2", {}, "Which version answers")),
      choice("newest", "Always the newest"),
      choice("one", "One version"),
      h("div", { class: "under", "data-for": "one" }, field("Version", which)),
      usable.length > 1 && choice("share", "Several that share the questions"),
      usable.length > 1 && h("div", { class: "under", "data-for": "share" }, parts),
    ),
    trouble,
    h("div", { class: "row" }, h("button", { type: "submit" }, "Apply")),
  );
  const chosen = () => new FormData(form).get("serving");
  const reveal = () => {
    for (const under of form.querySelectorAll(".under")) under.hidden = under.dataset.for !== chosen();
  };

  function wanted() {
    if (chosen() === "newest") return null;
    if (chosen() === "one") return Number(which.value);
    const given = shares.map(({ version, input }) => ({ version, share: (numberIn(input) ?? 0) / 100 }));
    const all = given.reduce((sum, { share }) => sum + share, 0);
    if (Math.abs(all - 1) > 0.005) {
      const message = `The shares add up to ${Number((100 * all).toFixed(2))} %; make them 100 %`;
      throw Object.assign(new Error(message), { input: shares[0]?.input });
    }
    return Object.fromEntries(given.filter(({ share }) => share > 0).map(({ version, share }) => [version, share]));
  }

  form.addEventListener("change", reveal);
  form.addEventListener("submit", async (/** @type {Event} */ event) => {
    event.preventDefault();
    for (const { input } of shares) input.removeAttribute("aria-invalid");
    try {
      const told = await session.call((client) => client.serve(name, wanted()));
      changed(told, ".serving button[type=submit]");
      announce(
        `Done. Version ${told.version} answers${told.serving && Object.keys(told.serving).length > 1 ? " most" : ""}.`,
      );
    } catch (/** @type {any} */ error) {
      trouble.textContent = inWords(error);
      trouble.hidden = false;
      error?.input?.setAttribute("aria-invalid", "true");
      error?.input?.focus();
    }
  });
  reveal();
  return form;
}
