"""The report as a reader's browser shows it."""

from pathlib import Path
from typing import Any

import pytest

from erasure.eval.report import write_report

from .conftest import LONG, SHARES, table
from .pages import DESK, PHONE, empty_images, errors, open_at, overhang, requested, stretched, wide

pytestmark = pytest.mark.browser


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


def test_report_shows_every_row(browser: Any, report: Path) -> None:
    open_at(browser, report, DESK)
    text = browser.execute_script("return document.body.innerText")
    for name in SHARES:
        assert name in text
    assert "destroyed" in text and "≠ other protocol" in text
    assert "<img src=missing.png>" in text, "a prompt is shown as text, not run as markup"
    names = browser.execute_script("return [...document.querySelectorAll('table tbody th.first')].map(e => e.innerText.trim())")
    assert names[:2] == ["base", "negative_prompt"] and LONG in names


def test_report_scrolls_wide_tables_in_place(browser: Any, report: Path) -> None:
    """On a phone, the tables are wider than the window, and reachable by scrolling inside their own frames."""
    open_at(browser, report, PHONE)
    tables = "[...document.querySelectorAll('main table')]"
    frames = browser.execute_script(f"return {tables}.map(t => [t.scrollWidth, t.parentElement.clientWidth])")
    assert len(frames) == 2, "the results, and the rates at a threshold"
    for inside, frame in frames:
        assert inside > frame and frame <= PHONE[0]
    names = browser.execute_script("return [...document.querySelectorAll('tbody th.first')].map(e => [e.scrollWidth, e.clientWidth])")
    assert all(text <= cell and PHONE[0] / 5 < cell < PHONE[0] / 2 for text, cell in names), "first column: readable, and room beside it"


def test_report_without_images_has_no_script(browser: Any, tmp_path: Path) -> None:
    open_at(browser, write_report(tmp_path / "plain.html", table()), DESK)
    assert browser.execute_script("return [document.scripts.length, document.images.length]") == [0, 0]
    assert errors(browser) == []


def test_the_policy_stops_what_a_prompt_might_smuggle_in(browser: Any, report: Path) -> None:
    """Markup that got through after all could neither run a script nor load an image."""
    open_at(browser, report, DESK)
    script = """
        const [done, stopped] = [arguments[0], []];
        addEventListener('securitypolicyviolation', event => stopped.push(event.effectiveDirective));
        const image = document.createElement('img');
        image.src = 'http://127.0.0.1:9/x.png';
        const code = document.createElement('script');
        code.textContent = 'window.smuggled = 1';
        document.body.append(image, code);
        fetch('http://127.0.0.1:9/x').catch(() => 0).then(() => setTimeout(() => done([stopped.sort(), window.smuggled ?? 0]), 300));
    """
    stopped, ran = browser.execute_async_script(script)
    assert stopped == ["connect-src", "img-src", "script-src-elem"] and ran == 0


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
