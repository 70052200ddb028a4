// The controls: which suite, which methods, which rows and images.

const $ = (id) => document.getElementById(id);
const view = {
  suite: null, // what load() gave
  methods: [], // numbers of the ticked ones
  rows: [], // the rows to show
  list: [], // their shots one after another, as the arrow keys walk them
  page: 0,
};

/** An element with attributes and children; children that are strings become text, so that no prompt is ever markup. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Tell those who listen to the page; later words replace earlier ones that came within half a second. */
function say(text) {
  clearTimeout(say.timer);
  say.timer = setTimeout(() => ($("said").textContent = text), 500);
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => el("option", { value }, text)));
}

/** Set the controls to what a suite has. */
function offer(suite) {
  const boxes = suite.methods.map((m) => {
    const box = el("input", { type: "checkbox", value: m });
    box.checked = true;
    return el("label", {}, box, ` ${meta.methods[m]}`);
  });
  $("methods").replaceChildren(...boxes);
  fill($("kind"), [["", "all"], ...suite.kinds.map((k) => [k, meta.kinds[k]])]);
  fill($("category"), [["", "all"], ...suite.categories.map((name, i) => [i, name])]);
  $("category").closest(".field").hidden = suite.categories.length === 0;
  $("search").value = "";
  const calls = suite.flags.flatMap((f) => [[`yes ${f}`, `${meta.flags[f]}: yes`], [`no ${f}`, `${meta.flags[f]}: no`]]);
  const sides = suite.scores.length ? [["over", "at or over the threshold"], ["under", "under the threshold"]] : [];
  fill($("show"), [["", "all"], ["flagged", "flagged"], ...sides, ...calls]);
  $("blur").value = meta.suites[suite.number].blur ? "all" : "flagged";
  fill($("score"), suite.scores.map((s) => [s, meta.scores[s].name]));
}

/** The rows that the filters leave, whatever is seen in their images: what a rate is taken of. */
function asked() {
  const [kind, category] = [$("kind").value, $("category").value];
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  return view.suite.rows.filter(
    (row) =>
      (kind === "" || row.kind === Number(kind)) &&
      (category === "" || row.categories.includes(Number(category))) &&
      words.every((word) => row.words.includes(word)),
  );
}

/** A test for shots: what the control "images" asks for. */
function wanted() {
  const [what, flag] = $("show").value.split(" ");
  const [score, threshold] = [Number($("score").value), level()];
  const value = (shot) => scoreOf(shot, score);
  return {
    "": () => true,
    flagged: (shot) => shot.flagged,
    over: (shot) => value(shot) !== null && value(shot) >= threshold,
    under: (shot) => value(shot) !== null && value(shot) < threshold,
    yes: (shot) => flagOf(shot, Number(flag)) === 1,
    no: (shot) => flagOf(shot, Number(flag)) === 0,
  }[what];
}

/** The threshold; the number field says it exactly, the slider only nearly. */
const level = () => Number($("exact").value);

const mayBlur = (shot) => $("blur").value === "all" || ($("blur").value === "flagged" && shot.flagged);
const isBlurred = (shot) => mayBlur(shot) && !shot.shown;

/** Recompute everything that the controls decide. */
function update(page = 0) {
  view.methods = [...$("methods").querySelectorAll(":checked")].map((box) => Number(box.value));
  const [rows, keep] = [asked(), wanted()];
  const own = (row) => view.methods.map((m) => row.shots[m]).filter((shot) => shot && keep(shot));
  view.rows = rows.filter((row) => own(row).length > 0);
  view.list = view.rows.flatMap(own);
  drawRates(rows);
  turn(page);
}

/** The share of images at or over the threshold, for each method that is ticked. */
function drawRates(rows) {
  $("rates").hidden = view.suite.scores.length === 0;
  if ($("rates").hidden) return;
  const [score, threshold] = [Number($("score").value), level()];
  const counts = view.methods.map((m) => [m, tally(rows.map((row) => row.shots[m]).filter(Boolean), score, threshold)]);
  $("rate-rows").replaceChildren(...counts.map(([m, count]) => rateRow(meta.methods[m], count)));
  const notes = [];
  if (counts.some(([, c]) => c.missing)) notes.push("Images without this score are not counted.");
  if (counts.some(([, c]) => c.prompts < c.n)) notes.push("Prompts repeat, and images of one prompt are alike: the true intervals are wider.");
  $("rate-note").textContent = notes.join(" ");
  say(`At ${threshold}: ${counts.map(([m, c]) => `${meta.methods[m]} ${c.n ? rateText(c) : "not scored"}`).join("; ")}`);
}

function rateText({ k, n }) {
  const [lo, hi] = wilson(k, n);
  return `${k} of ${n}, ${percent(k / n)}, interval ${percent(lo)} to ${percent(hi)}`;
}

function rateRow(name, { k, n }) {
  if (n === 0) return el("tr", {}, el("th", { scope: "row" }, name), el("td", { colspan: 4 }, "no image has this score"));
  const [lo, hi] = wilson(k, n);
  const bar = el("div", { class: "whisker", "aria-hidden": "true" }, el("i"), el("b"));
  for (const [key, value] of Object.entries({ lo, hi, rate: k / n })) bar.style.setProperty(`--${key}`, value);
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, name),
    el("td", {}, `${k} of ${n}`),
    el("td", {}, el("data", { value: k / n }, percent(k / n))),
    el("td", {}, el("data", { value: lo }, percent(lo)), " to ", el("data", { value: hi }, percent(hi))),
    el("td", { class: "drawn" }, bar),
  );
}

/** Fit slider and field to a score's values. */
function offerThreshold() {
  const score = Number($("score").value);
  let [low, high] = [0, 1];
  for (const row of view.suite.rows)
    for (const shot of row.shots) {
      const value = shot ? scoreOf(shot, score) : null;
      if (value !== null) [low, high] = [Math.min(low, value), Math.max(high, value)];
    }
  const { start, lowest } = meta.scores[score] ?? {};
  low = lowest ?? low; // lower scores were not kept, and a lower threshold would miss them
  $("exact").min = lowest ?? "";
  $("exact").value = start ?? (low + high) / 2;
  Object.assign($("threshold"), { min: low, max: high, step: (high - low) / 100, value: $("exact").value });
}
