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
 * @param {import("./trial.js").Outcome[] | null} told.after null where it could not be asked.
 * @param {Record<string, number> | null | undefined} told.serving Shares of the versions that answer; null: the newest;
 *   undefined: not known.
 * @param {(() => void) | null} told.again Teaches from all examples.
 */
export function verdict({ task, version, taught, asked, before, after, serving, again }) {
  const name = encodeURIComponent(task);
  const answers = serving === null || (serving !== undefined && `${version}` in serving);
  const ask = h("a", { href: `#/ask?task=${name}${answers ? "" : `&version=${version}`}` }, "Ask it");
  const still = Object.keys(serving ?? {}).join(" and ");
  const pinned = h(
    "p",
    {},
    `Who names no version is still answered by version ${still}. `,
    h("a", { href: `#/tasks/${name}` }, "Choose which version answers"),
    ".",
  );
  return h(
    "section",
    { class: "panel verdict" },
    h("h2", { tabindex: -1 }, `${task}, version ${version}`),
    h("p", {}, `Taught from ${several(taught.length, "example")}. `, ask, "."),
    !answers && serving && pinned,
    ...(asked.length > 0 && after ? compared(asked, before, after) : []),
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
