/** Fits a version's temperature to its judged answers: first shown, then made a version. */

import { change, h, mayMoveFocus } from "../elements.js";
import { percent, several } from "../figures.js";
import { inWords } from "../session.js";

/**
 * @param {string} name
 * @param {number} version
 * @param {{session: import("../session.js").Session, announce: (text: string) => void}} page
 * @param {(task: import("../../js/abmll.js").TaskInfo, focused: string, note: string) => void} changed
 */
export function recalibration(name, version, { session, announce }, changed) {
  const trouble = h("p", { class: "trouble", role: "alert", hidden: true });
  const found = h("div", { class: "stack" });
  const look = h("button", { type: "button" }, "Show what it would change");

  /** @param {boolean} busy */
  function setBusy(busy) {
    root.setAttribute("aria-busy", String(busy));
    for (const button of root.querySelectorAll("button")) button.setAttribute("aria-disabled", String(busy));
  }

  /** @param {() => Promise<void>} work */
  async function attempt(work) {
    if (root.getAttribute("aria-busy") === "true") return; // a second version would be made
    setBusy(true);
    trouble.hidden = true;
    try {
      await work();
    } catch (error) {
      trouble.textContent = inWords(error);
      trouble.hidden = false;
    } finally {
      setBusy(false);
    }
  }

  const show = () =>
    attempt(async () => {
      const fitted = await session.call((client) => client.recalibrate(name, { version }));
      const near = mayMoveFocus(root);
      const make = h("button", { type: "button", class: "main" }, "Make a version with it");
      make.addEventListener("click", () => apply(fitted));
      found.replaceChildren(...differences(fitted), h("div", { class: "row" }, make));
      if (near) found.querySelector("p").focus();
      else announce(found.querySelector("p").textContent);
    });
  const apply = (/** @type {import("../../js/abmll.js").Recalibration} */ shown) =>
    attempt(async () => {
      const made = await session.call((client) => client.recalibrate(name, { version, apply: true }));
      const [was, is] = [fit(shown), fit(made)];
      const told = `Version ${made.applied} has ${is}, and the weights of version ${version}.`;
      const note = was === is ? told : `${told} The feedback has changed: what was shown was ${was}.`;
      changed(await session.call((client) => client.task(name)), ".versions", note);
      announce(note);
    });
  look.addEventListener("click", show);
  const root = h(
    "section",
    { class: "stack" },
    h("h3", {}, "Fit it to the feedback"),
    h(
      "p",
      { class: "hint" },
      "One temperature for all answers: above 1 it takes confidence back, below 1 it adds some. Nothing changes until you say so.",
    ),
    trouble,
    h("div", { class: "row" }, look),
    found,
  );
  return root;
}

/** @param {import("../../js/abmll.js").Recalibration} fitted */
function fit({ temperature_after, answers }) {
  return `temperature ${temperature_after.toFixed(2)}, fitted to ${several(answers, "judged answer")}`;
}

/** @param {import("../../js/abmll.js").Recalibration} fitted */
function differences({ answers, temperature_before, temperature_after, before, after }) {
  const fixed = (/** @type {number} */ value) => value.toFixed(3);
  return [
    h(
      "p",
      { tabindex: -1, class: "hint" },
      `From ${several(answers, "judged answer")}; measured on those that each temperature was not fitted on.`,
    ),
    h(
      "dl",
      { class: "changes" },
      change("Temperature", temperature_before.toFixed(2), temperature_after.toFixed(2)),
      change("Error of confidence (ECE)", percent(before.ece), percent(after.ece)),
      change("NLL, nats", fixed(before.nll), fixed(after.nll)),
      change("Brier score", fixed(before.brier), fixed(after.brier)),
    ),
  ];
}
