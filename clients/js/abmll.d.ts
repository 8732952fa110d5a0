// Made by types.mjs from what has the hash a0b50bcd63d4dc8d68efea33ac7f6ff66e6161c1c1100b22ac996dc0f3a5a8de
/**
 * Whether nothing more will happen to a job.
 *
 * @param {Job} job
 * @returns {boolean}
 */
export function ended(job: Job): boolean;
export * from "./errors.js";
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
    /** @param {Settings} [settings] */
    constructor(settings?: Settings);
    /**
     * Asks a question: which of `options`, or free text without them.
     *
     * @param {string} prompt
     * @param {Question & Aborted} [settings]
     * @returns {Promise<Answer>}
     */
    generate(prompt: string, { signal, ...question }?: Question & Aborted): Promise<Answer>;
    /**
     * Asks for a free text, see `generate`, and gives its tokens as they come, then the answer, which alone has a
     * `request_id`. Leaving the loop ends the request.
     *
     * @param {string} prompt
     * @param {Question & Aborted} [settings]
     * @returns {AsyncGenerator<StreamedToken | Answer, void, undefined>}
     */
    stream(prompt: string, { signal, ...question }?: Question & Aborted): AsyncGenerator<StreamedToken | Answer, void, undefined>;
    /**
     * Has a finished answer scored, from another model or a person: whole and token by token.
     *
     * @param {string} prompt
     * @param {string} answer
     * @param {Scoring & Aborted} [settings]
     * @returns {Promise<Answer>}
     */
    score(prompt: string, answer: string, { signal, ...scoring }?: Scoring & Aborted): Promise<Answer>;
    /**
     * Starts to teach a task from labelled examples; `wait` for the job.
     *
     * @param {string} task
     * @param {LabelledExample[]} examples
     * @param {{steps?: number | null, seed?: number} & Aborted} [settings]
     * @returns {Promise<Job>}
     */
    adapt(task: string, examples: LabelledExample[], { signal, ...settings }?: {
        steps?: number | null;
        seed?: number;
    } & Aborted): Promise<Job>;
    /**
     * Lists the newest hundred adaptation jobs, newest first.
     *
     * @param {Aborted} [settings]
     * @returns {Promise<Job[]>}
     */
    jobs({ signal }?: Aborted): Promise<Job[]>;
    /**
     * Tells how an adaptation job stands.
     *
     * @param {string} id
     * @param {Aborted} [settings]
     * @returns {Promise<Job>}
     */
    job(id: string, { signal }?: Aborted): Promise<Job>;
    /**
     * Cancels an adaptation job; one that has ended stays as it is.
     *
     * @param {string} id
     * @param {Aborted} [settings]
     * @returns {Promise<Job>}
     */
    cancel(id: string, { signal }?: Aborted): Promise<Job>;
    /**
     * Gives the job every `poll` seconds, the last time when it has ended. Goes on while the server starts anew or is
     * overloaded, for two minutes, or as long as its `Retry-After` says. Throws `JobTimeout` if it is still under way
     * after `timeout` seconds.
     *
     * @param {Job | string} job
     * @param {{timeout?: number | null, poll?: number} & Aborted} [settings]
     * @returns {AsyncGenerator<Job, void, undefined>}
     */
    follow(job: Job | string, { timeout, poll, signal }?: {
        timeout?: number | null;
        poll?: number;
    } & Aborted): AsyncGenerator<Job, void, undefined>;
    /**
     * Returns the job once it is done. Throws `JobFailed`, `JobCancelled`, and `JobTimeout` if it is still under way
     * after `timeout` seconds.
     *
     * @param {Job | string} job
     * @param {{timeout?: number | null, poll?: number} & Aborted} [settings]
     * @returns {Promise<Job>}
     */
    wait(job: Job | string, settings?: {
        timeout?: number | null;
        poll?: number;
    } & Aborted): Promise<Job>;
    /**
     * Lists the tasks, `global` first.
     *
     * @param {Aborted} [settings]
     * @returns {Promise<TaskSummary[]>}
     */
    tasks({ signal }?: Aborted): Promise<TaskSummary[]>;
    /**
     * Tells a task's calibration and history.
     *
     * @param {string} name
     * @param {Aborted} [settings]
     * @returns {Promise<TaskInfo>}
     */
    task(name: string, { signal }?: Aborted): Promise<TaskInfo>;
    /**
     * Removes a task with all its versions.
     *
     * @param {string} name
     * @param {Aborted} [settings]
     * @returns {Promise<void>}
     */
    deleteTask(name: string, { signal }?: Aborted): Promise<void>;
    /**
     * Removes a version of a task that does not answer and is not the newest.
     *
     * @param {string} name
     * @param {number} version
     * @param {Aborted} [settings]
     * @returns {Promise<void>}
     */
    deleteVersion(name: string, version: number, { signal }?: Aborted): Promise<void>;
    /**
     * Says which version of a task answers, or which share the questions; null: always the newest.
     *
     * @param {string} name
     * @param {Record<string, number> | number | null} versions
     * @param {Aborted} [settings]
     * @returns {Promise<TaskInfo>}
     */
    serve(name: string, versions: Record<string, number> | number | null, { signal }?: Aborted): Promise<TaskInfo>;
    /**
     * Tells how far the confidence of a task's version held; of the one that answers (most) by default.
     *
     * @param {string} name
     * @param {{version?: number | null} & Aborted} [settings]
     * @returns {Promise<Reliability>}
     */
    reliability(name: string, { version, signal }?: {
        version?: number | null;
    } & Aborted): Promise<Reliability>;
    /**
     * Tells the right answer (text or index) to a question that was answered, or whether the answer was right.
     *
     * @param {Answer | string} answered
     * @param {{answer?: string | number | null, correct?: boolean | null} & Aborted} said
     * @returns {Promise<Feedback>}
     */
    feedback(answered: Answer | string, { signal, ...said }: {
        answer?: string | number | null;
        correct?: boolean | null;
    } & Aborted): Promise<Feedback>;
    /**
     * Fits a task's temperature to its feedback; with `apply`, makes a new version with it.
     *
     * @param {string} name
     * @param {{version?: number | null, apply?: boolean} & Aborted} [settings]
     * @returns {Promise<Recalibration>}
     */
    recalibrate(name: string, { signal, ...wanted }?: {
        version?: number | null;
        apply?: boolean;
    } & Aborted): Promise<Recalibration>;
    /**
     * The server's metrics, in Prometheus' text format.
     *
     * @param {Aborted} [settings]
     * @returns {Promise<string>}
     */
    metrics({ signal }?: Aborted): Promise<string>;
    /**
     * Says whether the server lives; false where none of ours can be reached.
     *
     * @param {Aborted} [settings]
     * @returns {Promise<boolean>}
     */
    healthy(settings?: Aborted): Promise<boolean>;
    /**
     * Says whether the server answers questions now; false where none of ours can be reached.
     *
     * @param {Aborted} [settings]
     * @returns {Promise<boolean>}
     */
    ready(settings?: Aborted): Promise<boolean>;
    #private;
}
export type Schemas = import("./schema.d.ts").components["schemas"];
export type Answer = Schemas["GenerateReply"];
/**
 * Null: no token, but what had waited for one.
 */
export type StreamedToken = {
    text: string;
    probability: number | null;
};
export type Job = Schemas["JobReply"];
export type TaskSummary = Schemas["TaskSummary"];
export type TaskInfo = Schemas["TaskReply"];
export type Feedback = Schemas["FeedbackReply"];
export type Recalibration = Schemas["RecalibrationReply"];
export type Reliability = Schemas["ReliabilityReply"];
export type LabelledExample = Schemas["ExampleIn"];
/**
 * `signal` gives the request up.
 */
export type Aborted = {
    signal?: AbortSignal;
};
export type Question = Partial<Omit<Schemas["GenerateRequest"], "prompt" | "stream">>;
export type Scoring = Partial<Omit<Schemas["ScoreRequest"], "prompt" | "answer">>;
export type Settings = import("./connection.js").Settings;
