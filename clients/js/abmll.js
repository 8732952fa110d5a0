/**
 * Client of an abmll server, for browsers and Node 18 or newer.
 *
 *     import { Client } from "./abmll.js";
 *     const client = new Client({ url: "http://127.0.0.1:8000" });
 *     const { answer, confidence } = await client.generate("dim the lamp", { options: ["lights", "music"] });
 *
 * Requests and replies have the server's own names; times are in seconds.
 */

import { Connection, pause } from "./connection.js";
import {
  ApiError,
  InvalidReply,
  JobCancelled,
  JobFailed,
  JobTimeout,
  ReplyTimeout,
  ServerUnavailable,
  ServerUnreachable,
  apiError,
} from "./errors.js";
import { readEvents } from "./events.js";

export * from "./errors.js";

const PATIENCE = 120; // seconds that a job is asked after while the server does not tell of it

/** @typedef {import("./schema.d.ts").components["schemas"]} Schemas */
/** @typedef {Schemas["GenerateReply"]} Answer */
/** @typedef {{text: string, probability: number | null}} StreamedToken Null: no token, but what had waited for one. */
/** @typedef {Schemas["JobReply"]} Job */
/** @typedef {Schemas["TaskSummary"]} TaskSummary */
/** @typedef {Schemas["TaskReply"]} TaskInfo */
/** @typedef {Schemas["FeedbackReply"]} Feedback */
/** @typedef {Schemas["RecalibrationReply"]} Recalibration */
/** @typedef {Schemas["ReliabilityReply"]} Reliability */
/** @typedef {Schemas["ExampleIn"]} LabelledExample */
/** @typedef {{signal?: AbortSignal}} Aborted `signal` gives the request up. */
/** @typedef {Partial<Omit<Schemas["GenerateRequest"], "prompt" | "stream">>} Question */
/** @typedef {Partial<Omit<Schemas["ScoreRequest"], "prompt" | "answer">>} Scoring */
/** @typedef {import("./connection.js").Settings} Settings */

/**
 * A connection to a server.
 *
 * All methods throw `ServerUnreachable`, `ReplyTimeout`, `ApiError` (`NotFound`, `RequestRejected`, `AccessDenied`,
 * `Conflict`, `ServerUnavailable`) and `InvalidReply`; all take a `signal` that gives the request up.
 */
export class Client {
  #connection;

  /** @param {Settings} [settings] */
  constructor(settings = {}) {
    this.#connection = new Connection(settings);
  }

  /**
   * Asks a question: which of `options`, or free text without them.
   *
   * @param {string} prompt
   * @param {Question & Aborted} [settings]
   * @returns {Promise<Answer>}
   */
  generate(prompt, { signal, ...question } = {}) {
    return this.#connection.json("POST", "/generate", { body: { prompt, ...question }, signal });
  }

  /**
   * Asks for a free text, see `generate`, and gives its tokens as they come, then the answer, which alone has a
   * `request_id`. Leaving the loop ends the request.
   *
   * @param {string} prompt
   * @param {Question & Aborted} [settings]
   * @returns {AsyncGenerator<StreamedToken | Answer, void, undefined>}
   */
  async *stream(prompt, { signal, ...question } = {}) {
    const body = { prompt, ...question, stream: true };
    let answered = false;
    for await (const { event, data } of readEvents(this.#connection.chunks("POST", "/generate", { body, signal }))) {
      if (event === "error") throw apiError(null, data);
      if (event !== "token" && event !== "answer") continue;
      answered = event === "answer";
      yield parse(event, data);
    }
    if (!answered) {
      throw new InvalidReply("POST /generate: the stream ended without an answer; has the server been stopped?");
    }
  }

  /**
   * Has a finished answer scored, from another model or a person: whole and token by token.
   *
   * @param {string} prompt
   * @param {string} answer
   * @param {Scoring & Aborted} [settings]
   * @returns {Promise<Answer>}
   */
  score(prompt, answer, { signal, ...scoring } = {}) {
    return this.#connection.json("POST", "/score", { body: { prompt, answer, ...scoring }, signal });
  }

  /**
   * Starts to teach a task from labelled examples; `wait` for the job.
   *
   * @param {string} task
   * @param {LabelledExample[]} examples
   * @param {{steps?: number | null, seed?: number} & Aborted} [settings]
   * @returns {Promise<Job>}
   */
  adapt(task, examples, { signal, ...settings } = {}) {
    return this.#connection.json("POST", "/adapt", { body: { task, examples, ...settings }, signal });
  }

  /**
   * Lists the newest hundred adaptation jobs, newest first.
   *
   * @param {Aborted} [settings]
   * @returns {Promise<Job[]>}
   */
  jobs({ signal } = {}) {
    return this.#connection.json("GET", "/adapt", { signal });
  }

  /**
   * Tells how an adaptation job stands.
   *
   * @param {string} id
   * @param {Aborted} [settings]
   * @returns {Promise<Job>}
   */
  job(id, { signal } = {}) {
    return this.#connection.json("GET", `/adapt/${encodeURIComponent(id)}`, { signal });
  }

  /**
   * Cancels an adaptation job; one that has ended stays as it is.
   *
   * @param {string} id
   * @param {Aborted} [settings]
   * @returns {Promise<Job>}
   */
  cancel(id, { signal } = {}) {
    return this.#connection.json("DELETE", `/adapt/${encodeURIComponent(id)}`, { signal });
  }

  /**
   * Gives the job every `poll` seconds, the last time when it has ended. Goes on while the server starts anew or is
   * overloaded, for two minutes, or as long as its `Retry-After` says. Throws `JobTimeout` if it is still under way
   * after `timeout` seconds.
   *
   * @param {Job | string} job
   * @param {{timeout?: number | null, poll?: number} & Aborted} [settings]
   * @returns {AsyncGenerator<Job, void, undefined>}
   */
  async *follow(job, { timeout = null, poll = 0.5, signal } = {}) {
    const end = timeout === null ? Infinity : performance.now() + 1000 * timeout;
    let current = typeof job === "string" ? await this.#job(job, end, signal) : job;
    for (;;) {
      yield current;
      if (ended(current)) return;
      checkDeadline(current, end);
      await pause(Math.min(poll, (end - performance.now()) / 1000), signal);
      current = await this.#look(current, end, poll, signal);
    }
  }

  /**
   * The job as it stands, told in the time that is left, or in a second.
   *
   * @param {string} id
   * @param {number} end
   * @param {AbortSignal} [signal]
   * @returns {Promise<Job>}
   */
  #job(id, end, signal) {
    const most = Math.max(1, (end - performance.now()) / 1000);
    return this.#connection.json("GET", `/adapt/${encodeURIComponent(id)}`, { most, signal });
  }

  /**
   * The job as it stands, though the server does not tell at once.
   *
   * @param {Job} job
   * @param {number} end
   * @param {number} poll
   * @param {AbortSignal} [signal]
   * @returns {Promise<Job>}
   */
  async #look(job, end, poll, signal) {
    const patient = performance.now() + 1000 * PATIENCE;
    for (;;) {
      try {
        return await this.#job(job.job, end, signal);
      } catch (error) {
        if (![ServerUnreachable, ServerUnavailable, ReplyTimeout].some((kind) => error instanceof kind)) throw error;
        checkDeadline(job, end);
        if (performance.now() >= patient) throw error;
        const seconds = (error instanceof ApiError && error.retryAfter) || poll;
        await pause(Math.min(seconds, (end - performance.now()) / 1000), signal);
      }
    }
  }

  /**
   * Returns the job once it is done. Throws `JobFailed`, `JobCancelled`, and `JobTimeout` if it is still under way
   * after `timeout` seconds.
   *
   * @param {Job | string} job
   * @param {{timeout?: number | null, poll?: number} & Aborted} [settings]
   * @returns {Promise<Job>}
   */
  async wait(job, settings) {
    let last;
    for await (const seen of this.follow(job, settings)) last = seen;
    return requireDone(/** @type {Job} */ (last));
  }

  /**
   * Lists the tasks, `global` first.
   *
   * @param {Aborted} [settings]
   * @returns {Promise<TaskSummary[]>}
   */
  tasks({ signal } = {}) {
    return this.#connection.json("GET", "/tasks", { signal });
  }

  /**
   * Tells a task's calibration and history.
   *
   * @param {string} name
   * @param {Aborted} [settings]
   * @returns {Promise<TaskInfo>}
   */
  task(name, { signal } = {}) {
    return this.#connection.json("GET", `/tasks/${encodeURIComponent(name)}`, { signal });
  }

  /**
   * Removes a task with all its versions.
   *
   * @param {string} name
   * @param {Aborted} [settings]
   * @returns {Promise<void>}
   */
  deleteTask(name, { signal } = {}) {
    return this.#connection.json("DELETE", `/tasks/${encodeURIComponent(name)}`, { signal });
  }

  /**
   * Removes a version of a task that does not answer and is not the newest.
   *
   * @param {string} name
   * @param {number} version
   * @param {Aborted} [settings]
   * @returns {Promise<void>}
   */
  deleteVersion(name, version, { signal } = {}) {
    return this.#connection.json("DELETE", `/tasks/${encodeURIComponent(name)}/versions/${version}`, { signal });
  }

  /**
   * Says which version of a task answers, or which share the questions; null: always the newest.
   *
   * @param {string} name
   * @param {Record<string, number> | number | null} versions
   * @param {Aborted} [settings]
   * @returns {Promise<TaskInfo>}
   */
  serve(name, versions, { signal } = {}) {
    const body = { versions: typeof versions === "number" ? { [versions]: 1 } : versions };
    return this.#connection.json("PUT", `/tasks/${encodeURIComponent(name)}/serving`, { body, signal });
  }

  /**
   * Tells how far the confidence of a task's version held; of the one that answers (most) by default.
   *
   * @param {string} name
   * @param {{version?: number | null} & Aborted} [settings]
   * @returns {Promise<Reliability>}
   */
  reliability(name, { version = null, signal } = {}) {
    const query = version === null ? "" : `?version=${version}`;
    return this.#connection.json("GET", `/tasks/${encodeURIComponent(name)}/reliability${query}`, { signal });
  }

  /**
   * Tells the right answer (text or index) to a question that was answered, or whether the answer was right.
   *
   * @param {Answer | string} answered
   * @param {{answer?: string | number | null, correct?: boolean | null} & Aborted} said
   * @returns {Promise<Feedback>}
   */
  feedback(answered, { signal, ...said }) {
    const request_id = typeof answered === "string" ? answered : answered.request_id;
    return this.#connection.json("POST", "/feedback", { body: { request_id, ...said }, signal });
  }

  /**
   * Fits a task's temperature to its feedback; with `apply`, makes a new version with it.
   *
   * @param {string} name
   * @param {{version?: number | null, apply?: boolean} & Aborted} [settings]
   * @returns {Promise<Recalibration>}
   */
  recalibrate(name, { signal, ...wanted } = {}) {
    return this.#connection.json("POST", `/tasks/${encodeURIComponent(name)}/recalibrate`, { body: wanted, signal });
  }

  /**
   * The server's metrics, in Prometheus' text format.
   *
   * @param {Aborted} [settings]
   * @returns {Promise<string>}
   */
  metrics({ signal } = {}) {
    return this.#connection.text("GET", "/metrics", { signal });
  }

  /**
   * Says whether the server lives; false where none of ours can be reached.
   *
   * @param {Aborted} [settings]
   * @returns {Promise<boolean>}
   */
  healthy(settings) {
    return this.#check("/healthz", settings);
  }

  /**
   * Says whether the server answers questions now; false where none of ours can be reached.
   *
   * @param {Aborted} [settings]
   * @returns {Promise<boolean>}
   */
  ready(settings) {
    return this.#check("/readyz", settings);
  }

  /**
   * @param {string} path
   * @param {Aborted} [settings]
   */
  async #check(path, { signal } = {}) {
    try {
      const told = await this.#connection.json("GET", path, { signal });
      return ["ok", "ready"].includes(told?.status);
    } catch (error) {
      const known = [ApiError, InvalidReply, ServerUnreachable, ReplyTimeout].some((kind) => error instanceof kind);
      if (known) return false;
      throw error;
    }
  }
}

/**
 * Whether nothing more will happen to a job.
 *
 * @param {Job} job
 * @returns {boolean}
 */
export function ended(job) {
  return ["done", "failed", "cancelled"].includes(job.status);
}

/**
 * @param {Job} job
 * @param {number} end By `performance.now`.
 */
function checkDeadline(job, end) {
  if (performance.now() < end) return;
  throw new JobTimeout(`job ${job.job} was still ${job.status} when the waiting ended; it runs on`, job);
}

/** @param {Job} job */
function requireDone(job) {
  const named = `job ${job.job} for task "${job.task}"`;
  if (job.status === "failed") throw new JobFailed(`${named} failed: ${job.error || "no reason given"}`, job);
  if (job.status === "cancelled") throw new JobCancelled(`${named} was cancelled`, job);
  return job;
}

/**
 * @param {string} event
 * @param {string} data
 */
function parse(event, data) {
  try {
    return JSON.parse(data);
  } catch (error) {
    const message = `POST /generate: an event "${event}" is malformed; another version's server?`;
    throw new InvalidReply(message, { cause: error });
  }
}
