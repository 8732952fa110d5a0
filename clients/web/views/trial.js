/** Examples that are held back, and how a task does on them. */

const AT_ONCE = 4; // questions under way at a time

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
 *
 * @param {Example[]} examples
 * @param {number} count How many to hold back.
 * @returns {{taught: Example[], held: Example[]}}
 */
export function holdBack(examples, count) {
  /** @type {Map<string, Example[]>} */
  const byAnswer = new Map();
  for (const example of mixed(examples))
    byAnswer.set(example.answer, [...(byAnswer.get(example.answer) ?? []), example]);
  /** @type {Set<Example>} */
  const held = new Set();
  while (held.size < count) {
    const most = [...byAnswer.values()].reduce((a, b) => (b.length > a.length ? b : a));
    held.add(/** @type {Example} */ (most.pop()));
  }
  return { taught: examples.filter((e) => !held.has(e)), held: examples.filter((e) => held.has(e)) };
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
      const reply = await session.call((/** @type {any} */ client) =>
        client.generate(prompt, { options, ...settings, signal }),
      );
      const right = options === null ? sameText(reply.answer, answer) : reply.answer === answer;
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
 * Whether two texts are equal but for case, punctuation and articles.
 *
 * @param {string} first
 * @param {string} second
 */
function sameText(first, second) {
  const bare = (/** @type {string} */ text) =>
    text
      .toLowerCase()
      .replace(/[^\p{L}\p{N}\s]/gu, "")
      .split(/\s+/)
      .filter((word) => word && !/^(a|an|the)$/.test(word))
      .join(" ");
  return bare(first) === bare(second);
}

/** @param {Outcome[]} outcomes */
export function summary(outcomes) {
  const mean = (/** @type {(outcome: Outcome) => number} */ of) =>
    outcomes.reduce((sum, outcome) => sum + of(outcome), 0) / outcomes.length;
  return { accuracy: mean(({ right }) => (right ? 1 : 0)), confidence: mean(({ confidence }) => confidence) };
}
