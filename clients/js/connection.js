/** Requests to one server: address, key, times, what to try again, and whose fault an error is. */

import { ClientError, InvalidArgument, InvalidReply, ReplyTimeout, ServerUnreachable, apiError } from "./errors.js";

const DEFAULT_URL = "http://127.0.0.1:8000";
const TIMEOUT = 70; // more than the server's own, so that it is the server that says what took too long
const MORE = 10; // seconds that a question may take beyond those that it was given
const PAUSES = [0.2, 0.8]; // seconds before a GET whose connection failed is sent again
const LONGEST = 2 ** 31 - 1; // milliseconds that a timer can wait; one that is given more goes off at once

/**
 * @typedef {object} Settings
 * @property {string | URL} [url] The server's address; in Node `$ABMLL_URL`, else `http://127.0.0.1:8000`.
 * @property {string | null} [key] API key, where the server asks for one; in Node `$ABMLL_KEY`.
 * @property {number} [timeout] Longest wait for a reply, and for each further part of a stream, in seconds; 70.
 *   `Infinity`: as long as it takes.
 */

/**
 * @typedef {object} Sent
 * @property {any} [body] JSON to send; what has a `timeout` of its own may take that, and be replied to.
 * @property {number} [most] Seconds that the reply may take at most, where that is less than usual.
 * @property {AbortSignal} [signal] Gives the request up; what the caller aborted it with is thrown.
 */

/** One server. */
export class Connection {
  /** @param {Settings} settings */
  constructor(settings) {
    const environment = /** @type {any} */ (globalThis).process?.env ?? {};
    const url = String(settings.url || environment.ABMLL_URL || DEFAULT_URL);
    if (!isAddress(url)) {
      throw new ServerUnreachable(`"${url}" is not a server's URL; give one such as ${DEFAULT_URL}`);
    }
    const key = settings.key ?? environment.ABMLL_KEY ?? null;
    if (key !== null && !/^[\x20-\x7e]*$/.test(key)) {
      throw new ClientError("the API key holds characters that no key has; give it as `abmll keys add` printed it");
    }
    const timeout = settings.timeout ?? TIMEOUT;
    if (!(timeout > 0)) throw new ClientError(`timeout is ${timeout}; give seconds above 0`);
    this.url = url.replace(/\/+$/, "");
    this.key = key;
    this.timeout = timeout;
  }

  /**
   * Sends a request and reads the whole reply.
   *
   * @param {string} method
   * @param {string} path
   * @param {Sent} [sent]
   * @returns {Promise<string>}
   */
  async text(method, path, sent = {}) {
    const pauses = method === "GET" ? PAUSES : [];
    for (let attempt = 0; ; attempt++) {
      const watch = new Watch(this.#seconds(sent), sent.signal);
      try {
        const reply = await this.#open(method, path, sent, watch);
        return await reply.text();
      } catch (error) {
        const known = this.#translate(error, watch);
        if (!(known instanceof ServerUnreachable) || attempt >= pauses.length) throw known;
        await pause(/** @type {number} */ (pauses[attempt]), sent.signal);
      } finally {
        watch.end();
      }
    }
  }

  /**
   * Sends a request and reads the reply's JSON; undefined where it has no body.
   *
   * @param {string} method
   * @param {string} path
   * @param {Sent} [sent]
   * @returns {Promise<any>}
   */
  async json(method, path, sent) {
    const text = await this.text(method, path, sent);
    try {
      return text === "" ? undefined : JSON.parse(text);
    } catch (error) {
      throw new InvalidReply(`${method} ${path}: the reply is not JSON; is this an abmll server?`, { cause: error });
    }
  }

  /**
   * Sends a request and gives the reply's body as it comes. Ending the loop ends the request.
   *
   * @param {string} method
   * @param {string} path
   * @param {Sent} sent
   * @returns {AsyncGenerator<Uint8Array, void, undefined>}
   */
  async *chunks(method, path, sent) {
    const watch = new Watch(this.#seconds(sent), sent.signal);
    try {
      const reply = await this.#open(method, path, sent, watch);
      const reader = /** @type {ReadableStream<Uint8Array>} */ (reply.body).getReader();
      for (;;) {
        watch.renew();
        const { done, value } = await reader.read();
        if (done) return;
        watch.rest(); // the caller's time is not the server's
        yield value;
      }
    } catch (error) {
      throw this.#translate(error, watch);
    } finally {
      watch.end();
      watch.controller.abort();
    }
  }

  /** @param {Sent} sent */
  #seconds(sent) {
    const own = sent.body?.timeout;
    const usual = typeof own === "number" ? Math.max(this.timeout, own + MORE) : this.timeout;
    return Math.min(usual, sent.most ?? Infinity);
  }

  /**
   * @param {string} method
   * @param {string} path
   * @param {Sent} sent
   * @param {Watch} watch
   */
  async #open(method, path, sent, watch) {
    /** @type {Record<string, string>} */
    const headers = { Accept: "application/json" };
    if (this.key) headers["Authorization"] = `Bearer ${this.key}`;
    if (sent.body !== undefined) headers["Content-Type"] = "application/json";
    const body = sent.body === undefined ? null : toJson(`${method} ${path}`, sent.body);
    const reply = await fetch(this.url + path, { method, headers, body, signal: watch.controller.signal });
    if (!reply.ok) throw apiError(reply.status, await reply.text(), reply.headers.get("Retry-After"));
    return reply;
  }

  /**
   * @param {unknown} error
   * @param {Watch} watch
   */
  #translate(error, watch) {
    if (watch.late) {
      const late = `${this.url} did not reply in ${watch.seconds} s`;
      return new ReplyTimeout(`${late}; give a longer timeout, or ask again later`);
    }
    if (error instanceof ClientError || watch.controller.signal.aborted) return error;
    const { cause } = /** @type {Error} */ (error);
    const reason = cause instanceof Error && cause.message ? ` (${cause.message})` : ""; // a browser tells none
    return new ServerUnreachable(`no server answers at ${this.url}${reason}`, { cause: error });
  }
}

/**
 * Unlike JSON.stringify, which makes null of NaN, it lets no number become nothing.
 *
 * @param {string} request
 * @param {unknown} body
 */
function toJson(request, body) {
  try {
    return JSON.stringify(body, (name, value) => {
      if (typeof value === "number" && !Number.isFinite(value)) throw new TypeError(`${name} is ${value}`);
      return value;
    });
  } catch (error) {
    const reason = /** @type {Error} */ (error).message;
    throw new InvalidArgument(`${request}: an argument has no form in JSON: ${reason}`, { cause: error });
  }
}

/** Ends a request when its time is up, or when its caller says so. */
class Watch {
  /**
   * @param {number} seconds
   * @param {AbortSignal} [signal]
   */
  constructor(seconds, signal) {
    this.controller = new AbortController();
    this.seconds = seconds;
    this.signal = signal;
    this.late = false;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined;
    this.given = () => this.controller.abort(signal?.reason);
    signal?.addEventListener("abort", this.given);
    if (signal?.aborted) this.given();
    this.renew();
  }

  /** Begins the time anew. */
  renew() {
    this.rest();
    this.timer = after(this.seconds, () => {
      this.late = true;
      this.controller.abort();
    });
  }

  /** Lets the time stand still, until `renew`. */
  rest() {
    clearTimeout(this.timer);
  }

  end() {
    this.rest();
    this.signal?.removeEventListener("abort", this.given);
  }
}

/** @param {string} url */
function isAddress(url) {
  try {
    return /^https?:$/.test(new URL(url).protocol);
  } catch {
    return false;
  }
}

/**
 * Does something later; never after `Infinity`.
 *
 * @param {number} seconds
 * @param {() => void} act
 */
function after(seconds, act) {
  return seconds === Infinity ? undefined : setTimeout(act, Math.min(1000 * seconds, LONGEST));
}

/**
 * Waits.
 *
 * @param {number} seconds
 * @param {AbortSignal} [signal] Ends the waiting; what the caller aborted it with is thrown.
 * @returns {Promise<void>}
 */
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = after(seconds, () => {
      signal?.removeEventListener("abort", stop);
      resolve();
    });
    if (signal?.aborted) stop();
    signal?.addEventListener("abort", stop, { once: true });
  });
}
