// Wiring, once the page is there.

async function openSuite(number) {
  $("trouble").hidden = true;
  $("count").textContent = "Loading…";
  try {
    const suite = await load(number);
    if (Number($("suite").value) !== number) return; // another one was chosen meanwhile
    view.suite = suite;
  } catch (error) {
    suites.delete(number); // the next choice tries again
    $("trouble").textContent = error.message;
    $("trouble").hidden = false;
    $("count").textContent = "";
    return;
  }
  offer(view.suite);
  offerThreshold();
  update();
}

function wireFilters() {
  $("suite").onchange = () => openSuite(Number($("suite").value));
  for (const id of ["methods", "kind", "category", "show"]) $(id).addEventListener("change", () => update());
  $("search").oninput = () => {
    clearTimeout(wireFilters.timer);
    wireFilters.timer = setTimeout(() => update(), 150);
  };
  $("blur").onchange = () => {
    for (const row of view.suite.rows) for (const shot of row.shots) if (shot) shot.shown = false;
    for (const button of buttons()) veil(button);
  };
  $("clear").onclick = () => {
    offer(view.suite);
    offerThreshold();
    update();
  };
  $("score").onchange = () => {
    offerThreshold();
    update();
  };
  const moved = () => (["over", "under"].includes($("show").value) ? update() : drawRates(asked()));
  $("threshold").oninput = () => {
    $("exact").value = $("threshold").value;
    moved();
  };
  $("exact").oninput = () => {
    if ($("exact").value === "" || !$("exact").validity.valid) return; // being typed, or under what was kept
    $("threshold").value = $("exact").value;
    moved();
  };
}

function wireGallery() {
  $("images").addEventListener("click", (event) => {
    const button = event.target.closest("button.shot");
    if (button) press(button);
  });
  $("images").addEventListener("keydown", walk);
  const turnTo = (page) => {
    turn(page);
    $("gallery-bar").scrollIntoView();
  };
  $("back").onclick = () => turnTo(view.page - 1);
  $("on").onclick = () => turnTo(view.page + 1);
  $("page").onchange = () => turnTo(Math.round(Number($("page").value)) - 1 || 0);
}

for (const form of document.querySelectorAll("form")) form.onsubmit = (event) => event.preventDefault();
fill($("suite"), meta.suites.map((suite, i) => [i, suite.name]));
$("gallery").hidden = false;
wireFilters();
wireGallery();
wirePanel();
openSuite(0);
