/** The errors that the client throws; every message says what was wrong and what would help. */

/** @typedef {import("./schema.d.ts").components["schemas"]["JobReply"]} Job */

/** Base of all errors that the client throws on purpose. */
export class ClientError extends Error {
  /**
   * @param {string} message
   * @param {ErrorOptions} [options]
   */
  constructor(message, options) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** An argument that no request can hold. */
export class InvalidArgument extends ClientError {}

/** No connection to the server, or one that broke before the reply. */
export class ServerUnreachable extends ClientError {}

/** The server did not reply in time; it may still be at work on the request. */
export class ReplyTimeout extends ClientError {}

/** A reply that does not keep the contract: another server, or another version of it. */
export class InvalidReply extends ClientError {}

/** The server said no. */
export class ApiError extends ClientError {
  /**
   * @param {number} status
   * @param {string} type
   * @param {string} message
   * @param {string | null} [field]
   * @param {number | null} [retryAfter]
   */
  constructor(status, type, message, field = null, retryAfter = null) {
    super(message);
    /** HTTP status. */
    this.status = status;
    /** The server's kind of error, such as `TaskNotFound`. */
    this.type = type;
    /** The input at fault, where there is one. */
    this.field = field;
    /** Seconds after which to ask again, where the server says them. */
    this.retryAfter = retryAfter;
  }
}

/** 400, 413 or 422: the request cannot be served as it stands. */
export class RequestRejected extends ApiError {}

/** 401 or 403: no key, an unknown one, or one without the right. */
export class AccessDenied extends ApiError {}

/** 404: no such task, version, job or answer. */
export class NotFound extends ApiError {}

/** 409: the task cannot be changed now. */
export class Conflict extends ApiError {}

/** 429, 502, 503 or 504: starting, overloaded or broken; later may help, see `retryAfter`. */
export class ServerUnavailable extends ApiError {}

/** An adaptation job that did not give a posterior. */
export class JobError extends ClientError {
  /**
   * @param {string} message
   * @param {Job} job
   */
  constructor(message, job) {
    super(message);
    /** The job as last seen. */
    this.job = job;
  }
}

/** The job ended with an error. */
export class JobFailed extends JobError {}

/** The job was cancelled. */
export class JobCancelled extends JobError {}

/** The job was still under way when the waiting ended; it runs on. */
export class JobTimeout extends JobError {}

/** @type {Record<number, typeof ApiError>} */
const KINDS = {
  400: RequestRejected,
  413: RequestRejected,
  422: RequestRejected,
  401: AccessDenied,
  403: AccessDenied,
  404: NotFound,
  409: Conflict,
  429: ServerUnavailable,
  502: ServerUnavailable, // a proxy's word for a server that starts anew
  503: ServerUnavailable,
  504: ServerUnavailable,
};

// An error within a stream comes after the status; this is the one that it would have had.
/** @type {Record<string, number>} */
const STREAMED = { PromptTooLong: 413, EngineFailure: 503, StoreFailure: 503, DeadlineExceeded: 504 };

/**
 * The error that a reply tells of.
 *
 * @param {number | null} status The reply's; null: an event within a stream.
 * @param {string} text The reply's body.
 * @param {string | null} [retryAfter] The header, where there is one.
 * @returns {ApiError}
 */
export function apiError(status, text, retryAfter = null) {
  const told = toldBy(text);
  const code = status ?? STREAMED[told?.type ?? ""] ?? 500;
  const Kind = KINDS[code] ?? ApiError;
  const seconds = retryAfter !== null && /^\d+$/.test(retryAfter) ? Number(retryAfter) : null;
  if (told !== null) return new Kind(code, told.type, told.message, told.field, seconds);
  return new Kind(code, "HTTPError", `the server replied ${code}: ${text.slice(0, 200) || "no text"}`, null, seconds);
}

/**
 * @param {string} text
 * @returns {{type: string, message: string, field: string | null} | null}
 */
function toldBy(text) {
  try {
    const { type, message, field } = JSON.parse(text).error;
    if (typeof type !== "string" || typeof message !== "string") return null;
    return { type, message, field: typeof field === "string" ? field : null };
  } catch {
    return null;
  }
}
