/** Examples that are held back, and how a task does on them. */

const AT_ONCE = 4; // questions under way at a time
const MOST_TOKENS = 512;
const SPARE_TOKENS = 32; // for an article, a full stop and the end

/** @typedef {import("./examples.js").Example} Example */
/** @typedef {{answer: string | null, confidence: number, right: boolean}} Outcome */

/**
 * How many examples to hold back where nobody says: a quarter, and at least two of eight or more.
 *
 * @param {number} count
 */
export function usualShare(count) {
  return count >= 8 ? Math.max(2, Math.round(count / 4)) : Math.floor(count / 4);
}

/**
 * Parts examples into those to teach and those held back, the same each time, with each answer in both where it can be.
 * Those of one question stay together: held back, it must not have been taught.
 *
 * @param {Example[]} examples
 * @param {number} count How many to hold back, at most.
 * @returns {{taught: Example[], held: Example[]}}
 */
export function holdBack(examples, count) {
  const byPrompt = grouped(mixed(examples), ({ prompt }) => prompt.trim());
  const byAnswer = grouped(byPrompt, ([first]) => /** @type {Example} */ (first).answer);
  /** @type {Set<Example>} */
  const held = new Set();
  while (held.size < count) {
    const most = byAnswer.reduce((a, b) => (b.length > a.length ? b : a));
    const group = most.pop();
    if (!group) break;
    if (held.size + group.length <= count) for (const example of group) held.add(example);
  }
  return { taught: examples.filter((e) => !held.has(e)), held: examples.filter((e) => held.has(e)) };
}

/**
 * Items by what they have in common.
 *
 * @template T
 * @param {T[]} items
 * @param {(item: T) => string} common
 * @returns {T[][]}
 */
function grouped(items, common) {
  /** @type {Map<string, T[]>} */
  const groups = new Map();
  for (const item of items) groups.set(common(item), [...(groups.get(common(item)) ?? []), item]);
  return [...groups.values()];
}

/**
 * The same items in an order that looks like chance and is always the same.
 *
 * @template T
 * @param {T[]} items
 * @returns {T[]}
 */
function mixed(items) {
  const result = [...items];
  let state = 1;
  for (let last = result.length - 1; last > 0; last--) {
    state = (state * 48271) % 2147483647; // Park and Miller's generator
    const other = state % (last + 1);
    [result[last], result[other]] = [/** @type {T} */ (result[other]), /** @type {T} */ (result[last])];
  }
  return result;
}

/**
 * Asks each example's question; the first that fails ends them all.
 *
 * @param {any} session
 * @param {Example[]} examples
 * @param {{task: string, version?: number, signal: AbortSignal}} settings
 * @param {(done: number) => void} [tell]
 * @returns {Promise<Outcome[]>}
 */
export async function attempt(session, examples, settings, tell) {
  /** @type {Outcome[]} */
  const outcomes = [];
  const failed = new AbortController();
  const signal = AbortSignal.any([settings.signal, failed.signal]);
  let next = 0;
  let done = 0;
  async function work() {
    while (next < examples.length) {
      const place = next++;
      const { prompt, options, answer } = /** @type {Example} */ (examples[place]);
      const question = { options, ...settings, max_tokens: roomFor(answer), signal };
      const reply = await session.call((/** @type {any} */ client) => client.generate(prompt, question));
      const right = options === null ? normalized(reply.answer) === normalized(answer) : reply.answer === answer;
      outcomes[place] = { answer: reply.answer, confidence: reply.confidence, right };
      tell?.(++done);
    }
  }
  try {
    await Promise.all(Array.from({ length: AT_ONCE }, work));
  } finally {
    failed.abort();
  }
  return outcomes;
}

/**
 * How many tokens a free text needs to be as long as an answer: none is less than a byte. More would be time spent on
 * texts that are wrong.
 *
 * @param {string} answer
 */
function roomFor(answer) {
  return Math.min(MOST_TOKENS, new TextEncoder().encode(answer).length + SPARE_TOKENS);
}

// Python's white space, which is not quite JavaScript's.
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\p{Z}";
// Before a digit a mark is part of a number; marks of vowels, joiners and signs such as + are what an answer says.
const MARK = new RegExp(`[^\\p{L}\\p{N}\\p{M}\\p{Sm}_\\u200c\\u200d${SPACE}](?!\\p{Nd})`, "gu");
const SPACES = new RegExp(`[${SPACE}]+`, "u");

/**
 * A text without case, punctuation, English articles and spare white space, as `normalized` in abmll/meanings.py makes
 * it; only letters such as ß, which has two small ones for its capital, it leaves as they are.
 *
 * @param {string} text
 */
export function normalized(text) {
  const plain = text.normalize("NFC").toLowerCase().normalize("NFC");
  const words = plain.replace(MARK, "").split(SPACES).filter(Boolean);
  const told = words.filter((word) => !/^(a|an|the)$/.test(word));
  return (told[0] ? told : words[0] ? words : plain.split(SPACES).filter(Boolean)).join(" ");
}

/** @param {Outcome[]} outcomes */
export function summary(outcomes) {
  const mean = (/** @type {(outcome: Outcome) => number} */ of) =>
    outcomes.reduce((sum, outcome) => sum + of(outcome), 0) / outcomes.length;
  return { accuracy: mean(({ right }) => (right ? 1 : 0)), confidence: mean(({ confidence }) => confidence) };
}
