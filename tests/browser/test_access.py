"""The report for those who do not see it, or have no mouse: names, landmarks, headings, contrast, focus."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from .pages import DESK, open_at

pytestmark = pytest.mark.browser

CONTRAST = """
    const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
    const linear = c => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
    const ground = e => {
        for (; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            if (colour[3] === 1) return colour;
        }
        return matchMedia('(prefers-color-scheme: dark)').matches ? [0, 0, 0, 1] : [255, 255, 255, 1];
    };
    const low = [];
    for (const e of document.querySelectorAll(arguments[0])) {
        if (!e.checkVisibility() || e.closest('svg, :disabled, .unseen, #unblur')) continue;
        const style = getComputedStyle(e);
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        const big = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && Number(style.fontWeight) >= 700);
        if (own && ratio(parse(style.color), ground(e)) < (big ? 3 : 4.5)) low.push(`text: ${e.outerHTML.slice(0, 90)}`);
        const edged = e.matches('select, input:not([type=range], [type=checkbox]), button:not(.shot)');
        if (edged && ratio(parse(style.borderTopColor), ground(e)) < 3)
            low.push(`edge: ${e.outerHTML.slice(0, 90)}`);
    }
    return low;
"""


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, report: Path) -> Any:
    open_at(browser, report, DESK, request.param)
    return browser


def test_text_and_edges_of_controls_stand_out(page: Any) -> None:
    assert page.execute_script(CONTRAST, "body *") == []
    page.execute_script("document.querySelectorAll('button.shot')[1].click()")
    assert page.execute_script(CONTRAST, "dialog *") == []
    page.execute_script("document.querySelector('#panel-title').style.color = 'var(--line)'")
    assert len(page.execute_script(CONTRAST, "dialog *")) == 1, "the check can fail"


def test_every_control_and_image_has_a_name(page: Any) -> None:
    page.execute_script("document.getElementById('turning').scrollIntoView()")
    controls = page.find_elements("css selector", "main select, main input, main button:not(.shot)")
    shots = page.find_elements("css selector", "button.shot")[:8]
    assert len(controls) >= 14
    for element in (*controls, *shots):
        assert not element.is_displayed() or element.accessible_name.strip(), element.get_attribute("outerHTML")
    names = [shot.accessible_name for shot in shots]
    assert names[0].startswith("Blurred, flagged.") and "base" in names[0] and "unsafe" in names[0]
    assert names[5].startswith("Seen: FACE_FEMALE 0.70.") and "negative_prompt" in names[5].replace(" ", "")
    described = "return document.getElementById(arguments[0].getAttribute('aria-describedby')).textContent"
    assert page.execute_script(described, shots[5]) == "a café at night, seen twice"


def test_landmarks_headings_and_references(page: Any) -> None:
    count = "return arguments[0].map(s => document.querySelectorAll(s).length)"
    assert page.execute_script(count, ["html[lang]", "body > header", "main", "h1"]) == [1, 1, 1, 1]
    levels = page.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3, h4')].filter(h => h.checkVisibility()).map(h => +h.tagName[1])"
    )
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))
    broken = """
        const of = name => [...document.querySelectorAll(`[${name}]`)].flatMap(e => e.getAttribute(name).split(' '));
        const ids = [...of('aria-labelledby'), ...of('aria-describedby'), ...of('for')];
        const links = [...document.querySelectorAll('nav a')].map(a => a.hash.slice(1));
        return [...ids, ...links].filter(id => !document.getElementById(id));
    """
    assert page.execute_script(broken) == []
    navigations = page.find_elements("css selector", "nav")
    assert len({nav.accessible_name for nav in navigations}) == len(navigations) == 2
    assert page.find_element("id", "count").aria_role == page.find_element("id", "said").aria_role == "status"


def test_the_panel_is_a_dialog_that_is_named_by_its_prompt(page: Any) -> None:
    page.execute_script("document.querySelectorAll('button.shot')[5].click()")
    panel = page.find_element("id", "panel")
    assert panel.aria_role == "dialog" and panel.accessible_name == "a café at night, seen twice"
    assert page.execute_script("return document.getElementById('panel').matches(':modal')"), "what is behind is out of reach"
    for button in panel.find_elements("tag name", "button"):
        assert not button.is_displayed() or button.accessible_name.strip()


def test_the_focus_is_seen_and_targets_are_large_enough(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    seen = set()
    for _ in range(40):
        ActionChains(page).send_keys(Keys.TAB).perform()
        width, style, name = page.execute_script(
            """const e = document.activeElement, s = getComputedStyle(e);
            return [parseFloat(s.outlineWidth), s.outlineStyle, e.id || e.tagName]"""
        )
        if name == "BODY":
            break
        assert width >= 2 and style != "none", name
        seen.add(name)
    assert {"suite", "search", "threshold", "exact", "on"} <= seen and "BUTTON" in seen, (
        "all of them by the Tab key, the images as one stop"
    )
    small = """return [...document.querySelectorAll('main button, main select, main input:not([type=checkbox]), #methods label')]
        .filter(e => e.checkVisibility()).filter(e => Math.min(e.getBoundingClientRect().width, e.getBoundingClientRect().height) < 24)
        .map(e => e.outerHTML.slice(0, 80))"""
    assert page.execute_script(small) == []


@pytest.mark.parametrize(("wish", "moves"), [("reduce", False), ("no-preference", True)])
def test_nothing_moves_for_those_who_asked_for_that(browser: Any, report: Path, wish: str, moves: bool) -> None:
    open_at(browser, report, DESK)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": wish}]})
    took = browser.execute_script("return getComputedStyle(document.querySelector('.frame img')).transitionDuration")
    assert (took != "0s") == moves
