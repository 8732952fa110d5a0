/** The form that a question is asked with. */

import { field, h, mayMoveFocus, numberIn } from "../elements.js";
import { inWords } from "../session.js";

const MOST_OPTIONS = 64;
const SERVED = "as served";
const EXAMPLE = { prompt: "could you dim the lamp in the bedroom", options: ["lights", "music", "alarm"] };

/**
 * @typedef {object} Asked
 * @property {string} prompt
 * @property {Record<string, any>} settings As the client takes them.
 */

/** Question, answers to choose from, task, and how to answer. */
export class QuestionForm {
  /** @param {import("../session.js").Session} session */
  constructor(session) {
    this.session = session;
    this.prompt = h("textarea", { rows: 3, required: true, dir: "auto" });
    this.options = h("ul", { class: "options", "aria-labelledby": "options-title" });
    this.add = h(
      "button",
      { type: "button", class: "quiet", onclick: () => this.addOption("").focus() },
      "Add an answer",
    );
    this.task = h("select", {
      onchange: () =>
        this.showVersions().catch((/** @type {any} */ error) => this.complain(inWords(error), this.task, [])),
    });
    this.version = h("select", {}, h("option", { value: "" }, SERVED));
    this.versionsOf = "global"; // the task whose versions are listed
    this.draws = h("input", { type: "number", min: 1, placeholder: "auto" });
    this.below = h("input", { type: "number", min: 0, max: 100, step: "any", placeholder: "never" });
    this.length = h("input", { type: "number", min: 1, max: 512, value: 32, required: true });
    this.send = h("button", { type: "submit", class: "main" }, "Ask");
    this.stop = h("button", { type: "button", hidden: true }, "Stop");
    this.trouble = h("p", { class: "trouble", role: "alert", hidden: true });
    this.root = h(
      "form",
      { class: "panel", novalidate: true },
      field("Question", this.prompt, "Ctrl and Enter asks."),
      h(
        "fieldset",
        { class: "plain" },
        h("legend", { id: "options-title" }, "Answers to choose from"),
        this.options,
        this.add,
        h("p", { class: "hint" }, "None: it answers in its own words. Several lines can be pasted at once."),
      ),
      h("div", { class: "pair" }, field("Task", this.task), field("Version", this.version)),
      h(
        "details",
        {},
        h("summary", {}, "How to answer"),
        h(
          "div",
          { class: "trio" },
          field("Draws", this.draws, "Empty: as many as it takes."),
          field("Abstain below", this.below, "In percent."),
          field("Longest text", this.length, "In tokens."),
        ),
      ),
      this.trouble,
      h("div", { class: "row" }, this.send, this.stop),
    );
    this.prompt.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.root.requestSubmit();
    });
    this.setTasks([{ task: "global" }], "global");
    this.showVersions();
  }

  /** @param {string} text */
  addOption(text) {
    const input = h("input", { type: "text", autocomplete: "off", dir: "auto" });
    input.value = text;
    const remove = h("button", { type: "button", class: "quiet cross" }, "×");
    const item = h("li", {}, input, remove);
    remove.addEventListener("click", () => {
      const next = item.nextElementSibling ?? item.previousElementSibling;
      item.remove();
      this.nameOptions();
      (next?.querySelector("input") ?? this.add).focus();
    });
    input.addEventListener("paste", (/** @type {ClipboardEvent} */ event) => this.paste(event, input));
    this.options.append(item);
    this.nameOptions();
    return input;
  }

  /** Fills in a question that can be tried. */
  fillIn() {
    this.prompt.value = EXAMPLE.prompt;
    this.options.replaceChildren();
    for (const option of EXAMPLE.options) this.addOption(option);
    this.send.focus();
  }

  nameOptions() {
    [...this.options.children].forEach((item, index) => {
      item.querySelector("input").setAttribute("aria-label", `Answer ${index + 1}`);
      item.querySelector("button").setAttribute("aria-label", `Remove answer ${index + 1}`);
    });
    this.add.hidden = this.options.children.length >= MOST_OPTIONS;
  }

  /**
   * @param {ClipboardEvent} event
   * @param {HTMLInputElement} input
   */
  paste(event, input) {
    const lines = (event.clipboardData?.getData("text") ?? "").split(/\r?\n/).filter((line) => line.trim());
    if (lines.length < 2) return;
    event.preventDefault();
    const [first = "", ...rest] = lines;
    input.setRangeText(first, input.selectionStart ?? 0, input.selectionEnd ?? 0, "end");
    const room = MOST_OPTIONS - this.options.children.length;
    for (const line of rest.slice(0, room)) this.addOption(line);
    if (rest.length > room) {
      this.complain(`${MOST_OPTIONS} answers are the most: ${rest.length - room} were left out.`, this.options);
    }
  }

  /**
   * @param {{task: string}[]} tasks
   * @param {string} chosen
   */
  setTasks(tasks, chosen) {
    this.task.replaceChildren(...tasks.map(({ task }) => h("option", {}, task)));
    if (tasks.some(({ task }) => task === chosen)) this.task.value = chosen;
  }

  /**
   * Lists the tasks anew.
   *
   * @param {string} wanted The task to choose; empty: the one that is chosen.
   * @param {string} version Its version; empty: as served.
   */
  async refresh(wanted, version) {
    if (wanted) this.choose(wanted, version); // before it is listed: who asks meanwhile asks this one
    const tasks = await this.session.call((client) => client.tasks());
    const name = this.task.value;
    this.setTasks(
      tasks.filter(({ status }) => status === "ready"),
      name,
    );
    if (this.task.value !== name) {
      const damaged = tasks.some(({ task }) => task === name);
      const wrong = damaged ? `Task ${name} is damaged` : `There is no task ${name}`;
      this.complain(`${wrong}; choose another.`, this.task, []);
    }
    await this.showVersions();
  }

  /**
   * Chooses a task, listed or not.
   *
   * @param {string} name
   * @param {string} version Empty: as served.
   */
  choose(name, version) {
    const others = [...this.task.options].map(({ value }) => value).filter((task) => task !== name);
    this.setTasks(
      [...others, name].map((task) => ({ task })),
      name,
    );
    this.versionsOf = name;
    this.listVersions(version ? [version] : []);
    this.version.value = version;
  }

  /** Lists the versions of the task that is chosen; the one that was chosen of the same task stays. */
  async showVersions() {
    const name = this.task.value;
    if (name !== this.versionsOf) this.listVersions([]);
    this.versionsOf = name;
    if (name === "global") return;
    let info;
    try {
      info = await this.session.call((client) => client.task(name));
    } catch (error) {
      if (this.task.value === name) throw error;
      return; // another was chosen meanwhile
    }
    if (this.task.value !== name) return;
    const chosen = this.version.value;
    const usable = info.versions.filter(({ status }) => status === "ready").map(({ version }) => `${version}`);
    this.listVersions(usable);
    if (!chosen || usable.includes(chosen)) this.version.value = chosen;
    else {
      const lacks = `Task ${name} has no version ${chosen} that can be asked`;
      this.complain(`${lacks}; choose another, or ask it as it is served.`, this.version, []);
    }
  }

  /** @param {string[]} versions */
  listVersions(versions) {
    const served = h("option", { value: "" }, SERVED);
    this.version.replaceChildren(served, ...versions.map((version) => h("option", {}, version)));
  }

  /** The inputs of the answers to choose from; one that is left blank is none. */
  written() {
    return [...this.options.querySelectorAll("input")].filter((input) => input.value.trim());
  }

  /**
   * What is asked. Throws, with the `input`, where something there cannot be asked.
   *
   * @returns {Asked}
   */
  read() {
    const inputs = this.written();
    const options = inputs.map((input) => input.value);
    const twin = options.findIndex((option, place) => options.indexOf(option) < place);
    if (twin >= 0) {
      const message = `The answer ${JSON.stringify(options[twin])} stands there twice`;
      throw Object.assign(new Error(message), { input: inputs[twin] });
    }
    if (options.length === 1) {
      const message = "There is one answer to choose from; give two or more, or none";
      throw Object.assign(new Error(message), { input: inputs[0] });
    }
    const below = numberIn(this.below);
    const settings = {
      task: this.task.value,
      version: numberIn(this.version),
      options: options.length > 0 ? options : null,
      draws: numberIn(this.draws) ?? "auto",
      abstain_below: below === null ? null : below / 100,
      max_tokens: numberIn(this.length) ?? 32,
    };
    return { prompt: this.prompt.value, settings };
  }

  /**
   * Says what is wrong, and marks where.
   *
   * @param {string} message Empty: nothing.
   * @param {HTMLElement | string | null} [where] The control, or the request's field.
   * @param {Node[]} [places] Whence the focus may be moved there; the default is the form.
   */
  complain(message, where = null, places = [this.root]) {
    this.trouble.textContent = message;
    this.trouble.hidden = message === "";
    const inputs = this.inputs();
    for (const input of [...Object.values(inputs), ...this.written()]) input?.removeAttribute("aria-invalid");
    const wrong = typeof where === "string" ? (this.option(where) ?? inputs[where.replace(/\W.*/, "")]) : where;
    if (!wrong) return;
    wrong.setAttribute("aria-invalid", "true");
    const hidden = wrong.closest("details");
    if (hidden) hidden.open = true;
    if (mayMoveFocus(...places)) wrong.focus();
  }

  /**
   * The input of an answer that the server names; nothing where it names something else.
   *
   * @param {string} named Such as `options[1]`.
   */
  option(named) {
    return this.written()[Number(/^options\[(\d+)\]$/.exec(named)?.[1] ?? -1)];
  }

  /** @returns {Record<string, any>} */
  inputs() {
    return {
      prompt: this.prompt,
      options: this.options.querySelector("input") ?? this.add,
      task: this.task,
      version: this.version,
      draws: this.draws,
      abstain_below: this.below,
      max_tokens: this.length,
    };
  }

  /** @param {boolean} busy */
  setBusy(busy) {
    this.send.setAttribute("aria-disabled", String(busy)); // disabled, it would lose the focus
    this.stop.hidden = !busy;
    this.root.setAttribute("aria-busy", String(busy));
  }
}
