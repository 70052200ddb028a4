"""The page of ``erasure sae inspect`` as a reader's browser shows it."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from erasure.cli.main import main

from .pages import DESK, PHONE, empty_images, errors, open_at, overhang, requested, stretched, wide

pytestmark = pytest.mark.browser
SHOWN, FACTORS = 2, 6


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The page on the dagger, with two features and their images, and what the command says of them."""
    page = tmp_path_factory.mktemp("features") / "page.html"
    arguments = ["--model", "canvas", "--device", "cpu", "--concept", "dagger", "--steps", "1", "--top", str(SHOWN), "--out", str(page)]
    with redirect_stdout(io.StringIO()) as said:
        assert main(["sae", "inspect", *arguments, "--json"]) == 0
    return page, json.loads(said.getvalue())


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_the_page_shows_without_errors_and_asks_nobody(browser: Any, inspected: tuple[Path, dict[str, Any]], size: tuple[int, int]) -> None:
    open_at(browser, inspected[0], size)
    assert errors(browser) == [] and requested(browser) == []
    assert empty_images(browser) == [] and stretched(browser) == []
    assert overhang(browser) <= 0, f"wider than the window: {wide(browser)}"


def test_features_heat_maps_and_strips_are_shown(browser: Any, inspected: tuple[Path, dict[str, Any]]) -> None:
    page, found = inspected
    features = found["features"]
    open_at(browser, page, DESK)
    names = browser.execute_script("return [...document.querySelectorAll('#table ~ .scroll tbody th')].map(e => e.innerText.trim())")
    assert names == [str(one["index"]) for one in features]
    assert browser.execute_script("return document.querySelectorAll('article.feature').length") == SHOWN
    tokens = browser.execute_script(
        "return [...document.querySelectorAll('article.feature')[0].querySelectorAll('.prompts li')[0].querySelectorAll('.token')]"
        ".map(e => [e.title, getComputedStyle(e).backgroundColor])"
    )
    codes = [token["code"] for token in features[0]["prompts"][0]["tokens"]]
    assert len(tokens) == len(codes)
    colours = {colour for (_, colour), code in zip(tokens, codes, strict=True) if code}
    silent = {colour for (_, colour), code in zip(tokens, codes, strict=True) if not code}
    assert colours and not colours & silent, "a token that turns the feature on is coloured, a silent one is not"
    strips = browser.execute_script(
        "return [...document.querySelectorAll('figure.strip')].map(f => [...f.querySelectorAll('img')].map(i => i.naturalWidth > 0))"
    )
    assert strips == [[True] * FACTORS] * (1 + SHOWN), "all features at once, then each that is shown"
