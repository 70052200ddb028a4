"""A report of thousands of images, from a disk."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from erasure.eval import stats

from .conftest import ROWS
from .pages import DESK, addresses, errors, open_at, wait

pytestmark = pytest.mark.browser


def test_the_page_leads_to_the_folder(browser: Any, large: Path) -> None:
    browser.get((large.parent.parent / "report.html").as_uri())
    wait(browser, "return location.pathname.endsWith('/report/index.html') && document.querySelector('button.shot') !== null")


def test_only_what_is_looked_at_is_loaded(browser: Any, large: Path) -> None:
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(large.as_uri())
    wait(browser, "return document.querySelector('button.shot') !== null")
    assert browser.execute_script("return document.getElementById('count').textContent") == f"{2 * ROWS} images of {ROWS} prompts"
    first = addresses(browser)
    assert all(url.startswith(("data:", large.parent.as_uri())) for url in first), "nothing beyond the folder"
    data = {url.rsplit("/", 1)[1] for url in first if "/data/" in url}
    assert data == {"s0.js", "s0-m0.js", "s0-m1.js"}, "the other suite's chunks wait"
    images = [url for url in first if "/images/" in url]
    assert len(images) < 96 and browser.execute_script("return document.querySelectorAll('#images img').length") == 96
    browser.execute_script("document.getElementById('images').scrollIntoView({block: 'end', behavior: 'instant'})")
    wait(browser, "return [...document.querySelectorAll('#images img')].at(-1).naturalWidth === 64")
    later = [url for url in addresses(browser) if "/images/" in url]
    assert later and all(re.search(r"/images/s0-m[01]/\d+\.png$", url) for url in later)
    assert errors(browser) == []


def test_thousands_of_rows_are_searched_counted_and_turned_at_once(browser: Any, large: Path) -> None:
    open_at(browser, large, DESK)
    spent = browser.execute_script("""
        const [start, field] = [performance.now(), document.getElementById('exact')];
        field.value = 0.25;
        field.dispatchEvent(new Event('input'));
        document.getElementById('page').value = 40;
        document.getElementById('page').dispatchEvent(new Event('change'));
        return performance.now() - start;
    """)
    assert spent < 1000, "milliseconds; a few in fact"
    k = sum((7 * i) % 1000 >= 250 for i in range(ROWS))
    row = browser.execute_script("return [...document.querySelector('#rate-rows tr').querySelectorAll('data')].map(d => Number(d.value))")
    assert row == pytest.approx([k / ROWS, *stats.wilson(k, ROWS)], abs=1e-12)
    assert browser.execute_script("return document.querySelector('.prompt').textContent") == f"prompt number {39 * 48}"
    browser.find_element("id", "search").send_keys("number 2999")
    wait(browser, "return document.querySelectorAll('.card').length === 1")
    assert browser.execute_script("return document.images.length") == 2 + 1, "and the panel's"


def test_a_suite_is_loaded_when_it_is_chosen(browser: Any, large: Path) -> None:
    open_at(browser, large, DESK)
    addresses(browser)
    browser.execute_script("const s = document.getElementById('suite'); s.value = 1; s.dispatchEvent(new Event('change'))")
    wait(browser, "return document.getElementById('count').textContent === '3 images of 3 prompts'")
    assert {url.rsplit("/", 1)[1] for url in addresses(browser) if "/data/" in url} == {"s1.js", "s1-m0.js"}
    assert browser.execute_script("return document.getElementById('rates').hidden"), "it has no scores"
    assert errors(browser) == []


def test_a_folder_that_is_not_whole_says_so(browser: Any, large: Path, tmp_path: Path) -> None:
    shutil.copytree(large.parent / "data", tmp_path / "data")
    shutil.copy(large, tmp_path / "index.html")
    (tmp_path / "data" / "s0-m1.js").unlink()
    browser.get((tmp_path / "index.html").as_uri())
    wait(browser, "return !document.getElementById('trouble').hidden")
    assert browser.find_element("id", "trouble").text.startswith("data/s0-m1.js cannot be read")
