/** The examples as they were understood, and what was not. */

import { h, table } from "../elements.js";
import { several } from "../figures.js";
import { MOST_EXAMPLES } from "./examples.js";

const MOST_FAULTS = 20;

/**
 * @param {import("./examples.js").Example[]} examples
 * @param {import("./examples.js").Fault[]} faults
 * @param {Set<import("./examples.js").Example>} held
 * @returns {Node[]}
 */
export function preview(examples, faults, held) {
  if (examples.length === 0 && faults.length === 0) {
    return [
      h("div", { class: "panel" }, h("p", { class: "empty" }, "The examples will stand here as they were understood.")),
    ];
  }
  const parts = [];
  if (faults.length > 0) {
    const shown = faults.slice(0, MOST_FAULTS);
    const lines = shown.map(({ line, message }) => h("li", {}, h("strong", {}, `Line ${line}`), ` ${message}`));
    if (faults.length > MOST_FAULTS) lines.push(h("li", {}, `and ${faults.length - MOST_FAULTS} more`));
    parts.push(
      h(
        "div",
        { class: "panel faults", role: "alert" },
        h("h2", {}, `${several(faults.length, "line")} to mend`),
        h("ul", {}, ...lines),
      ),
    );
  }
  if (examples.length > 0) {
    const options = examples[0]?.options;
    const same = options && examples.every((example) => example.options?.join() === options.join());
    const rows = examples.slice(0, MOST_EXAMPLES).map((example) => [
      `${example.line}`,
      example.prompt,
      example.answer,
      ...(same || !options ? [] : [example.options?.join(" | ") ?? ""]),
      held.has(example) ? "held back" : "taught",
    ]);
    const columns = ["Line", "Question", "Answer", ...(same || !options ? [] : ["Options"]), "Use"];
    const use = `${several(examples.length - held.size, "example")} to teach, ${held.size} held back`;
    const choice = same ? `, options ${options.join(" | ")}` : options ? "" : ", answers in its own words";
    parts.push(h("div", { class: "panel" }, table(`${use}${choice}`, columns, rows)));
  }
  return parts;
}
