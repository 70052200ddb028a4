"""The report as a reader's browser shows it."""

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import LONG, SHARES

pytestmark = pytest.mark.browser
PHONE, DESK = (375, 800), (1280, 900)


def open_at(browser: Any, path: Path, size: tuple[int, int], scheme: str = "light") -> None:
    """Load a file in a window of that size, in CSS pixels, and let its images settle."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    for kind in ("browser", "performance"):  # what earlier pages did
        browser.get_log(kind)
    browser.get(path.as_uri())
    browser.execute_async_script(
        "const done = arguments[0];"
        "Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().catch(() => 0); })).then(() => done());"
    )


def errors(browser: Any) -> list[str]:
    return [line["message"] for line in browser.get_log("browser") if line["level"] in ("SEVERE", "ERROR")]


def empty_images(browser: Any) -> list[str]:
    script = "return [...document.images].filter(i => !(i.naturalWidth > 0)).map(i => i.outerHTML.slice(0, 200))"
    return list(browser.execute_script(script))


def stretched(browser: Any) -> list[str]:
    """Images whose sides are not shown in proportion."""
    off = "Math.abs(i.width / i.height - i.naturalWidth / i.naturalHeight) > 0.02"
    return list(browser.execute_script(f"return [...document.images].filter(i => {off}).map(i => i.alt)"))


def overhang(browser: Any) -> int:
    """Pixels by which the page is wider than its window."""
    script = "const e = document.documentElement; return Math.max(e.scrollWidth, document.body.scrollWidth) - e.clientWidth"
    return int(browser.execute_script(script))


def wide(browser: Any) -> list[str]:
    """What sticks out of the window and is in no frame that scrolls."""
    script = """
        const free = e => !e.closest('.scroll, pre, svg') || e.matches('.scroll, pre, svg');
        const out = e => Math.max(e.getBoundingClientRect().right, e.scrollWidth) > document.documentElement.clientWidth;
        const name = e => e.tagName + ': ' + e.textContent.trim().slice(0, 60);
        return [...document.body.querySelectorAll('*')].filter(e => free(e) && out(e)).map(name);
    """
    return list(browser.execute_script(script))


def requested(browser: Any) -> list[str]:
    """Addresses that the page asked for beyond itself."""
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith("data:") and url != browser.current_url]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_report_shows_without_errors(browser: Any, report: Path, size: tuple[int, int], scheme: str) -> None:
    open_at(browser, report, size, scheme)
    assert errors(browser) == []
    assert empty_images(browser) == []
    assert stretched(browser) == []
    assert overhang(browser) <= 0, f"wider than the window: {wide(browser)}"
    assert browser.execute_script("return innerWidth") == size[0]
    assert requested(browser) == []


def test_report_shows_every_row_and_image(browser: Any, report: Path) -> None:
    open_at(browser, report, DESK)
    assert browser.execute_script("return document.images.length") == 5 * len(SHARES)
    text = browser.execute_script("return document.body.innerText")
    for name in SHARES:
        assert name in text
    assert "destroyed" in text and "≠ other protocol" in text
    assert "<img src=missing.png>" in text, "a prompt is shown as text, not run as markup"
    names = browser.execute_script("return [...document.querySelectorAll('table:first-of-type tbody th')].map(e => e.innerText.trim())")
    assert names[:2] == ["base", "negative_prompt"] and LONG in names
    assert browser.execute_script("return [...document.images].every(i => i.alt.length > 0)")


def test_report_scrolls_wide_tables_in_place(browser: Any, report: Path) -> None:
    """On a phone, the tables are wider than the window, and reachable by scrolling inside their own frames."""
    open_at(browser, report, PHONE)
    frames = browser.execute_script("return [...document.querySelectorAll('table')].map(t => [t.scrollWidth, t.parentElement.clientWidth])")
    assert len(frames) == 2
    for table, frame in frames:
        assert table > frame and frame <= PHONE[0]
    names = browser.execute_script("return [...document.querySelectorAll('tbody th.first')].map(e => [e.scrollWidth, e.clientWidth])")
    assert all(text <= cell and PHONE[0] / 5 < cell < PHONE[0] / 2 for text, cell in names), "first column: readable, and room beside it"


def test_checks_catch_a_broken_page(browser: Any, tmp_path: Path) -> None:
    """The checks of this file can fail."""
    page = tmp_path / "broken.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><img src="gone.png"><div style="width: 900px">wide</div><script>nope()</script>'
    )
    open_at(browser, page, PHONE)
    assert len(errors(browser)) == 2
    assert len(empty_images(browser)) == 1
    assert overhang(browser) >= 500 and any("wide" in line for line in wide(browser))
    assert len(requested(browser)) == 1
