/** "Was this right?": sends what the reader knows as feedback. */

import { field, h, mayMoveFocus } from "../elements.js";
import { inWords } from "../session.js";

/**
 * @param {any} answer
 * @param {{session: any, announce: (text: string) => void}} page
 * @returns {HTMLElement}
 */
export function judge(answer, { session, announce }) {
  const withheld = answer.abstained !== null;
  const root = h("section", { class: "judge" });
  const trouble = h("p", { class: "trouble", role: "alert", hidden: true });

  /** @param {{answer?: string, correct?: boolean}} said */
  async function send(said) {
    if (root.getAttribute("aria-busy") === "true") return;
    root.setAttribute("aria-busy", "true");
    trouble.hidden = true;
    try {
      const { correct } = await session.call((/** @type {any} */ client) => client.feedback(answer, said));
      const was = withheld ? `${said.answer} is right` : `the answer was ${correct ? "right" : "wrong"}`;
      const noted = `Noted: ${was}.`;
      // The confidence of a text that is not calibrated is no probability: there is nothing to hold it to.
      const counts = answer.options !== null || answer.calibrated;
      const thanks = counts ? `${noted} It counts when ${answer.task} is judged.` : noted;
      const near = mayMoveFocus(root);
      root.replaceChildren(h("p", { class: "noted", tabindex: -1 }, thanks));
      if (near) root.firstElementChild.focus();
      else announce(thanks);
    } catch (error) {
      trouble.textContent = inWords(error);
      trouble.hidden = false;
    } finally {
      root.removeAttribute("aria-busy");
    }
  }

  function askWhich() {
    const others = answer.options.filter((/** @type {string} */ option) => withheld || option !== answer.answer);
    // Without a value of its own an option's is its text without white space around it.
    const choice = (/** @type {string} */ option) => h("option", { value: option }, option);
    const which = h("select", {}, ...others.map(choice));
    const tell = h("button", { type: "button", onclick: () => send({ answer: which.value }) }, "This was right");
    const unknown = h(
      "button",
      { type: "button", class: "quiet", onclick: () => send({ correct: false }) },
      "I do not know which",
    );
    root.replaceChildren(
      field(withheld ? "Which answer is right?" : "Which was right?", which),
      h("div", { class: "row" }, tell, !withheld && unknown),
      trouble,
    );
    if (!withheld) which.focus();
  }

  if (withheld && answer.options === null) return root; // no answer, nothing that could be right
  if (withheld) {
    askWhich();
    return root;
  }
  const wrong = () => {
    if (answer.options === null) send({ correct: false });
    else if (root.getAttribute("aria-busy") !== "true") askWhich();
  };
  root.append(
    h("h3", {}, "Was this right?"),
    h(
      "div",
      { class: "row" },
      h("button", { type: "button", onclick: () => send({ correct: true }) }, "Yes"),
      h("button", { type: "button", onclick: wrong }, "No"),
    ),
    trouble,
  );
  return root;
}
