/** Server-sent events, read from a reply's body as it comes. */

/** @typedef {{event: string, data: string}} ServerEvent */

/**
 * Parts a stream of bytes into its events.
 *
 * @param {AsyncIterable<Uint8Array>} chunks
 * @returns {AsyncGenerator<ServerEvent, void, undefined>}
 */
export async function* readEvents(chunks) {
  const decoder = new TextDecoder();
  let waiting = "";
  /** @type {ServerEvent} */
  let current = { event: "message", data: "" };
  let lines = 0;
  for await (const chunk of chunks) {
    waiting += decoder.decode(chunk, { stream: true });
    // A carriage return at the end may be half of a line's end: it waits for what follows.
    const parts = waiting.split(/\r\n|\n|\r(?!$)/);
    waiting = parts.pop() ?? "";
    for (const line of parts) {
      if (line === "") {
        if (lines > 0) yield current;
        current = { event: "message", data: "" };
        lines = 0;
        continue;
      }
      const [name, value] = split(line);
      if (name === "event") current.event = value;
      if (name === "data") current.data += lines++ > 0 ? `\n${value}` : value;
    }
  }
}

/**
 * @param {string} line A comment has an empty name.
 * @returns {[string, string]}
 */
function split(line) {
  const colon = line.indexOf(":");
  if (colon < 0) return [line, ""];
  const value = line.slice(colon + 1);
  return [line.slice(0, colon), value.startsWith(" ") ? value.slice(1) : value];
}
