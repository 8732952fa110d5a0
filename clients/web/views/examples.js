/** Reads labelled examples out of CSV, JSON Lines or a JSON array, with an error for each line that is none. */

export const MOST_EXAMPLES = 64;
const NAMES = { prompt: ["prompt", "input", "question", "text"], answer: ["answer", "label"], options: ["options"] };
const SEPARATORS = [",", ";", "\t"];

/** @typedef {{line: number, prompt: string, options: string[] | null, answer: string}} Example */
/** @typedef {{line: number, message: string}} Fault */
/** @typedef {{line: number, prompt: any, options: any, answer: any}} Row */

/**
 * @param {string} text
 * @param {boolean} wanted Whether the answers that occur are every question's options, where no question has its own.
 * @returns {{examples: Example[], faults: Fault[], own: boolean}} `own`: whether questions have options of their own.
 */
export function readExamples(text, wanted) {
  const begin = text.trimStart()[0];
  const lines = begin === "{" ? jsonLines(text) : begin === "[" ? jsonArray(text) : csvLines(text);
  const own = lines.some((row) => "options" in row && row.options !== null);
  const shared = wanted && !own;
  /** @type {Example[]} */
  const examples = [];
  /** @type {Fault[]} */
  const faults = [];
  for (const row of lines) {
    const fault = "message" in row ? row.message : check(row);
    if (fault) faults.push({ line: row.line, message: fault });
    else examples.push(/** @type {Example} */ (row));
  }
  if (shared && examples.length > 0) {
    const options = [...new Set(examples.map(({ answer }) => answer))];
    for (const example of examples) example.options = options;
    if (options.length === 1 && faults.length === 0) {
      faults.push({
        line: examples[0]?.line ?? 1,
        message: "all answers are the same; there must be two to choose from",
      });
    }
  }
  const mixed = examples.find(({ options }) => (options === null) !== (examples[0]?.options === null));
  if (mixed) faults.push({ line: mixed.line, message: "either all examples have options, or none has" });
  const tooMany = examples[MOST_EXAMPLES];
  if (tooMany) {
    faults.push({
      line: tooMany.line,
      message: `there are ${examples.length} examples; ${MOST_EXAMPLES} are the most`,
    });
  }
  return { examples, faults: faults.sort((a, b) => a.line - b.line), own };
}

/**
 * @param {any} row
 * @returns {string | null} What is wrong.
 */
function check(row) {
  const { prompt, options } = row;
  if (typeof prompt !== "string" || !prompt.trim()) return "prompt is missing; give the question";
  if (options !== null) {
    const texts = Array.isArray(options) && options.every((option) => typeof option === "string" && option.trim());
    if (!texts || new Set(options).size !== options.length || options.length < 2) {
      return "options must be two or more different texts";
    }
    if (Number.isInteger(row.answer) && options[row.answer] !== undefined) row.answer = options[row.answer];
  }
  if (options === null && typeof row.answer === "number") row.answer = `${row.answer}`;
  if (typeof row.answer !== "string" || !row.answer.trim()) return "answer is missing; give the right one";
  if (options !== null && !options.includes(row.answer)) {
    return `answer "${row.answer}" is none of the options: ${options.join(", ")}`;
  }
  return null;
}

/**
 * @param {string} text
 * @returns {(Row | Fault)[]}
 */
function jsonLines(text) {
  return text
    .split(/\r?\n/)
    .map((content, index) => ({ content, line: index + 1 }))
    .filter(({ content }) => content.trim())
    .map(({ content, line }) => jsonLine(content, line));
}

/**
 * Each item of an array by itself, so that a fault has its line.
 *
 * @param {string} text
 * @returns {(Row | Fault)[]}
 */
function jsonArray(text) {
  const items = [{ content: "", line: 0 }];
  let line = 1;
  let depth = 0;
  for (const [piece] of text.matchAll(/"(?:[^"\\\n]|\\.)*"|[^]/g)) {
    if (piece === "]" || piece === "}") depth--;
    const last = /** @type {(typeof items)[0]} */ (items.at(-1));
    if (piece === "," && depth === 1) items.push({ content: "", line: 0 });
    else if (depth > 0) {
      if (piece.trim()) last.line ||= line;
      last.content += piece;
    }
    if (piece === "[" || piece === "{") depth++;
    if (piece === "\n") line++;
  }
  const rows = items.filter(({ content }) => content.trim()).map(({ content, line }) => jsonLine(content, line));
  return depth > 0 ? [...rows, { line, message: "the array is never closed: ] is missing" }] : rows;
}

/**
 * @param {string} content
 * @param {number} line
 * @returns {Row | Fault}
 */
function jsonLine(content, line) {
  try {
    const row = JSON.parse(content);
    if (row === null || typeof row !== "object" || Array.isArray(row)) return { line, message: "is not a JSON object" };
    const told = Object.entries(row).filter(([, value]) => value !== null);
    const at = columns(told.map(([name]) => name));
    const [prompt, answer, options] = [at.prompt, at.answer, at.options].map((place) => told[place]?.[1]);
    return { line, prompt, options: options ?? null, answer };
  } catch {
    return { line, message: 'is not JSON; give {"prompt": …, "options": […], "answer": …}' };
  }
}

/**
 * @param {string} text
 * @returns {(Row | Fault)[]}
 */
function csvLines(text) {
  const tables = SEPARATORS.map((mark) => cells(text, mark));
  const known = tables.find(([first]) => {
    const { prompt, answer } = columns(first?.values ?? []);
    return prompt >= 0 && answer >= 0;
  });
  const [head, ...rest] = known ?? tables[0] ?? [];
  if (!head) return [];
  const { prompt, answer, options } = columns(head.values);
  if (!known) {
    return [
      { line: head.line, message: "the first line must name the columns: prompt,answer or prompt,answer,options" },
    ];
  }
  return rest.map(({ line, values, open }) => {
    if (open) return { line, message: 'a quotation mark " is never closed' };
    const last = values.findLastIndex((value) => value.trim());
    if (last >= head.values.length) {
      const message = `has ${last + 1} cells for ${head.values.length} columns; put a text that holds a separator in "…"`;
      return { line, message };
    }
    const listed = options < 0 ? "" : (values[options] ?? "").trim();
    return {
      line,
      prompt: (values[prompt] ?? "").trim(),
      answer: (values[answer] ?? "").trim(),
      options: listed === "" ? null : listed.split("|").map((option) => option.trim()),
    };
  });
}

/**
 * Where the question, the answer and the options stand; -1 where they do not.
 *
 * @param {string[]} titles
 */
function columns(titles) {
  const plain = titles.map((title) => title.trim().toLowerCase());
  const at = (/** @type {string[]} */ names) =>
    names.map((name) => plain.indexOf(name)).find((place) => place >= 0) ?? -1;
  return { prompt: at(NAMES.prompt), answer: at(NAMES.answer), options: at(NAMES.options) };
}

/**
 * The cells of each line that is not blank; within quotation marks a line's end and the separator are text.
 *
 * @param {string} text
 * @param {string} mark
 */
function cells(text, mark) {
  /** @type {{line: number, values: string[], open: boolean}[]} */
  const rows = [];
  let line = 1;
  let begun = 1;
  let value = "";
  let quoted = false;
  /** @type {string[]} */
  let values = [];
  const close = () => {
    values.push(value);
    if (values.some((cell) => cell.trim())) rows.push({ line: begun, values, open: quoted });
    values = [];
    value = "";
    begun = line;
  };
  for (let place = 0; place < text.length; place++) {
    const letter = text[place];
    if (letter === "\n") line++;
    if (quoted) {
      if (letter !== '"') value += letter;
      else if (text[place + 1] === '"') value += text[++place];
      else quoted = false;
    } else if (letter === '"' && !value.trim()) {
      quoted = true;
      value = "";
    } else if (letter === mark) {
      values.push(value);
      value = "";
    } else if (letter === "\n") close();
    else if (letter !== "\r") value += letter;
  }
  close();
  return rows;
}
