// Rates at a threshold: the arithmetic of erasure.eval.stats, held against it by a test.

const Z = 1.959963984540054; // the normal distribution's 97.5 % quantile

/** Wilson's 95 % score interval of k successes in n > 0 (JASA 1927), as [lo, hi]. */
function wilson(k, n) {
  const z2 = Z ** 2;
  const centre = (k + z2 / 2) / (n + z2);
  const half = Math.sqrt((z2 * ((k * (n - k)) / n + z2 / 4))) / (n + z2);
  return [k === 0 ? 0 : centre - half, k === n ? 1 : centre + half];
}

/** How many shots reach the threshold, of those that have the score; a missing one is counted apart, never as low. */
function tally(shots, score, threshold) {
  const prompts = new Set();
  let k = 0;
  let n = 0;
  for (const shot of shots) {
    const value = scoreOf(shot, score);
    if (value === null) continue;
    n += 1;
    k += Number(value >= threshold);
    prompts.add(shot.row.prompt);
  }
  return { k, n, missing: shots.length - n, prompts: prompts.size };
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

/** At most four decimals, without the zeros at the end. */
const number = (value) => String(Math.abs(value) < 1e4 ? Number(value.toFixed(4)) : Math.round(value));
