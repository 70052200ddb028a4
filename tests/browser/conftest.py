"""A report of made-up results, and a headless Chromium to open it in."""

import io
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from erasure.concept import Concept
from erasure.eval import protocol, suite
from erasure.eval.compare import Comparison, Entry, compare
from erasure.eval.report import Gallery, Shot, write_report
from erasure.eval.rows import KINDS
from erasure.eval.score import KEPT, Sample
from erasure.eval.store import rows_hash
from erasure.eval.summary import Cost, summarise

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)
HOSTILE = """a dagger </script><img src=missing.png> & "a" <script>console.error('from a prompt')</script>"""
ROWS, ROWS_OF_FIRST = 3000, 60
LONG = "a_method_with_a_very_long_name_that_somebody_else_registered_as_a_plug_in"
SHARES = {"base": (0.95, 0.95, 0.02), "negative_prompt": (0.4, 0.9, 0.03), "uce": (0.02, 0.9, 0.03), LONG: (0.0, 0.1, 0.8)}
"""Name -> shares of target left, others kept, unrecognised."""


def refuse(reason: str) -> None:
    """Skip, aloud; where CI=1 says that the browser has to be here, fail."""
    print(f"browser test not run: {reason}")
    if os.environ.get("CI") == "1":
        pytest.fail(f"{reason} (and CI=1 asks for it)")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Chromium of our own: fresh profile, console kept, nothing fetched."""
    try:
        from selenium import webdriver
    except ImportError:
        refuse("selenium is not installed: make install")
    binary = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        refuse("Chromium and chromedriver are not on the PATH: make browser")
    options = webdriver.ChromeOptions()
    options.binary_location = str(binary)
    flags = [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium has no sandbox for root
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY"):  # the driver listens on this machine
            patch.setenv(name, ",".join(filter(None, [os.environ.get(name), "localhost,127.0.0.1"])))
        chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
        chromium.set_page_load_timeout(60)
        yield chromium
        chromium.quit()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """report.html with everything that it can show, and with what could break it."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    commands = ["erasure bench --model canvas --concept dagger --methods " + ",".join([*SHARES, LONG, LONG])]
    return write_report(path, table(), gallery(), commands=commands)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of a report of 3,000 rows by two methods, and of a second suite."""
    folder = tmp_path_factory.mktemp("large")
    images = [folder / f"{i}.png" for i in range(20)]
    for i, path in enumerate(images):
        Image.new("RGB", (64, 64), (12 * i, 90, 160)).save(path)
    many = [
        Shot("many", m, f"r{i}", "other", f"prompt number {i}", i, images[i % 20], scores={"nudenet": ((7 * i + 3 * j) % 1000) / 1000})
        for j, m in enumerate(("base", "uce"))
        for i in range(ROWS)
    ]
    second = [Shot("second", "base", f"q{i}", "other", f"another {i}", i, images[i]) for i in range(3)]
    return write_report(folder / "report.html", table(), Gallery((*many, *second), {"nudenet": 0.6}))


def table() -> Comparison:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "judge_sha256", lambda name: "0" * 64)  # no judge is asked
        of = suite.load_suite("canvas-demo")
        other = of.under(steps=7)
    base = entry(of, "base", None)
    methods = [entry(of, name, base.samples) for name in SHARES if name != "base"]
    return compare([base, *methods, entry(other, "at_other_steps", base.samples)])


def entry(of: suite.Suite, name: str, base: Any) -> Entry:
    """Results of a model that does as SHARES says."""
    rng, rows, concept = random.Random(name), of.rows(Concept("dagger")), Concept("dagger")
    target, kept, broken = SHARES.get(name, (0.5, 0.5, 0.1))
    samples = []
    for row in rows:
        unrecognised = rng.random() < broken
        shown = row.kind not in KEPT and not unrecognised and rng.random() < target
        wanted = None if row.kind in ("named", "implied") else not unrecognised and rng.random() < kept
        calls = (shown, not shown and not unrecognised, unrecognised)
        seen = () if unrecognised else ("dagger",) if shown else ("banana",)
        ok = (None if row.style is None else True, None if row.background is None else not unrecognised)
        samples.append(Sample(row.id, row.kind, row.prompt, row.seed, *calls, wanted, *ok, {}, seen, "flat", "white"))
    cost = Cost(1.5, 300.0, 0.5, 0.4)
    return Entry(summarise(samples, base, name=name, concept=concept, suite=of, rows=rows_hash(rows), cost=cost), samples)


def gallery() -> Gallery:
    """Two suites. Of the first, "uce" lacks the last row, and one image in five is flagged; all of the second is sensitive."""
    mild = [shot(name, i, j) for j, name in enumerate(SHARES) for i in range(ROWS_OF_FIRST) if (name, i) != ("uce", ROWS_OF_FIRST - 1)]
    wild = [replace(shot(name, i, j), suite="wild") for j, name in enumerate(list(SHARES)[:2]) for i in range(4)]
    return Gallery((*mild, *wild), {"nudenet": 0.6}, frozenset({"wild"}), {"nudenet": 0.05})


def shot(name: str, i: int, j: int) -> Shot:
    """Row i by method j; every row in five lacks the score, and a prompt comes twice."""
    kind, out = KINDS[i % len(KINDS)], io.BytesIO()
    Image.radial_gradient("L").convert("RGB").resize((64, 64) if i else (96, 64)).save(out, "PNG")
    prompt = HOSTILE if i == 0 else "a café at night, seen twice" if i in (1, 8) else f"a {kind} prompt, number {i}"
    return Shot(
        "mild",
        name,
        f"row-{i}",
        kind,
        prompt,
        2**60 + i,
        out.getvalue(),
        categories=("<b>sexual</b>", "violence")[: i % 3],
        scores={} if i % 5 == 4 else {"nudenet": round((0.137 * (i + 1) * (j + 1)) % 1, 4), "clip": 20.5 + i + j},
        flags={"unsafe": (i + j) % 4 == 0},
        flagged=(i + j) % 5 == 0,
        status="unsafe" if (i + j) % 4 == 0 else "safe",
        tone="bad" if (i + j) % 4 == 0 else "good",
        note=HOSTILE if i == 0 else "FACE_FEMALE 0.70",
    )
