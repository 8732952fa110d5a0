/** The view that tells how the server is, again every few seconds while it is looked at. */

import { AccessDenied } from "../../js/abmll.js";
import { h } from "../elements.js";
import { duration } from "../figures.js";
import { inWords } from "../session.js";
import { readSamples, total } from "./exposition.js";

const EVERY = 3; // seconds
const LIMIT = 5; // seconds after which a call counts as not answered

/** @param {{session: import("../session.js").Session}} page */
export function healthView({ session }) {
  const lamps = h("dl", { class: "lamps", "aria-live": "polite" });
  const figures = h("dl", { class: "figures" });
  const trouble = h("p", { class: "trouble", role: "alert", hidden: true });
  const read = h("p", { class: "facts number" });
  const panel = h("div", { class: "panel" }, figures, read);
  let here = false;
  let refused = false; // whether the figures need a key that was not given
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let next;

  async function refresh() {
    clearTimeout(next);
    const { client } = session;
    const [lives, ready] = await Promise.all([orNo(client.healthy(limit())), orNo(client.ready(limit()))]);
    say(lamps, [lamp("Lives", lives, "yes", "no answer"), lamp("Answers questions", ready, "yes", "not now")]);
    if (!refused) await readFigures();
    if (here && !document.hidden) next = setTimeout(refresh, 1000 * EVERY);
  }

  async function readFigures() {
    try {
      const samples = readSamples(await session.call((client) => client.metrics(limit())));
      figures.replaceChildren(...told(samples).map(([name, value]) => pair(name, value)));
      trouble.hidden = true;
      panel.hidden = false;
      read.textContent = `Read at ${new Date().toLocaleTimeString("en-GB")}, again every ${EVERY} s.`;
    } catch (/** @type {any} */ error) {
      const told = error?.name === "TimeoutError" ? `The server did not reply in ${LIMIT} s.` : inWords(error);
      if (trouble.textContent !== told) trouble.textContent = told;
      trouble.hidden = false;
      panel.hidden = true; // old figures would be taken for new ones
      refused = error instanceof AccessDenied; // else a key would be asked for again and again
    }
  }

  document.addEventListener("visibilitychange", () => {
    if (here && !document.hidden) refresh();
  });
  const root = h("section", {}, h("h1", {}, "Health"), h("div", { class: "panel" }, lamps, trouble), panel);
  return {
    root,
    enter: () => {
      here = true;
      refused = false;
      refresh();
    },
    leave: () => {
      here = false;
      clearTimeout(next);
    },
  };
}

/** What gives a request up once it is late. */
function limit() {
  return { signal: AbortSignal.timeout(1000 * LIMIT) };
}

/**
 * What a check says; false where it is late.
 *
 * @param {Promise<boolean>} check
 */
async function orNo(check) {
  try {
    return await check;
  } catch (/** @type {any} */ error) {
    if (error?.name === "TimeoutError") return false;
    throw error;
  }
}

/**
 * Puts new elements in place where they say something new: what is said twice would be read out twice.
 *
 * @param {HTMLElement} list
 * @param {HTMLElement[]} elements
 */
function say(list, elements) {
  const said = elements.map(({ textContent }) => textContent).join();
  if ([...list.children].map(({ textContent }) => textContent).join() !== said) list.replaceChildren(...elements);
}

/**
 * @param {string} name
 * @param {boolean} good
 * @param {string} yes
 * @param {string} no
 */
function lamp(name, good, yes, no) {
  const light = h("span", { class: good ? "light good" : "light bad", "aria-hidden": "true" });
  return h("div", {}, h("dt", {}, name), h("dd", {}, light, good ? yes : no));
}

/**
 * @param {string} name
 * @param {string} value
 */
function pair(name, value) {
  return h("div", {}, h("dt", {}, name), h("dd", { class: "number" }, value));
}

/**
 * @param {import("./exposition.js").Sample[]} samples
 * @returns {[string, string][]}
 */
function told(samples) {
  const build = samples.find(({ name }) => name === "abmll_build_info")?.labels ?? {};
  const count = (/** @type {string} */ name, /** @type {Record<string, string>} */ labels = {}) => {
    const value = total(samples, name, labels);
    return value === null ? "–" : value.toLocaleString("en-GB");
  };
  const mean = (/** @type {string} */ name) => {
    const [sum, number] = [total(samples, `${name}_sum`), total(samples, `${name}_count`)];
    return sum === null || !number ? null : sum / number;
  };
  const [seconds, draws] = [mean("abmll_engine_seconds"), mean("abmll_draws")];
  const jobs = (/** @type {string} */ status) => count("abmll_adaptation_jobs_total", { status });
  return [
    ["Version", build["version"] ?? "–"],
    ["Engine", build["engine"] ?? "–"],
    ["Engine up", total(samples, "abmll_engine_up") ? "yes" : "no"],
    ["Engine restarts", count("abmll_engine_restarts_total")],
    ["Questions answered", count("abmll_confidence_count")],
    ["In the engine", count("abmll_inside")],
    ["Waiting", count("abmll_waiting")],
    ["Refused", count("abmll_refused_total")],
    ["Mean time in the engine", seconds === null ? "–" : duration(1000 * seconds)],
    ["Mean draws", draws === null ? "–" : draws.toFixed(1)],
    ["Tasks", count("abmll_tasks")],
    ["Jobs running", count("abmll_adaptation_running")],
    ["Jobs waiting", count("abmll_adaptation_queued")],
    ["Jobs done", jobs("done")],
    ["Jobs failed", jobs("failed")],
    ["Jobs cancelled", jobs("cancelled")],
  ];
}
