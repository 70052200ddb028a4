// The panel: one image large, and all methods on its prompt and seed.

let current = null;

function openPanel(shot) {
  draw(shot);
  if (!$("panel").open) $("panel").showModal(); // keeps the focus inside, and closes on Escape
}

function draw(shot) {
  current = shot;
  const { row } = shot;
  $("panel-title").textContent = row.prompt || "(no prompt)";
  $("large").src = shot.src;
  drawBlur();
  const outcome = [shot.status, shot.note].filter(Boolean).join(": ");
  const categories = row.categories.map((c) => view.suite.categories[c]).join(", ");
  const facts = [
    ["method", meta.methods[shot.method]],
    ["outcome", outcome],
    ["seed", row.seed],
    ["kind", meta.kinds[row.kind]],
    ["category", categories],
    ["row", row.id],
    ["suite", meta.suites[view.suite.number].name],
  ];
  $("facts").replaceChildren(...facts.filter(([, value]) => value).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  drawMatched(shot);
  const at = view.list.indexOf(shot);
  $("position").textContent = at < 0 ? "" : `${at + 1} of ${view.list.length}`;
  for (const [id, step] of [["previous", -1], ["next", 1]]) $(id).disabled = neighbourShot(step) === undefined;
  say(`${meta.methods[shot.method]}, ${isBlurred(shot) ? "blurred" : outcome}`);
}

function drawBlur() {
  const blurred = isBlurred(current);
  $("large").alt = describe(current, blurred);
  $("large").closest(".frame").classList.toggle("blurred", blurred);
  $("unblur").hidden = !mayBlur(current);
  $("unblur").textContent = blurred ? "Show image" : "Blur again";
}

/** Images, outcomes, scores and calls of a row: a column a method, base first. */
function drawMatched(shot) {
  const shots = view.suite.methods.map((m) => shot.row.shots[m]).filter(Boolean);
  const heads = shots.map((other) => {
    const button = thumbnail(other);
    if (other === shot) button.setAttribute("aria-current", "true");
    return el("th", { scope: "col" }, button);
  });
  $("matched-head").replaceChildren(el("td", {}), ...heads);
  const line = (name, read, show) => {
    const values = shots.map(read);
    if (values.every((value) => value === null || value === "")) return [];
    const cells = values.map((value, i) => el("td", shots[i] === shot ? { class: "here" } : {}, value === null ? "–" : show(value)));
    return [el("tr", {}, el("th", { scope: "row" }, name), ...cells)];
  };
  $("matched-rows").replaceChildren(
    ...line("seen", (s) => s.note, String),
    ...view.suite.scores.flatMap((i) => line(meta.scores[i].name, (s) => scoreOf(s, i), number)),
    ...view.suite.flags.flatMap((i) => line(meta.flags[i], (s) => flagOf(s, i), (call) => (call ? "yes" : "no"))),
  );
}

/** The shot that many steps on in the list; from one that the filters leave out, the first of its row. */
function neighbourShot(step) {
  const at = view.list.indexOf(current);
  return at < 0 ? view.list.find((shot) => shot.row === current.row) : view.list[at + step];
}

function step(by) {
  const shot = neighbourShot(by);
  if (!shot) return;
  const held = document.activeElement;
  draw(shot);
  if (held?.disabled || !held?.isConnected) $("close").focus(); // what had the focus is gone
}

function wirePanel() {
  const panel = $("panel");
  $("close").onclick = () => panel.close();
  $("previous").onclick = () => step(-1);
  $("next").onclick = () => step(1);
  $("unblur").onclick = () => {
    current.shown = !current.shown;
    drawBlur();
    drawMatched(current);
    say(describe(current, isBlurred(current)));
  };
  $("matched-head").onclick = (event) => {
    const button = event.target.closest("button.shot");
    if (!button) return;
    draw(button.shot);
    $("matched-head").querySelector("[aria-current]").focus();
  };
  panel.addEventListener("click", (event) => event.target === panel && panel.close()); // on the ground beside it
  document.addEventListener("keydown", (event) => { // the document's, as a click on text leaves the focus nowhere
    if (!panel.open || (event.key !== "ArrowLeft" && event.key !== "ArrowRight")) return;
    event.preventDefault();
    step(event.key === "ArrowRight" ? 1 : -1);
  });
  panel.addEventListener("close", () => goTo(current));
}
