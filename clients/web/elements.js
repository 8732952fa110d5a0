/** Makes elements. No text ever becomes markup: what a model or a person wrote stays text. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An HTML element.
 *
 * @param {string} tag
 * @param {Record<string, any>} [settings] Attributes; `onclick` and the like listen, `style` sets properties, a boolean
 *   is an attribute that is there or not, null one that is not.
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {any}
 */
export function h(tag, settings = {}, ...children) {
  return fill(document.createElement(tag), settings, children);
}

/**
 * An SVG element.
 *
 * @param {string} tag
 * @param {Record<string, any>} [settings] As for `h`.
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {any}
 */
export function svg(tag, settings = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), settings, children);
}

/**
 * @param {any} element
 * @param {Record<string, any>} settings
 * @param {any[]} children
 */
function fill(element, settings, children) {
  for (const [name, value] of Object.entries(settings)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, what] of Object.entries(value)) element.style.setProperty(key, what);
    else if (typeof value === "boolean" && !name.startsWith("aria-")) element.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

let made = 0;

/** An id that no other element has. */
export function newId() {
  made += 1;
  return `e${made}`;
}

/**
 * A control with its label, and a hint below where there is one.
 *
 * @param {string} label
 * @param {HTMLElement} control
 * @param {string} [hint]
 * @returns {HTMLElement}
 */
export function field(label, control, hint) {
  control.id ||= newId();
  if (!hint) return h("div", { class: "field" }, h("label", { for: control.id }, label), control);
  const id = newId();
  control.setAttribute("aria-describedby", id);
  return h(
    "div",
    { class: "field" },
    h("label", { for: control.id }, label),
    control,
    h("p", { class: "hint", id }, hint),
  );
}

/**
 * The number in a control; null where it is empty. Throws where what is written there is none (its value is empty
 * then), or is out of the control's bounds.
 *
 * @param {any} input
 * @returns {number | null}
 */
export function numberIn(input) {
  const { badInput, rangeUnderflow, rangeOverflow } = input.validity;
  if (badInput || rangeUnderflow || rangeOverflow) {
    const bounds = input.max === "" ? `${input.min} or more` : `from ${input.min} to ${input.max}`;
    const wrong = badInput ? "this is not a number" : `${input.value} is not ${bounds}`;
    throw Object.assign(new Error(`${input.labels[0].textContent}: ${wrong}`), { input });
  }
  return input.value === "" ? null : Number(input.value);
}

/**
 * Writes a text into a control in the place of all that it holds; the browser's undo brings that back.
 *
 * @param {HTMLTextAreaElement} control
 * @param {string} text
 */
export function rewrite(control, text) {
  control.focus();
  control.select();
  // The one way that undo knows of, though it is on its way out.
  if (!document.execCommand("insertText", false, text)) control.value = text;
}

/**
 * Whether the focus may be moved unasked: nobody is at work where it is, or it is in one of these places.
 *
 * @param {...Node} places
 */
export function mayMoveFocus(...places) {
  const now = document.activeElement;
  return now === null || now.matches("body, main, h1") || places.some((place) => place.contains(now));
}

/**
 * A value before and after, within `dl.changes`.
 *
 * @param {string} name
 * @param {string} before
 * @param {string} after
 * @returns {HTMLElement}
 */
export function change(name, before, after) {
  return h(
    "div",
    {},
    h("dt", {}, name),
    h("dd", { class: "number" }, h("span", { class: "faint" }, `${before} → `), h("strong", {}, after)),
  );
}

/**
 * A table that scrolls by itself where it is wider than the page.
 *
 * @param {string} caption
 * @param {string[]} columns
 * @param {(Node | string)[][]} rows The first cell heads its row.
 * @param {string} [kind] A class.
 * @returns {HTMLElement}
 */
export function table(caption, columns, rows, kind = "") {
  const id = newId();
  const head = h("thead", {}, h("tr", {}, ...columns.map((column) => h("th", { scope: "col" }, column))));
  const body = rows.map(([first, ...rest]) =>
    h("tr", {}, h("th", { scope: "row" }, first), ...rest.map((cell) => h("td", {}, cell))),
  );
  return h(
    "div",
    {},
    h("p", { class: "caption", id }, caption),
    h(
      "div",
      { class: "scroller", tabindex: 0, role: "region", "aria-labelledby": id },
      h("table", { class: kind, "aria-labelledby": id }, head, h("tbody", {}, ...body)),
    ),
  );
}
