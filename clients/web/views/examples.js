/** Reads labelled examples out of CSV or JSON Lines, with an error for each line that is none. */

export const MOST_EXAMPLES = 64;
const NAMES = { prompt: ["prompt", "input", "question", "text"], answer: ["answer", "label"], options: ["options"] };

/** @typedef {{line: number, prompt: string, options: string[] | null, answer: string}} Example */
/** @typedef {{line: number, message: string}} Fault */
/** @typedef {{line: number, prompt: any, options: any, answer: any}} Row */

/**
 * @param {string} text
 * @param {boolean} wanted Whether the answers that occur are every question's options, where no question has its own.
 * @returns {{examples: Example[], faults: Fault[], own: boolean}} `own`: whether questions have options of their own.
 */
export function readExamples(text, wanted) {
  const lines = text.trimStart().startsWith("{") ? jsonLines(text) : csvLines(text);
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
 * @param {string} content
 * @param {number} line
 * @returns {Row | Fault}
 */
function jsonLine(content, line) {
  try {
    const row = JSON.parse(content);
    if (row === null || typeof row !== "object" || Array.isArray(row)) return { line, message: "is not a JSON object" };
    return { line, prompt: row.prompt ?? row.input, options: row.options ?? null, answer: row.answer };
  } catch {
    return { line, message: 'is not JSON; give {"prompt": …, "options": […], "answer": …}' };
  }
}

/**
 * @param {string} text
 * @returns {(Row | Fault)[]}
 */
function csvLines(text) {
  const rows = cells(text, separator(text));
  const [head, ...rest] = rows;
  if (!head) return [];
  const titles = head.values.map((title) => title.trim().toLowerCase());
  const at = (/** @type {keyof typeof NAMES} */ name) => titles.findIndex((title) => NAMES[name].includes(title));
  const [prompt, answer, options] = [at("prompt"), at("answer"), at("options")];
  if (prompt < 0 || answer < 0) {
    return [
      { line: head.line, message: "the first line must name the columns: prompt,answer or prompt,answer,options" },
    ];
  }
  return rest.map(({ line, values, open }) => {
    if (open) return { line, message: 'a quotation mark " is never closed' };
    const listed = options < 0 ? "" : (values[options] ?? "").trim();
    return {
      line,
      prompt: (values[prompt] ?? "").trim(),
      answer: (values[answer] ?? "").trim(),
      options: listed === "" ? null : listed.split("|").map((option) => option.trim()),
    };
  });
}

/** @param {string} text */
function separator(text) {
  const head = text.split("\n", 1)[0] ?? "";
  return ["\t", ";"].find((mark) => head.includes(mark)) ?? ",";
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
