/** One answer read off: the answer, its confidence, each option, and how the doubt divides. */

import { h } from "../elements.js";
import { duration, nats, percent, points, several } from "../figures.js";
import { sentence } from "../session.js";
import { judge } from "./judge.js";

export const CUT = "It was cut at its longest length and may go on; the confidence is that of this beginning.";

/**
 * @param {string} prompt The question.
 * @param {any} answer The server's reply.
 * @param {{session: any, announce: (text: string) => void, tokens: Node | null}} page
 * @returns {Node}
 */
export function reading(prompt, answer, page) {
  const text = answer.options === null;
  const said = page.tokens ?? h("p", { class: "said", dir: "auto" }, answer.answer);
  return h(
    "div",
    {},
    h(
      "div",
      {},
      heading(answer.abstained ? "No answer" : "Answer", prompt),
      answer.abstained ? withheld(answer) : said,
      answer.finish === "length" && h("p", { class: "cut" }, CUT),
    ),
    confidence(answer),
    answer.options !== null && options(answer),
    doubt(answer, text),
    facts(answer),
    judge(answer, page),
  );
}

/**
 * @param {string} title
 * @param {string} prompt
 */
export function heading(title, prompt) {
  return h("div", { class: "heading" }, h("h2", {}, title), h("p", { class: "asked", dir: "auto" }, prompt));
}

/** @param {any} answer */
function withheld({ abstained, options: asked }) {
  const rows = abstained.candidates.map((/** @type {any} */ { answer, probability }) =>
    h("li", {}, h("span", { dir: "auto" }, answer || "(nothing)"), h("span", { class: "number" }, percent(probability))),
  );
  return h(
    "div",
    { class: "withheld" },
    h("p", { class: "reason" }, sentence(abstained.reason)),
    asked === null && h("h3", {}, "It might have said"),
    asked === null && h("ol", { class: "candidates" }, ...rows),
    asked === null && h("p", { class: "hint" }, "Each with the probability of exactly this text, word by word."),
  );
}

/** @param {any} answer */
function confidence(answer) {
  const { confidence: share, calibrated, standard_error: error, options: asked, abstained, draws } = answer;
  // Of a free text the standard error is that of another number, the whole text's probability; one draw has none.
  const spread = asked === null || draws === 1 ? null : error;
  return h(
    "div",
    { class: "confidence" },
    h(
      "p",
      { class: "dial" },
      h("span", { class: "big number" }, percent(share)),
      h("span", {}, abstained ? "confident of the likeliest" : "confident"),
      spread !== null && h("span", { class: "faint number" }, `${points(spread)} points`),
    ),
    gauge(share, spread, abstained?.threshold ?? null),
    h(
      "p",
      { class: calibrated ? "chip good" : "chip" },
      calibrated ? "Calibrated" : "Not calibrated",
      h("span", {}, calibrated ? "on answers that were known" : asked === null ? "a mean per token" : "as the model has it"),
    ),
  );
}

/**
 * A share on a scale from 0 to 1.
 *
 * @param {number} share
 * @param {number | null} error One standard error to either side.
 * @param {number | null} [mark] What it was to reach.
 */
function gauge(share, error, mark = null) {
  const at = (/** @type {number} */ value) => `${100 * Math.min(1, Math.max(0, value))}%`;
  const from = Math.max(0, share - (error ?? 0));
  const to = Math.min(1, share + (error ?? 0));
  return h(
    "div",
    { class: "gauge", "aria-hidden": "true" },
    h("span", { class: "fill", style: { width: at(share) } }),
    error !== null &&
      to - from > 0.004 &&
      h("span", { class: "whisker", style: { left: at(from), width: at(to - from) } }),
    mark !== null && h("span", { class: "threshold", style: { left: at(mark) } }),
  );
}

/** @param {any} answer */
function options({
  options: asked,
  probabilities,
  standard_errors,
  prediction_set: set,
  answer_index: chosen,
  draws,
}) {
  const errors = draws === 1 ? null : standard_errors;
  const rows = asked.map((/** @type {string} */ option, /** @type {number} */ index) => {
    const error = errors?.[index] ?? null;
    const within = set?.includes(option);
    return h(
      "li",
      { class: index === chosen ? "chosen" : "" },
      h("span", { class: "name", dir: "auto" }, option),
      gauge(probabilities[index], error),
      h(
        "span",
        { class: "number" },
        percent(probabilities[index]),
        error !== null && h("span", { class: "faint" }, ` ${points(error)}`),
      ),
      h("span", { class: within ? "within yes" : "within" }, within ? "in the set" : ""),
    );
  });
  const left = asked.length - (set?.length ?? 0);
  const held = left === 0 ? "All answers are in it." : `${left} of ${asked.length} are not in it.`;
  return h(
    "section",
    {},
    h("h3", {}, "Each answer"),
    h("ul", { class: "bars" }, ...rows),
    h(
      "div",
      { class: "axis", "aria-hidden": "true" },
      ...["0", "25", "50", "75", "100 %"].map((at) => h("span", {}, at)),
    ),
    h(
      "p",
      { class: "hint" },
      set === null
        ? "No prediction set: this posterior has no calibration for these answers."
        : `On tasks like those of its calibration, such sets hold the right answer in at least 90 % of questions. ${held}`,
      errors ? " Error bars: one standard error over the draws." : "",
    ),
  );
}

/**
 * @param {any} answer
 * @param {boolean} text
 */
function doubt({ uncertainty: { total, aleatoric, epistemic }, options: asked, draws }, text) {
  const ignorance = draws === 1 ? "one draw does not tell it" : nats(epistemic);
  const most = text ? Math.max(total, 1e-9) : Math.log(asked.length);
  const width = (/** @type {number} */ entropy) => `${(100 * Math.max(0, entropy)) / most}%`;
  const part = (
    /** @type {string} */ kind,
    /** @type {string} */ name,
    /** @type {string} */ what,
    /** @type {string} */ entropy,
  ) =>
    h(
      "div",
      { class: "part" },
      h("dt", {}, h("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), name),
      h("dd", { class: "number" }, entropy),
      h("dd", { class: "hint" }, what),
    );
  return h(
    "section",
    {},
    h("h3", {}, "Where the doubt lies"),
    h(
      "div",
      { class: "split", "aria-hidden": "true" },
      h("span", { class: "epistemic", style: { width: width(epistemic) } }),
      h("span", { class: "aleatoric", style: { width: width(aleatoric) } }),
    ),
    h(
      "dl",
      { class: "parts" },
      part("epistemic", "The model does not know", "Epistemic: more examples would remove it.", ignorance),
      part("aleatoric", "The question is open", "Aleatoric: no examples would remove it.", nats(aleatoric)),
      part("whole", "Together", text ? "In nats per token." : `In nats, of ${nats(most)} at most.`, nats(total)),
    ),
  );
}

/** @param {any} answer */
function facts({ draws, task, posterior, timing }) {
  return h(
    "p",
    { class: "facts number" },
    `${several(draws, "draw")} · ${task} version ${posterior.version} · ${duration(timing.total_ms)}`,
  );
}
