/** The view that asks a question and shows how sure the answer is. */

import { h } from "../elements.js";
import { percent } from "../figures.js";
import { inWords } from "../session.js";
import { CUT, heading, reading } from "./answer.js";
import { QuestionForm } from "./question.js";
import { Tokens } from "./tokens.js";

/** @param {{session: import("../session.js").Session, announce: (text: string) => void}} page */
export function askView({ session, announce }) {
  const form = new QuestionForm(session);
  const example = h("button", { type: "button", onclick: () => form.fillIn() }, "Fill in an example");
  const empty = h("p", { class: "empty" }, "The answer will stand here, and how sure it is.");
  const result = h("div", { class: "result" }, h("div", {}, empty, h("div", { class: "row" }, example)));
  /** @type {AbortController | null} */
  let running = null;

  form.root.addEventListener("submit", async (/** @type {Event} */ event) => {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    const asker = document.activeElement;
    form.complain("");
    form.setBusy(true);
    result.setAttribute("aria-busy", "true");
    try {
      await ask(form.read(), running.signal);
    } catch (/** @type {any} */ error) {
      if (error?.name === "AbortError") announce("Stopped.");
      else {
        const place = document.activeElement === asker ? form.root : form.stop; // not out of what is written meanwhile
        form.complain(inWords(error), error?.input ?? error?.field, [place]);
      }
    } finally {
      running = null;
      const left = document.activeElement === form.stop;
      form.setBusy(false);
      result.removeAttribute("aria-busy");
      if (left) form.send.focus();
    }
  });
  form.stop.addEventListener("click", () => running?.abort());

  /**
   * @param {import("./question.js").Asked} asked
   * @param {AbortSignal} signal
   */
  async function ask({ prompt, settings }, signal) {
    // What may be withheld cannot be streamed.
    const streamed = settings.options === null && settings.abstain_below === null;
    const question = { ...settings, tokens: settings.options === null, signal };
    if (!streamed) {
      tell(prompt, await session.call((client) => client.generate(prompt, question)));
      return;
    }
    const written = h("p", { class: "streamed", dir: "auto" });
    const cut = h(
      "p",
      { class: "hint", hidden: true },
      "It ended here, before its end: nothing is known of its confidence.",
    );
    try {
      for await (const part of session.stream(prompt, question)) {
        if ("request_id" in part) {
          tell(prompt, part);
          return;
        }
        result.removeAttribute("aria-busy");
        if (!written.isConnected) result.replaceChildren(h("div", {}, heading("Answer", prompt), written, cut));
        written.append(part.text);
      }
    } finally {
      written.classList.add("ended");
      cut.hidden = false;
    }
  }

  /**
   * @param {string} prompt
   * @param {any} answer
   */
  function tell(prompt, answer) {
    const tokens = answer.tokens?.length ? new Tokens(answer.tokens, answer.finish, answer.draws).root : null;
    result.replaceChildren(reading(prompt, answer, { session, announce, tokens }));
    const said = answer.abstained ? `No answer: ${answer.abstained.reason}` : `Answer: ${answer.answer}`;
    const cut = answer.finish === "length" ? ` ${CUT}` : "";
    announce(`${said}. Confidence ${percent(answer.confidence)}.${cut}`);
  }

  const root = h(
    "section",
    {},
    h("h1", {}, "Ask"),
    h("div", { class: "bench" }, form.root, h("section", { class: "panel", "aria-label": "Answer" }, result)),
  );
  return {
    root,
    enter: (/** @type {string} */ task, /** @type {string} */ version) =>
      form.refresh(task, version).catch((/** @type {any} */ error) => form.complain(inWords(error), null, [])),
  };
}
