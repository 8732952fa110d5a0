/** Fits a version's temperature to its judged answers: first shown, then made a version. */

import { change, h } from "../elements.js";
import { percent, several } from "../figures.js";
import { inWords } from "../session.js";

/**
 * @param {string} name
 * @param {number} version
 * @param {{session: import("../session.js").Session, announce: (text: string) => void}} page
 * @param {(task: import("../../js/abmll.js").TaskInfo, focused: string) => void} changed
 */
export function recalibration(name, version, { session, announce }, changed) {
  const trouble = h("p", { class: "trouble", role: "alert", hidden: true });
  const found = h("div", { class: "stack" });
  const look = h("button", { type: "button" }, "Show what it would change");

  /** @param {() => Promise<void>} work */
  async function attempt(work) {
    trouble.hidden = true;
    try {
      await work();
    } catch (error) {
      trouble.textContent = inWords(error);
      trouble.hidden = false;
    }
  }

  const show = () =>
    attempt(async () => {
      const fitted = await session.call((client) => client.recalibrate(name, { version }));
      found.replaceChildren(...differences(fitted), h("div", { class: "row" }, make()));
      found.querySelector("p").focus();
    });
  const make = () => h("button", { type: "button", class: "main", onclick: apply }, "Make a version with it");
  const apply = () =>
    attempt(async () => {
      const { applied } = await session.call((client) => client.recalibrate(name, { version, apply: true }));
      changed(await session.call((client) => client.task(name)), ".versions");
      announce(`Version ${applied} has the new temperature, and the weights of version ${version}.`);
    });
  look.addEventListener("click", show);
  return h(
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
