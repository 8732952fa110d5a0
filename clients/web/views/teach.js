/** The view that teaches a task from examples, and shows on those held back what it has learnt. */

import { JobCancelled, NotFound } from "../../js/abmll.js";
import { field, h, mayMoveFocus, numberIn, rewrite } from "../elements.js";
import { several } from "../figures.js";
import { inWords, sentence } from "../session.js";
import { readExamples } from "./examples.js";
import { preview } from "./preview.js";
import { attempt, holdBack, usualShare } from "./trial.js";
import { verdict } from "./verdict.js";

const FORMS =
  "CSV with a line that names the columns: prompt, answer and, where each question has its own, options (a|b|c). " +
  "Or JSON Lines or a JSON array with the same names.";
const PAUSE = 150; // milliseconds of no typing, after which the examples are read
const SAMPLE = `prompt,answer
turn on the lamp in the kitchen,lights
play the new album by that band,music
wake me up at half past six,alarm
it is too dark in here,lights
skip this song please,music
remind me in ten minutes to look at the oven,alarm
make the living room brighter,lights
put on something to dance to,music
set the clock for tomorrow morning at seven,alarm
switch off the lamp beside my bed,lights
what is this tune called,music
do not let me sleep past nine,alarm
`;

/** @param {{session: import("../session.js").Session, announce: (text: string) => void}} page */
export function teachView({ session, announce }) {
  const name = h("input", {
    type: "text",
    required: true,
    autocomplete: "off",
    spellcheck: "false",
    placeholder: "home",
  });
  const text = h("textarea", {
    rows: 9,
    spellcheck: "false",
    class: "code",
    dir: "auto",
    placeholder: "prompt,answer,options",
  });
  const file = h("input", { type: "file", accept: ".csv,.tsv,.jsonl,.json,.txt,text/csv" });
  const shared = h("input", { type: "checkbox", checked: true, id: "shared-options" });
  const held = h("input", { type: "number", min: 0, value: 0 });
  const start = h("button", { type: "submit", class: "main", disabled: true }, "Teach");
  const trouble = h("p", { class: "trouble", role: "alert", hidden: true });
  const shown = h("div", { class: "shown" });
  const progress = h("div", { class: "panel progress", tabindex: -1, hidden: true });
  const result = h("div", {});
  let chosen = false; // whether the reader said how many to hold back
  let suggested = ""; // the name that the page gave the task, which the reader may have changed
  let count = 0; // examples to teach
  /** @type {File | null} */
  let opened = null;
  /** @type {AbortController | null} */
  let running = null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let reading;

  const sample = h("button", { type: "button", class: "quiet" }, "Fill in twelve examples");
  const form = h(
    "form",
    { class: "panel", novalidate: true },
    field(
      "Name of the task",
      name,
      "Small letters, digits, . _ and -. A name that is there already gets a new version.",
    ),
    field("Examples, 1 to 64", text, FORMS),
    h("div", { class: "row" }, field("Or a file", file), sample),
    h(
      "p",
      { class: "check" },
      shared,
      h("label", { for: "shared-options" }, "The answers that occur are every question's options"),
    ),
    h("p", { class: "hint" }, "Without options the task is taught to answer in its own words."),
    field("Hold back to test", held, "They are not taught; the task is asked them before and after."),
    trouble,
    h("div", { class: "row" }, start),
  );

  function read() {
    const { examples: found, faults, own } = readExamples(text.value, shared.checked);
    shared.disabled = own;
    held.max = Math.max(0, found.length - 1);
    if (!chosen) held.value = usualShare(found.length);
    const most = Math.max(0, found.length - 1);
    const parts = holdBack(found, Math.min(Math.max(0, Math.trunc(Number(held.value)) || 0), most));
    count = parts.taught.length;
    shown.replaceChildren(...preview(found, faults, new Set(parts.held)));
    start.disabled = found.length === 0 || faults.length > 0;
    start.setAttribute("aria-disabled", String(running !== null));
    nameStart();
    return parts;
  }

  function nameStart() {
    const task = name.value.trim();
    start.textContent = count ? `Teach ${task && `${task} `}from ${several(count, "example")}` : "Teach";
  }

  /**
   * Takes examples, and a name for their task unless the reader has given one.
   *
   * @param {string} examples
   * @param {string} task
   */
  function take(examples, task) {
    rewrite(text, examples);
    if (name.value === "" || name.value === suggested) name.value = suggested = task;
    read();
  }

  /**
   * @param {unknown} error
   * @param {import("./examples.js").Example[]} [taught] What the server was sent: it counts examples, a reader lines.
   * @param {Node} [place] Whence the focus may be moved to the control at fault.
   */
  function complain(error, taught = [], place = form) {
    const line = (/** @type {string} */ told, /** @type {string} */ place) =>
      taught[Number(place)] ? `line ${taught[Number(place)]?.line}` : told;
    trouble.textContent = error ? inWords(error).replace(/\bexamples\[(\d+)\]/gi, line) : "";
    trouble.hidden = !error;
    const { input, field: where } = /** @type {any} */ (error) ?? {};
    const wrong = where === "task" ? name : input;
    for (const control of [name, file, held]) control.setAttribute("aria-invalid", String(control === wrong));
    if (mayMoveFocus(place)) wrong?.focus();
  }

  /**
   * Shows what is under way; the focus stays in its place.
   *
   * @param {...Node} parts
   */
  function doing(...parts) {
    const held = progress.contains(document.activeElement);
    progress.replaceChildren(...parts);
    if (held) progress.focus();
  }

  /**
   * Asks the examples that were held back.
   *
   * @param {string} wording
   * @param {import("./examples.js").Example[]} asked
   * @param {{task: string, version?: number}} whom
   * @param {AbortController} running
   */
  async function ask(wording, asked, whom, running) {
    const cancel = h("button", { type: "button", onclick: () => running.abort() }, "Cancel");
    doing(h("p", { role: "status" }, wording), h("div", { class: "row" }, cancel));
    return attempt(session, asked, { ...whom, signal: running.signal });
  }

  /**
   * @param {string} task
   * @param {import("./examples.js").Example[]} taught
   * @param {AbortSignal} signal
   */
  async function teach(task, taught, signal) {
    const rows = taught.map(({ prompt, options, answer }) => ({ prompt, options, answer }));
    // Without the signal: a job whose number nobody was told would run on unseen.
    let job = await session.call((client) => client.adapt(task, rows));
    if (signal.aborted) {
      await session.call((client) => client.cancel(job.job));
      signal.throwIfAborted();
    }
    const cancel = h("button", { type: "button" }, "Cancel");
    cancel.addEventListener("click", () => {
      cancel.setAttribute("aria-disabled", "true");
      session.call((client) => client.cancel(job.job)).catch(complain);
    });
    const bar = h("progress", { max: 1, value: 0, "aria-label": "Progress of teaching" });
    const state = h("p", { role: "status" }, "Waiting for its turn");
    doing(state, bar, h("div", { class: "row" }, cancel));
    try {
      for await (const seen of session.client.follow(job, { poll: 0.3, signal })) {
        job = seen;
        bar.value = seen.progress;
        const wording =
          seen.status === "running" ? `Teaching ${seen.task} from ${several(taught.length, "example")}` : null;
        if (wording && state.textContent !== wording) state.textContent = wording;
      }
    } catch (/** @type {any} */ error) {
      if (error?.name === "AbortError" || error instanceof NotFound) throw error;
      const goesOn = "The job may run on; the list of tasks shows what comes of it.";
      error.message = `${sentence(error.message)} ${goesOn}`;
      throw error;
    }
    return session.client.wait(job); // it has ended; throws what went wrong
  }

  /**
   * @param {string} task
   * @param {import("./examples.js").Example[]} taught
   * @param {import("./examples.js").Example[]} asked
   */
  async function run(task, taught, asked) {
    running = new AbortController();
    const under = running;
    complain(null);
    read();
    progress.hidden = false;
    if (result.contains(document.activeElement)) progress.focus();
    result.replaceChildren();
    try {
      const before = await ask("Asking before anything is taught", asked, { task: "global" }, under);
      const { posterior } = await teach(task, taught, under.signal);
      const version = posterior?.version;
      const all = [...taught, ...asked].sort((a, b) => a.line - b.line);
      const again = asked.length > 0 ? () => run(task, all, []) : null;
      const told = { task, version, taught, asked, before, again };
      try {
        const after = await ask("Asking what it has learnt", asked, { task, version }, under);
        const { serving } = await session.call((client) => client.task(task));
        result.replaceChildren(verdict({ ...told, after, serving }));
      } catch (/** @type {any} */ error) {
        // It is taught all the same.
        const why = error?.name === "AbortError" ? "" : ` ${inWords(error)}`;
        result.replaceChildren(verdict({ ...told, after: null, serving: undefined }));
        complain(new Error(`${task} is taught, but what it has learnt was not asked.${why}`));
      }
      const title = result.querySelector("h2");
      if (mayMoveFocus(progress, start)) title.focus();
      else announce(`Taught: ${title.textContent}.`);
    } catch (/** @type {any} */ error) {
      const cancelled = error instanceof JobCancelled || error?.name === "AbortError";
      if (cancelled) announce("Cancelled.");
      if (mayMoveFocus(progress)) start.focus();
      complain(cancelled ? new Error("cancelled; nothing was taught") : error, taught, start);
    } finally {
      running = null;
      progress.hidden = true;
      read();
    }
  }

  form.addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    if (running) return;
    try {
      numberIn(held);
    } catch (error) {
      complain(error);
      return;
    }
    const { taught, held: asked } = read();
    if (start.disabled) return; // what was pasted just now has faults
    run(name.value.trim(), taught, asked);
  });
  text.addEventListener("input", () => {
    clearTimeout(reading);
    reading = setTimeout(read, PAUSE);
  });
  name.addEventListener("input", nameStart);
  shared.addEventListener("change", read);
  held.addEventListener("input", () => {
    chosen = held.value !== "" || held.validity.badInput;
    read();
  });
  file.addEventListener("change", async () => {
    const [first] = file.files;
    if (!first) return;
    file.value = ""; // the same file, once mended, can be chosen again
    opened = first;
    try {
      const written = await textOf(first);
      if (opened !== first) return; // the reader has chosen another
      complain(null);
      take(written, nameOf(first.name));
    } catch (/** @type {any} */ error) {
      if (opened === first) complain(Object.assign(error, { input: file }));
    }
  });
  sample.addEventListener("click", () => take(SAMPLE, "home"));
  read();

  const root = h(
    "section",
    {},
    h("h1", {}, "Teach"),
    h("div", { class: "bench" }, form, h("div", { class: "stack" }, progress, result, shown)),
  );
  return { root };
}

/**
 * A file's text. Throws where it is no UTF-8: read leniently, what is no letter there would be taught as �.
 *
 * @param {File} file
 */
async function textOf(file) {
  let bytes;
  try {
    bytes = await file.arrayBuffer();
  } catch (/** @type {any} */ error) {
    throw new Error(`${file.name} cannot be read: ${error.message}`);
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Error(`${file.name} is not UTF-8; save it as CSV UTF-8`);
  }
}

/**
 * A task's name out of a file's.
 *
 * @param {string} file
 */
function nameOf(file) {
  const bare = file.replace(/\.[^.]*$/, "").toLowerCase();
  return bare
    .replace(/[^a-z0-9._-]+/g, "-")
    .replace(/^[^a-z0-9]+/, "")
    .slice(0, 64);
}
