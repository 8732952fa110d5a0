/** What a task has learnt: before and after, on the examples that were held back. */

import { change, h, table } from "../elements.js";
import { percent, several } from "../figures.js";
import { summary } from "./trial.js";

/**
 * @param {object} told
 * @param {string} told.task
 * @param {number | undefined} told.version
 * @param {import("./examples.js").Example[]} told.taught
 * @param {import("./examples.js").Example[]} told.asked
 * @param {import("./trial.js").Outcome[]} told.before
 * @param {import("./trial.js").Outcome[]} told.after
 * @param {(() => void) | null} told.again Teaches from all examples.
 */
export function verdict({ task, version, taught, asked, before, after, again }) {
  const ask = h("a", { href: `#/ask?task=${encodeURIComponent(task)}` }, "Ask it");
  return h(
    "section",
    { class: "panel verdict" },
    h("h2", { tabindex: -1 }, `${task}, version ${version}`),
    h("p", {}, `Taught from ${several(taught.length, "example")}. `, ask, "."),
    ...(asked.length > 0 ? compared(asked, before, after) : []),
    again &&
      h(
        "div",
        { class: "row" },
        h(
          "button",
          { type: "button", class: "main", onclick: again },
          `Teach from all ${taught.length + asked.length}`,
        ),
        h("span", { class: "hint" }, "makes the next version, with nothing held back"),
      ),
  );
}

/**
 * @param {import("./examples.js").Example[]} asked
 * @param {import("./trial.js").Outcome[]} before
 * @param {import("./trial.js").Outcome[]} after
 */
function compared(asked, before, after) {
  const [first, second] = [summary(before), summary(after)];
  const rows = asked.map((example, index) => [
    example.prompt,
    example.answer,
    outcome(/** @type {any} */ (before[index])),
    outcome(/** @type {any} */ (after[index])),
  ]);
  return [
    h(
      "dl",
      { class: "changes" },
      change("Right", percent(first.accuracy, 0), percent(second.accuracy, 0)),
      change("Mean confidence", percent(first.confidence, 0), percent(second.confidence, 0)),
    ),
    h(
      "p",
      { class: "hint" },
      `On ${several(asked.length, "question")} that it was not taught: a first impression, no measurement.`,
    ),
    table("Before (global) and after, question by question", ["Question", "Right answer", "Before", "After"], rows),
  ];
}

/** @param {import("./trial.js").Outcome} outcome */
function outcome({ answer, confidence, right }) {
  return h(
    "span",
    { class: right ? "outcome right" : "outcome wrong" },
    h("span", { "aria-hidden": "true" }, right ? "✓ " : "✗ "),
    h("span", { class: "unseen" }, right ? "right: " : "wrong: "),
    answer || "(nothing)",
    h("span", { class: "faint number" }, ` ${percent(confidence, 0)}`),
  );
}
