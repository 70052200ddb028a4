// The images of a page, a card for each prompt with its methods side by side.

const AT_ONCE = 96; // images on a page, about

const perPage = () => Math.max(4, Math.floor(AT_ONCE / Math.max(1, view.methods.length)));
const pages = () => Math.max(1, Math.ceil(view.rows.length / perPage()));
const buttons = () => [...$("images").querySelectorAll("button.shot")];

/** Show a page; nothing of the other pages is in the document. */
function turn(page) {
  view.page = Math.min(Math.max(page, 0), pages() - 1);
  const from = view.page * perPage();
  $("images").replaceChildren(...view.rows.slice(from, from + perPage()).map((row, i) => card(row, from + i)));
  $("images").style.setProperty("--columns", view.methods.length || 1);
  focusable(buttons()[0]);
  $("page").value = view.page + 1;
  $("page").max = $("pages").textContent = pages();
  $("back").disabled = view.page === 0;
  $("on").disabled = view.page === pages() - 1;
  $("turning").hidden = pages() === 1;
  const [rows, images] = [view.rows.length, view.list.length];
  $("count").textContent = rows ? `${images} ${images === 1 ? "image" : "images"} of ${rows} ${rows === 1 ? "prompt" : "prompts"}` : "Nothing matches.";
}

function card(row, i) {
  const about = [meta.kinds[row.kind], ...row.categories.map((c) => view.suite.categories[c]), `seed ${row.seed}`];
  return el(
    "li",
    { class: "card" },
    el("p", { class: "prompt", id: `prompt-${i}`, dir: "auto" }, row.prompt || "(no prompt)"),
    el("p", { class: "soft" }, about.join(" · ")),
    el("div", { class: "shots" }, ...view.methods.map((m) => row.shots[m]).filter(Boolean).map((shot) => thumbnail(shot, `prompt-${i}`))),
  );
}

/** A button with an image, its method and its outcome; ``describedby`` is the id of its prompt. */
function thumbnail(shot, describedby = null) {
  const image = el("img", { loading: "lazy", decoding: "async", src: shot.src });
  const name = meta.methods[shot.method].split("_").flatMap((part, i) => (i ? ["_", el("wbr"), part] : [part]));
  const words = [el("span", { class: "method" }, ...name), el("span", { class: `status ${shot.tone}` }, shot.status)];
  const button = el("button", { type: "button", class: "shot", "aria-describedby": describedby }, el("span", { class: "frame" }, image), ...words);
  button.shot = shot;
  veil(button);
  return button;
}

/** Blur a button's image or not, in what is seen and in what is read out. */
function veil(button) {
  const blurred = isBlurred(button.shot);
  button.classList.toggle("blurred", blurred);
  button.querySelector("img").alt = describe(button.shot, blurred);
}

function describe(shot, blurred) {
  if (blurred) return `Blurred${shot.flagged ? ", flagged" : ""}.`;
  return shot.note ? `Seen: ${shot.note}.` : "Image.";
}

/** The one image that the Tab key stops at; arrow keys go from it to the others. */
function focusable(button) {
  for (const other of buttons()) other.tabIndex = other === button ? 0 : -1;
}

/** A first press shows a blurred image, the next one opens the panel. */
function press(button) {
  focusable(button);
  if (isBlurred(button.shot)) {
    button.shot.shown = true;
    veil(button);
    say(`Shown. ${describe(button.shot, false)}`);
  } else openPanel(button.shot);
}

/** Which button an arrow key leads to; undefined beyond the page. */
function neighbour(button, key) {
  const all = buttons();
  if (key === "Home") return all[0];
  if (key === "End") return all.at(-1);
  if (key === "ArrowLeft" || key === "ArrowRight") return all[all.indexOf(button) + (key === "ArrowRight" ? 1 : -1)];
  const [from, sign] = [button.getBoundingClientRect(), key === "ArrowDown" ? 1 : -1];
  const far = (other) => {
    const to = other.getBoundingClientRect();
    const down = sign * (to.top - from.top);
    return down > from.height / 2 ? 4 * down + Math.abs(to.left - from.left) : Infinity;
  };
  const best = all.reduce((a, b) => (far(b) < far(a) ? b : a), button);
  return best === button ? undefined : best;
}

function walk(event) {
  const button = event.target.closest("button.shot");
  if (!button || !["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
  event.preventDefault();
  let next = neighbour(button, event.key);
  if (!next && /Right|Down/.test(event.key) && view.page < pages() - 1) next = (turn(view.page + 1), buttons()[0]);
  else if (!next && /Left|Up/.test(event.key) && view.page > 0) next = (turn(view.page - 1), buttons().at(-1));
  if (next) {
    focusable(next);
    next.focus();
  }
}

/** Turn to a shot's page and put the focus on it. */
function goTo(shot) {
  const at = view.rows.indexOf(shot.row);
  if (at >= 0 && Math.floor(at / perPage()) !== view.page) turn(Math.floor(at / perPage()));
  const button = buttons().find((other) => other.shot === shot) ?? buttons().find((other) => other.shot.row === shot.row);
  for (const other of buttons()) veil(other);
  if (button) {
    focusable(button);
    button.focus();
  }
}
