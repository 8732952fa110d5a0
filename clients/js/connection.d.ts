/**
 * Waits.
 *
 * @param {number} seconds
 * @param {AbortSignal} [signal] Ends the waiting; what the caller aborted it with is thrown.
 * @returns {Promise<void>}
 */
export function pause(seconds: number, signal?: AbortSignal): Promise<void>;
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
    constructor(settings: Settings);
    url: string;
    key: any;
    timeout: number;
    /**
     * Sends a request and reads the whole reply.
     *
     * @param {string} method
     * @param {string} path
     * @param {Sent} [sent]
     * @returns {Promise<string>}
     */
    text(method: string, path: string, sent?: Sent): Promise<string>;
    /**
     * Sends a request and reads the reply's JSON; undefined where it has no body.
     *
     * @param {string} method
     * @param {string} path
     * @param {Sent} [sent]
     * @returns {Promise<any>}
     */
    json(method: string, path: string, sent?: Sent): Promise<any>;
    /**
     * Sends a request and gives the reply's body as it comes. Ending the loop ends the request.
     *
     * @param {string} method
     * @param {string} path
     * @param {Sent} sent
     * @returns {AsyncGenerator<Uint8Array, void, undefined>}
     */
    chunks(method: string, path: string, sent: Sent): AsyncGenerator<Uint8Array, void, undefined>;
    #private;
}
export type Settings = {
    /**
     * The server's address; in Node `$ABMLL_URL`, else `http://127.0.0.1:8000`.
     */
    url?: string | URL | undefined;
    /**
     * API key, where the server asks for one; in Node `$ABMLL_KEY`.
     */
    key?: string | null | undefined;
    /**
     * Longest wait for a reply, and for each further part of a stream, in seconds; 70.
     * `Infinity`: as long as it takes.
     */
    timeout?: number | undefined;
};
export type Sent = {
    /**
     * JSON to send; what has a `timeout` of its own may take that, and be replied to.
     */
    body?: any;
    /**
     * Seconds that the reply may take at most, where that is less than usual.
     */
    most?: number | undefined;
    /**
     * Gives the request up; what the caller aborted it with is thrown.
     */
    signal?: AbortSignal | undefined;
};
