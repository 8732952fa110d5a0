/** Numbers and times as people read them. */

const THIN = "\u202f"; // a narrow space that keeps a number and its unit on one line

/**
 * A share that is neither nothing nor all is never shown as if it were.
 *
 * @param {number} share 0 to 1.
 * @param {number} [digits] After the point.
 */
export function percent(share, digits = 1) {
  const [least, text] = [10 ** -digits, (100 * share).toFixed(digits)];
  if (share > 0 && Number(text) === 0) return `<${THIN}${least}${THIN}%`;
  if (share < 1 && Number(text) === 100) return `>${THIN}${100 - least}${THIN}%`;
  return `${text}${THIN}%`;
}

/**
 * A difference of shares, in percentage points.
 *
 * @param {number} share
 */
export function points(share) {
  const text = (100 * share).toFixed(1);
  return share > 0 && Number(text) === 0 ? `±${THIN}<${THIN}0.1` : `±${THIN}${text}`;
}

/** @param {number} entropy In nats. */
export function nats(entropy) {
  return entropy.toFixed(3).replace(/^-(0\.0+)$/, "$1"); // rounding may leave a little less than nothing
}

/** @param {number} milliseconds */
export function duration(milliseconds) {
  return milliseconds < 1000 ? `${milliseconds.toFixed(0)}${THIN}ms` : `${(milliseconds / 1000).toFixed(1)}${THIN}s`;
}

/** @param {string | null} iso */
export function moment(iso) {
  if (!iso) return "–";
  return new Date(iso).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

/**
 * @param {number} count
 * @param {string} noun
 */
export function several(count, noun) {
  return `${count.toLocaleString("en-GB")} ${noun}${count === 1 ? "" : "s"}`;
}

/**
 * A text as one line shows it: what cannot be seen is named.
 *
 * @param {string} text
 */
export function visible(text) {
  return text === "" ? "(end)" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}
