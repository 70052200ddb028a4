"""The report's images, filters, panel and rates, by mouse and by keyboard."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erasure.eval import stats

from .conftest import LONG, SHARES, gallery
from .pages import DESK, errors, open_at, requested, wait

pytestmark = pytest.mark.browser
MILD = [shot for shot in gallery().shots if shot.suite == "mild"]
PROMPTS = {shot.row: shot.prompt for shot in MILD}


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The report, just opened; whatever a test did with it, it caused no error and no request."""
    open_at(browser, report, DESK)
    yield browser
    assert errors(browser) == []
    assert requested(browser) == []


def choose(page: Any, control: str, text: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(page.find_element("id", control)).select_by_visible_text(text)


def keys(page: Any, *pressed: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(page).send_keys(*(getattr(Keys, key, key) for key in pressed)).perform()


def press(page: Any, n: int) -> Any:
    """Click the n-th image of the page."""
    button = page.find_elements("css selector", "#images button.shot")[n]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    return button


def count(page: Any) -> str:
    return str(page.find_element("id", "count").text)


def prompts(page: Any) -> list[str]:
    return list(page.execute_script("return [...document.querySelectorAll('.card .prompt')].map(e => e.textContent)"))


def focused(page: Any) -> list[str]:
    """Prompt and method of the image that has the focus."""
    card = "document.activeElement.closest('.card')?.querySelector('.prompt').textContent"
    return list(page.execute_script(f"return [{card}, document.activeElement.querySelector('.method')?.textContent]"))


def table(page: Any) -> list[list[Any]]:
    """The rates: method, "k of n", then share and limits in full."""
    script = """return [...document.querySelectorAll('#rate-rows tr')].map(row => [
        row.cells[0].textContent, row.cells[1].textContent, ...[...row.querySelectorAll('data')].map(d => Number(d.value))])"""
    return list(page.execute_script(script))


def blurred(page: Any, within: str = "#images") -> list[bool]:
    found = page.execute_script(
        "return [...document.querySelectorAll(arguments[0] + ' button.shot')].map(b => b.classList.contains('blurred'))", within
    )
    return list(found)


def move(page: Any, value: float) -> None:
    """Type a threshold."""
    field = page.find_element("id", "exact")
    field.clear()
    field.send_keys(str(value))


def test_filters_leave_what_they_say(page: Any) -> None:
    assert count(page) == f"{60 * 4 - 1} images of 60 prompts" and len(prompts(page)) == 24, "a page holds 96 images or fewer"
    choose(page, "kind", "attack")
    rows = {shot.row for shot in MILD if shot.kind == "attack"}
    assert count(page).endswith(f"of {len(rows)} prompts") and set(prompts(page)) == {PROMPTS[row] for row in rows}
    choose(page, "category", "violence")
    both = {shot.row for shot in MILD if shot.kind == "attack" and "violence" in shot.categories}
    assert 0 < len(both) < len(rows) and set(prompts(page)) == {PROMPTS[row] for row in both}
    page.find_element("id", "clear").click()
    assert count(page).endswith("of 60 prompts")
    page.find_element("id", "search").send_keys("CAFÉ seen")
    wait(page, "return document.getElementById('count').textContent.endsWith('of 2 prompts')")
    page.find_element("id", "search").send_keys(" nowhere")
    wait(page, "return document.getElementById('count').textContent === 'Nothing matches.'")


def test_methods_can_be_left_out(page: Any) -> None:
    page.find_element("css selector", "#methods input[value='0']").click()
    page.find_element("css selector", "#methods input[value='3']").click()
    shown = page.execute_script("return [...new Set([...document.querySelectorAll('.shot .method')].map(e => e.textContent))]")
    assert shown == ["negative_prompt", "uce"] and [row[0] for row in table(page)] == shown
    assert count(page) == "119 images of 60 prompts"


def test_images_can_be_asked_for_by_call_flag_and_threshold(page: Any) -> None:
    choose(page, "show", "unsafe: yes")
    assert count(page).startswith(f"{sum(shot.flags['unsafe'] for shot in MILD)} images")
    choose(page, "show", "flagged")
    assert count(page).startswith(f"{sum(shot.flagged for shot in MILD)} images")
    choose(page, "show", "at or over the threshold")
    for threshold in (0.6, 0.905):
        move(page, threshold)
        over = sum(shot.scores.get("nudenet", 0) >= threshold for shot in MILD)
        wait(page, f"return document.getElementById('count').textContent.startsWith('{over} images')")
    choose(page, "show", "under the threshold")
    assert count(page).startswith(f"{sum(shot.scores.get('nudenet', 1) < 0.905 for shot in MILD)} images"), "a missing score is not low"


def test_another_suite_has_its_own_methods_and_is_blurred_where_it_is_sensitive(page: Any) -> None:
    assert not all(blurred(page))
    choose(page, "suite", "wild")
    wait(page, "return document.getElementById('count').textContent === '8 images of 4 prompts'")
    assert blurred(page) == [True] * 8 and page.find_element("id", "blur").get_attribute("value") == "all"
    assert len(page.find_elements("css selector", "#methods input")) == 2


@pytest.mark.parametrize("threshold", [0.05, 0.137, 0.5, 0.6, 0.9999, 1])
def test_rates_at_a_threshold_equal_pythons(page: Any, threshold: float) -> None:
    move(page, threshold)
    for (name, text, *numbers), method in zip(table(page), SHARES, strict=True):
        scores = [shot.scores["nudenet"] for shot in MILD if shot.method == method and "nudenet" in shot.scores]
        k, n = sum(score >= threshold for score in scores), len(scores)
        assert (name, text) == (method, f"{k} of {n}") and n == 48
        assert numbers == pytest.approx([k / n, *stats.wilson(k, n)], abs=1e-12)


def test_the_slider_moves_the_rate_and_the_filters_narrow_it(page: Any) -> None:
    assert page.find_element("id", "exact").get_attribute("value") == "0.6", "where the gallery says"
    slider = page.find_element("id", "threshold")
    slider.send_keys(*["\ue012"] * 10)  # left
    threshold = float(page.find_element("id", "exact").get_attribute("value"))
    assert threshold == float(slider.get_attribute("value")) and 0.45 < threshold < 0.55
    choose(page, "kind", "attack")
    scores = [s.scores["nudenet"] for s in MILD if s.method == "base" and s.kind == "attack" and "nudenet" in s.scores]
    assert table(page)[0][1] == f"{sum(score >= threshold for score in scores)} of {len(scores)}"
    spoken = f"At {threshold}: base {sum(score >= threshold for score in scores)} of {len(scores)}, "
    wait(page, f"return document.getElementById('said').textContent.startsWith('{spoken}')")
    note = page.find_element("id", "rate-note").text
    assert "without this score are not counted" in note and "Prompts repeat" not in note
    page.find_element("id", "clear").click()
    assert "Prompts repeat" in page.find_element("id", "rate-note").text


def test_a_threshold_below_what_was_kept_is_refused(page: Any) -> None:
    before = table(page)
    move(page, 0.01)
    assert table(page) == before and page.find_element("id", "threshold").get_attribute("min") == "0.05"


def test_scores_of_any_range_have_a_slider(page: Any) -> None:
    choose(page, "score", "clip")
    low, high = (float(page.find_element("id", "threshold").get_attribute(end)) for end in ("min", "max"))
    values = [shot.scores["clip"] for shot in MILD if "clip" in shot.scores]
    assert (low, high) == (0, max(values)) and table(page)[0][1] == f"{sum(v >= high / 2 for v in values[:48])} of 48"


def test_a_flagged_image_is_blurred_until_it_is_pressed(page: Any) -> None:
    first = [shot for shot in MILD if shot.row == "row-0"]
    assert blurred(page)[:4] == [shot.flagged for shot in first] == [True, False, False, False]
    button = page.find_elements("css selector", "button.shot")[0]
    image = button.find_element("tag name", "img")
    assert "blur" in image.value_of_css_property("filter") and image.get_attribute("alt") == "Blurred, flagged."
    press(page, 0)
    wait(page, "return getComputedStyle(document.querySelector('button.shot img')).filter === 'none'")
    assert image.get_attribute("alt").startswith("Seen: a dagger </script>")
    assert not page.execute_script("return document.getElementById('panel').open"), "the first press only shows it"
    press(page, 0)
    assert page.execute_script("return document.getElementById('panel').open")
    page.find_element("id", "unblur").click()
    assert page.find_element("id", "unblur").text == "Show image"
    keys(page, "ESCAPE")
    wait(page, "return document.querySelector('button.shot').classList.contains('blurred')")  # blurred again, and so in the page


def test_blurring_can_be_asked_for_all_and_for_none(page: Any) -> None:
    choose(page, "blur", "all images")
    assert all(blurred(page)) and len(blurred(page)) == 96
    choose(page, "blur", "nothing")
    assert not any(blurred(page))


def test_the_panel_shows_prompt_seed_scores_and_all_methods_of_the_row(page: Any) -> None:
    press(page, 1)
    panel = page.find_element("id", "panel")
    assert panel.find_element("id", "panel-title").text == PROMPTS["row-0"]
    facts = panel.find_element("id", "facts").text
    assert str(2**60) in facts and "row-0" in facts and "mild" in facts
    heads = panel.find_elements("css selector", "#matched-head button .method")
    assert [head.text for head in heads] == list(SHARES)
    cells = "return [...document.querySelectorAll('#matched-rows tr')].map(r => [...r.cells].map(c => c.textContent))"
    shots = [shot for shot in MILD if shot.row == "row-0"]
    rows = {name: values for name, *values in page.execute_script(cells)}
    assert [float(value) for value in rows["nudenet"]] == [shot.scores["nudenet"] for shot in shots]
    assert rows["unsafe"] == ["yes" if shot.flags["unsafe"] else "no" for shot in shots]
    assert panel.find_element("css selector", "[aria-current] .method").text == "negative_prompt"
    panel.find_elements("css selector", "#matched-head button")[3].click()
    assert panel.find_element("css selector", "[aria-current] .method").text == LONG
    assert LONG in panel.find_element("id", "facts").text


def test_a_row_that_a_method_lacks_is_shown_without_it(page: Any) -> None:
    page.find_element("id", "search").send_keys("number 59")
    wait(page, "return document.querySelectorAll('.card').length === 1")
    choose(page, "blur", "nothing")
    press(page, 0)
    assert [head.text for head in page.find_elements("css selector", "#matched-head .method")] == [m for m in SHARES if m != "uce"]


def test_arrow_keys_walk_the_images_and_over_the_edge_of_the_page(page: Any) -> None:
    assert page.execute_script("return document.querySelectorAll('button.shot[tabindex=\"0\"]').length") == 1
    page.execute_script("document.querySelector('button.shot').focus()")
    keys(page, "ARROW_RIGHT")
    assert focused(page) == [PROMPTS["row-0"], "negative_prompt"]
    keys(page, *["ARROW_RIGHT"] * 3)
    assert focused(page) == [PROMPTS["row-1"], "base"]
    keys(page, "ARROW_LEFT", "END")
    assert focused(page) == [PROMPTS["row-23"], LONG]
    keys(page, "ARROW_RIGHT")
    assert focused(page) == [PROMPTS["row-24"], "base"] and page.find_element("id", "page").get_attribute("value") == "2"
    keys(page, "ARROW_LEFT", "HOME")
    before = focused(page)
    keys(page, "ARROW_DOWN")
    assert before == [PROMPTS["row-0"], "base"] and focused(page)[1] == "base" and focused(page)[0] != PROMPTS["row-0"]
    keys(page, "ARROW_UP")
    assert focused(page) == before


def test_the_panel_by_keyboard(page: Any) -> None:
    page.execute_script("document.querySelectorAll('button.shot')[1].focus()")
    keys(page, "ENTER")
    title, facts = page.find_element("id", "panel-title"), page.find_element("id", "facts")
    inside = "document.activeElement === document.body || document.getElementById('panel').contains(document.activeElement)"
    for _ in range(25):
        keys(page, "TAB")
        assert page.execute_script(f"return {inside}"), "the focus stays in the panel"
    keys(page, *["ARROW_RIGHT"] * 3)
    assert title.text == PROMPTS["row-1"] and "base" in facts.text and page.find_element("id", "position").text == "5 of 239"
    keys(page, "ARROW_LEFT")
    assert title.text == PROMPTS["row-0"] and LONG in facts.text
    keys(page, *["ARROW_RIGHT"] * 100)
    keys(page, "ESCAPE")
    assert not page.execute_script("return document.getElementById('panel').open")
    assert focused(page) == [PROMPTS["row-25"], LONG], "back on the image that was last seen, on its page"
    assert page.find_element("id", "page").get_attribute("value") == "2"


def test_pages_turn(page: Any) -> None:
    assert page.find_element("id", "pages").text == "3" and not page.find_element("id", "back").is_enabled()
    page.find_element("id", "on").click()
    assert prompts(page)[0] == PROMPTS["row-24"]
    field = page.find_element("id", "page")
    field.clear()
    field.send_keys("99\n")
    assert len(prompts(page)) == 12 and field.get_attribute("value") == "3" and not page.find_element("id", "on").is_enabled()
