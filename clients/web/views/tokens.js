/** A free text coloured token by token: how likely each was, or how much the model does not know there. */

import { field, h, newId, table } from "../elements.js";
import { nats, percent, visible } from "../figures.js";

// Where one colour gives way to the next, from the surest to the least sure.
const MEASURES = {
  probability: {
    label: "probability",
    steps: [0.9, 0.6, 0.3, 0.1],
    legend: ["over 90 %", "60 to 90 %", "30 to 60 %", "10 to 30 %", "under 10 %"],
    step: (/** @type {any} */ token) => MEASURES.probability.steps.filter((edge) => token.probability < edge).length,
  },
  epistemic: {
    label: "what the model does not know",
    steps: [0.02, 0.1, 0.25, 0.5],
    legend: ["under 0.02 nats", "0.02 to 0.1", "0.1 to 0.25", "0.25 to 0.5", "over 0.5"],
    step: (/** @type {any} */ token) =>
      MEASURES.epistemic.steps.filter((edge) => token.uncertainty.epistemic >= edge).length,
  },
};

/**
 * A token's text; the signs that stand for what cannot be seen are not copied with it.
 *
 * @param {string} text
 * @param {string} named As one line shows it.
 */
function shown(text, named) {
  if (text === "") return [h("span", { class: "sign" }, named)];
  return text.split(/([\n\t])/).map((part) => (/[\n\t]/.test(part) ? h("span", { class: "sign" }, visible(part)) : part));
}

/** The text, its legend, what stands at the token that is looked at, and all tokens in a table. */
export class Tokens {
  /**
   * @param {any[]} tokens
   * @param {string | null} finish What ended the text.
   * @param {number} draws Of one draw nobody can tell what the model does not know.
   */
  constructor(tokens, finish, draws) {
    this.tokens = tokens;
    this.finish = finish;
    this.toldApart = draws > 1;
    this.measure = MEASURES.probability;
    this.detail = h("div", { class: "detail", "aria-live": "polite" });
    this.legend = h("ul", { class: "legend" });
    this.places = tokens.map((token, index) => this.place(token, index));
    const hint = newId();
    this.text = h(
      "div",
      { class: "tokens", dir: "auto", role: "group", "aria-label": "The answer, token by token", "aria-describedby": hint },
      ...this.places.flatMap((place, index) => (tokens[index].text.includes("\n") ? [place, h("br")] : [place])),
    );
    const choose = h(
      "select",
      {},
      ...Object.entries(MEASURES)
        .filter(([value]) => this.toldApart || value !== "epistemic")
        .map(([value, { label }]) => h("option", { value }, label)),
    );
    choose.addEventListener("change", () => this.colour(choose.value));
    this.root = h(
      "div",
      {},
      this.text,
      h("div", { class: "key" }, field("Coloured by", choose), this.legend),
      h("p", { class: "hint", id: hint }, "Choose a token to see what else might stand there; arrow keys go along."),
      this.detail,
      h("details", {}, h("summary", {}, "Every token in a table"), this.all()),
    );
    this.colour("probability");
    const least = Math.min(...tokens.map(({ probability }) => probability));
    this.look(tokens.findIndex(({ probability }) => probability === least));
  }

  /**
   * @param {any} token
   * @param {number} index
   */
  place(token, index) {
    // No button element: a browser lets nobody select the text of one, and an answer is to be copied.
    const place = h(
      "span",
      { role: "button", class: "token", tabindex: -1, "aria-label": this.spoken(token, index) },
      ...shown(token.text, this.named(index)),
    );
    place.addEventListener("focus", () => this.look(index));
    place.addEventListener("click", () => this.look(index));
    place.addEventListener("mouseenter", () => this.look(index));
    place.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      const last = this.tokens.length - 1;
      /** @type {Record<string, number>} */
      const goals = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: last, Enter: index, " ": index };
      const goal = goals[event.key];
      if (goal === undefined) return;
      event.preventDefault();
      this.places[Math.min(last, Math.max(0, goal))].focus();
      if (goal === index) this.look(index); // it has the focus already, but another may be looked at
    });
    return place;
  }

  /**
   * @param {any} token
   * @param {number} index
   */
  spoken(token, index) {
    return `${this.named(index).trim()}, ${percent(token.probability)}`;
  }

  /**
   * A token's text as one line shows it. Without a text it is the end, or part of a character.
   *
   * @param {number} index
   */
  named(index) {
    const { text } = this.tokens[index];
    const ends = index === this.tokens.length - 1 && this.finish !== "length";
    return text === "" && !ends ? "(part)" : visible(text);
  }

  /** @param {string} name */
  colour(name) {
    this.measure = MEASURES[/** @type {keyof typeof MEASURES} */ (name)];
    this.places.forEach((place, index) => (place.dataset.step = this.measure.step(this.tokens[index])));
    this.legend.replaceChildren(
      ...this.measure.legend.map((text, step) => h("li", {}, h("span", { class: "swatch", "data-step": step }), text)),
    );
  }

  /** @param {number} index */
  look(index) {
    this.places.forEach((place, other) => {
      place.tabIndex = other === index ? 0 : -1;
      place.classList.toggle("looked", other === index);
    });
    const { probability, uncertainty, likeliest } = this.tokens[index];
    this.detail.replaceChildren(
      h(
        "p",
        {},
        h("strong", {}, this.named(index)),
        ` ${percent(probability)} likely`,
        ...(this.toldApart ? [` · epistemic ${nats(uncertainty.epistemic)}`] : []),
        ` · ${this.toldApart ? "aleatoric" : "uncertainty"} ${nats(uncertainty.aleatoric)} nats`,
      ),
      h(
        "ul",
        { class: "others" },
        ...likeliest.map((/** @type {any} */ other) =>
          h("li", {}, h("span", {}, visible(other.text)), h("span", { class: "number" }, percent(other.probability))),
        ),
      ),
    );
  }

  all() {
    const rows = this.tokens.map(({ probability, uncertainty, likeliest }, index) => [
      `${index + 1}`,
      this.named(index),
      percent(probability),
      ...(this.toldApart ? [nats(uncertainty.epistemic)] : []),
      nats(uncertainty.aleatoric),
      likeliest
        .slice(0, 3)
        .map((/** @type {any} */ other) => `${visible(other.text)} ${percent(other.probability)}`)
        .join(", "),
    ]);
    const doubts = this.toldApart ? ["Epistemic, nats", "Aleatoric, nats"] : ["Uncertainty, nats"];
    const columns = ["Place", "Token", "Probability", ...doubts, "Likeliest there"];
    return table("The answer, token by token", columns, rows, "figures");
  }
}
