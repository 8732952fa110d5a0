/** The page's connection to its server: the key that it needs, and errors in words. */

import { AccessDenied, Client } from "../js/abmll.js";

const KEPT = "abmll-key";

/** @param {string | null} key */
function connect(key) {
  const url = location.href.replace(/[?#].*/, "").replace(/[^/]*$/, "");
  return new Client({ url, key, timeout: Infinity }); // nobody here could change it, and there is a Stop button
}

/** The key that was given in this tab. */
function kept() {
  try {
    return sessionStorage.getItem(KEPT);
  } catch {
    return null; // storage may be forbidden
  }
}

/** @param {string | null} key */
function keep(key) {
  try {
    if (key === null) sessionStorage.removeItem(KEPT);
    else sessionStorage.setItem(KEPT, key);
  } catch {
    // Then it holds until the page is left.
  }
}

/** Calls the server; where it asks for a key, so does the page, once for all calls that wait. */
export class Session {
  /**
   * @param {(reason: string) => Promise<string | null>} askForKey
   * @param {(known: boolean) => void} keyChanged
   */
  constructor(askForKey, keyChanged) {
    this.askForKey = askForKey;
    this.keyChanged = keyChanged;
    /** @type {Promise<string | null> | null} */
    this.asking = null;
    /** @type {string | null} */
    this.key = null;
    this.client = connect(null);
    try {
      this.use(kept());
    } catch {
      this.use(null); // it cannot be sent, whoever put it there
    }
  }

  /**
   * Takes a key, or forgets it for null. Throws for one that cannot be sent.
   *
   * @param {string | null} key
   */
  use(key) {
    this.client = connect(key);
    this.key = key;
    keep(key);
    this.keyChanged(key !== null);
  }

  /**
   * Does what needs the server.
   *
   * @template T
   * @param {(client: Client) => Promise<T>} work
   * @returns {Promise<T>}
   */
  async call(work) {
    for (;;) {
      const used = this.key;
      try {
        return await work(this.client);
      } catch (error) {
        if (!(await this.mayRetry(error, used))) throw error;
      }
    }
  }

  /**
   * Asks for a free text and gives its tokens as they come.
   *
   * @param {string} prompt
   * @param {object} question
   */
  async *stream(prompt, question) {
    for (;;) {
      const used = this.key;
      try {
        yield* this.client.stream(prompt, question);
        return;
      } catch (error) {
        if (!(await this.mayRetry(error, used))) throw error;
      }
    }
  }

  /**
   * @param {unknown} error
   * @param {string | null} used The key that was refused.
   */
  async mayRetry(error, used) {
    if (!(error instanceof AccessDenied) || error.status !== 401) return false;
    if (this.key !== used) return true; // another call has found a key meanwhile
    this.asking ??= this.askUntilUsable(used === null ? "" : error.message);
    const key = await this.asking;
    this.asking = null;
    if (key === null && this.key === used) error.message = "the server asks for a key, and none was given";
    if (key !== null && this.key === used) this.use(key);
    return this.key !== used;
  }

  /**
   * Asks for a key until there is one that can be sent, or none is given.
   *
   * @param {string} reason Why the last was refused.
   */
  async askUntilUsable(reason) {
    for (;;) {
      const key = await this.askForKey(reason);
      try {
        connect(key);
        return key;
      } catch (/** @type {any} */ error) {
        reason = error.message;
      }
    }
  }
}

/**
 * A text with a capital at its beginning and a full stop at its end, where it has no mark of its own.
 *
 * @param {string} text
 */
export function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.?!]$/.test(text) ? "" : ".");
}

/**
 * What an error says to the page's reader.
 *
 * @param {any} error
 * @returns {string}
 */
export function inWords(error) {
  const message = String(error?.message ?? error);
  const text = sentence(message);
  return error?.retryAfter ? `${text} Ask again in ${error.retryAfter} s.` : text;
}
