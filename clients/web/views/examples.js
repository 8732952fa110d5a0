/** Reads labelled examples out of CSV, JSON Lines or a JSON array, with an error for each line that is none. */

export const MOST_EXAMPLES = 64;
const NAMES = { prompt: ["prompt", "input", "question", "text"], answer: ["answer", "label"], options: ["options"] };
const MISNAMED = ["choices", "labels", "option"]; // what other people's files call options
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
    const { fault, ...told } = meant(Object.entries(row), "key of an example");
    return fault ? { line, message: fault } : { line, ...told };
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
    const titles = (first?.values ?? []).map(plain);
    return [NAMES.prompt, NAMES.answer].every((names) => titles.some((title) => names.includes(title)));
  });
  const [head, ...rest] = known ?? tables[0] ?? [];
  if (!head) return [];
  if (!known) {
    return [
      { line: head.line, message: "the first line must name the columns: prompt,answer or prompt,answer,options" },
    ];
  }
  /** @type {Set<string>} */
  const ofHead = new Set();
  const rows = rest.map(({ line, values, open }) => {
    if (open) return { line, message: 'a quotation mark " is never closed' };
    const last = values.findLastIndex((value) => value.trim());
    if (last >= head.values.length) {
      const message = `has ${last + 1} cells for ${head.values.length} columns; put a text that holds a separator in "…"`;
      return { line, message };
    }
    const named = head.values.map((title, place) => [title.trim(), (values[place] ?? "").trim() || null]);
    const { fault, prompt, answer, options } = meant(/** @type {[string, any][]} */ (named), "column of examples");
    if (fault) ofHead.add(fault);
    return {
      line,
      prompt,
      answer,
      options: options?.split("|").map((/** @type {string} */ option) => option.trim()) ?? null,
    };
  });
  return ofHead.size > 0 ? [...ofHead].map((message) => ({ line: head.line, message })) : rows;
}

/**
 * What a record says, whichever of the known names it says it by; and a fault, where a name is another's.
 *
 * @param {[string, any][]} record Names with what they hold; null: nothing.
 * @param {string} kind What a name is.
 * @returns {{prompt: any, answer: any, options: any, fault: string | null}}
 */
function meant(record, kind) {
  const told = record.filter(([, value]) => value !== null);
  /** @type {string | null} */
  let fault = null;
  const the = (/** @type {keyof typeof NAMES} */ part) => {
    const found = told.filter(([name]) => NAMES[part].includes(plain(name)));
    const [first, second] = found.filter(([, value]) => typeof value !== "string" || value.trim());
    if (first && second) fault = `'${first[0]}' and '${second[0]}' both hold the ${part}; leave one of them out`;
    return (first ?? found[0])?.[1] ?? null;
  };
  const [prompt, answer, options] = [the("prompt"), the("answer"), the("options")];
  const misnamed = options === null && told.find(([name]) => MISNAMED.includes(plain(name)));
  if (misnamed) fault = `'${misnamed[0]}' is no ${kind}; name it 'options', or leave it out`;
  return { prompt, answer, options, fault };
}

/** @param {string} title */
function plain(title) {
  return title.trim().toLowerCase();
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
