/**
 * The error that a reply tells of.
 *
 * @param {number | null} status The reply's; null: an event within a stream.
 * @param {string} text The reply's body.
 * @param {string | null} [retryAfter] The header, where there is one.
 * @returns {ApiError}
 */
export function apiError(status: number | null, text: string, retryAfter?: string | null): ApiError;
/** The errors that the client throws; every message says what was wrong and what would help. */
/** @typedef {import("./schema.d.ts").components["schemas"]["JobReply"]} Job */
/** Base of all errors that the client throws on purpose. */
export class ClientError extends Error {
    /**
     * @param {string} message
     * @param {ErrorOptions} [options]
     */
    constructor(message: string, options?: ErrorOptions);
}
/** An argument that no request can hold. */
export class InvalidArgument extends ClientError {
}
/** No connection to the server, or one that broke before the reply. */
export class ServerUnreachable extends ClientError {
}
/** The server did not reply in time; it may still be at work on the request. */
export class ReplyTimeout extends ClientError {
}
/** A reply that does not keep the contract: another server, or another version of it. */
export class InvalidReply extends ClientError {
}
/** The server said no. */
export class ApiError extends ClientError {
    /**
     * @param {number} status
     * @param {string} type
     * @param {string} message
     * @param {string | null} [field]
     * @param {number | null} [retryAfter]
     */
    constructor(status: number, type: string, message: string, field?: string | null, retryAfter?: number | null);
    /** HTTP status. */
    status: number;
    /** The server's kind of error, such as `TaskNotFound`. */
    type: string;
    /** The input at fault, where there is one. */
    field: string | null;
    /** Seconds after which to ask again, where the server says them. */
    retryAfter: number | null;
}
/** 400, 413 or 422: the request cannot be served as it stands. */
export class RequestRejected extends ApiError {
}
/** 401 or 403: no key, an unknown one, or one without the right. */
export class AccessDenied extends ApiError {
}
/** 404: no such task, version, job or answer. */
export class NotFound extends ApiError {
}
/** 409: the task cannot be changed now. */
export class Conflict extends ApiError {
}
/** 429, 502, 503 or 504: starting, overloaded or broken; later may help, see `retryAfter`. */
export class ServerUnavailable extends ApiError {
}
/** An adaptation job that did not give a posterior. */
export class JobError extends ClientError {
    /**
     * @param {string} message
     * @param {Job} job
     */
    constructor(message: string, job: Job);
    /** The job as last seen. */
    job: {
        created: string;
        error: string | null;
        finished: string | null;
        job: string;
        posterior: import("./schema.d.ts").components["schemas"]["PosteriorId"] | null;
        progress: number;
        started: string | null;
        status: "queued" | "running" | "done" | "failed" | "cancelled";
        task: string;
    };
}
/** The job ended with an error. */
export class JobFailed extends JobError {
}
/** The job was cancelled. */
export class JobCancelled extends JobError {
}
/** The job was still under way when the waiting ended; it runs on. */
export class JobTimeout extends JobError {
}
export type Job = import("./schema.d.ts").components["schemas"]["JobReply"];
