"""Opening a page in the browser, and asking what came of it."""

import json
import time
from pathlib import Path
from typing import Any

PHONE, DESK = (375, 800), (1280, 900)


def open_at(browser: Any, path: Path, size: tuple[int, int], scheme: str = "light") -> None:
    """Load a file in a window of that size, in CSS pixels, and let its images settle."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    for kind in ("browser", "performance"):  # what earlier pages did
        browser.get_log(kind)
    browser.get(path.as_uri())
    wait(browser, "return document.getElementById('images') === null || document.querySelector('button.shot') !== null")
    browser.execute_async_script(
        "const done = arguments[0];"
        "Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().catch(() => 0); })).then(() => done());"
    )


def wait(browser: Any, script: str, seconds: float = 10) -> None:
    """Until the script gives something true."""
    end = time.monotonic() + seconds
    while not browser.execute_script(script):
        assert time.monotonic() < end, f"still not so after {seconds} s: {script}"
        time.sleep(0.02)


def errors(browser: Any) -> list[str]:
    return [line["message"] for line in browser.get_log("browser") if line["level"] in ("SEVERE", "ERROR")]


def empty_images(browser: Any) -> list[str]:
    empty = "!(i.naturalWidth > 0) && !i.closest('dialog:not([open])')"
    script = f"return [...document.images].filter(i => {empty}).map(i => i.outerHTML.slice(0, 200))"
    return list(browser.execute_script(script))


def stretched(browser: Any) -> list[str]:
    """Images whose sides are not shown in proportion."""
    off = "Math.abs(i.width / i.height - i.naturalWidth / i.naturalHeight) > 0.02 && getComputedStyle(i).objectFit !== 'contain'"
    return list(browser.execute_script(f"return [...document.images].filter(i => {off}).map(i => i.alt)"))


def overhang(browser: Any) -> int:
    """Pixels by which the page is wider than its window."""
    script = "const e = document.documentElement; return Math.max(e.scrollWidth, document.body.scrollWidth) - e.clientWidth"
    return int(browser.execute_script(script))


def wide(browser: Any) -> list[str]:
    """What sticks out of the window and is in no frame that scrolls."""
    script = """
        const free = e => !e.closest('.scroll, .shots, pre, svg, dialog, .unseen') || e.matches('.scroll, .shots, pre, svg');
        const out = e => Math.max(e.getBoundingClientRect().right, e.scrollWidth) > document.documentElement.clientWidth;
        const name = e => e.tagName + ': ' + e.textContent.trim().slice(0, 60);
        return [...document.body.querySelectorAll('*')].filter(e => free(e) && out(e)).map(name);
    """
    return list(browser.execute_script(script))


def addresses(browser: Any) -> list[str]:
    """All that the page asked for, itself among it."""
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def requested(browser: Any) -> list[str]:
    """Addresses that the page asked for beyond itself."""
    return [url for url in addresses(browser) if not url.startswith("data:") and url != browser.current_url]
