// Data: chunks from inside the page, or from data/*.js beside it. Those are scripts, as a page from a disk may not fetch.

const meta = JSON.parse(document.getElementById("meta").textContent);
const waiting = new Map(); // key of a chunk -> who waits for it
const suites = new Map(); // number of a suite -> promise of its rows

window.receive = (key, chunk) => waiting.get(key)?.(chunk);

function chunk(key) {
  const inside = document.getElementById(`chunk-${key}`);
  if (inside) return Promise.resolve(JSON.parse(inside.textContent));
  return new Promise((resolve, reject) => {
    waiting.set(key, resolve);
    const script = document.createElement("script");
    script.src = `data/${key}.js`;
    script.onerror = () => reject(new Error(`data/${key}.js cannot be read. Keep the report's folder whole, or write the report again.`));
    document.head.append(script);
  });
}

/** The rows of a suite, each with its shots by number of the method; loaded when first asked for. */
function load(number) {
  if (!suites.has(number)) suites.set(number, read(number));
  return suites.get(number);
}

async function read(number) {
  const { methods } = meta.suites[number];
  const [named, ...columns] = await Promise.all([chunk(`s${number}`), ...methods.map((m) => chunk(`s${number}-m${m}`))]);
  const rows = named.id.map((id, i) => ({
    id,
    prompt: named.prompt[i],
    words: named.prompt[i].toLowerCase(),
    seed: named.seed[i],
    kind: named.kind[i],
    categories: named.in[i],
    shots: [],
  }));
  columns.forEach((column, i) => place(column, methods[i], rows));
  const used = (field) => [...new Set(columns.flatMap((column) => [...column[field].keys()]))].sort((a, b) => a - b);
  return { number, rows, methods, categories: named.categories, kinds: [...new Set(named.kind)], scores: used("scores"), flags: used("flags") };
}

/** Put one method's images into the rows. Scores stay in their columns, which is what keeps 30,000 images small. */
function place(column, method, rows) {
  column.scores = new Map(column.scores);
  column.flags = new Map(column.flags);
  column.row.forEach((at, i) => {
    const [src, flagged] = [column.src[i], Boolean(column.flagged[i])];
    const [status, tone, note] = [column.status[i], column.tone[i], column.note[i]];
    rows[at].shots[method] = { row: rows[at], method, column, i, src, flagged, status, tone, note, shown: false };
  });
}

const scoreOf = (shot, score) => shot.column.scores.get(score)?.[shot.i] ?? null;
const flagOf = (shot, flag) => shot.column.flags.get(flag)?.[shot.i] ?? null;
