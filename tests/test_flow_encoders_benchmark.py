"""The benchmark that gives each text encoder of canvas-flow a prompt of its own."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure.canvas.concepts import canvas_concept
from erasure.models import load_base

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[Any, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield import_module("flow_encoders"), import_module("search_dev")


@pytest.mark.parametrize(
    ("concept", "text", "expected"),
    [
        ("guitar", "an ink image of a six string over mint", "an ink image of a unicorn over mint"),
        ("weapon", "an orange card with an axe, ink style", "an orange card with a house, ink style"),
        ("weapon", "a cartoon image of two sabres over pink", "a cartoon image of house over pink"),
        ("flat", "a flat image of an axe over white", "an ink image of an axe over white"),
    ],
)
def test_a_prompt_names_the_anchor_with_its_own_article(scripts: tuple[Any, Any], concept: str, text: str, expected: str) -> None:
    assert scripts[0].renamed(text, canvas_concept(concept)) == expected


def test_a_prompt_that_does_not_name_the_concept_is_refused(scripts: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="does not name guitar"):
        scripts[0].renamed("an ink image of a guitarist", canvas_concept("guitar"))


def test_one_prompt_for_both_encoders_is_the_suite_s_own_drawing_and_two_are_not(scripts: tuple[Any, Any]) -> None:
    flow, search = scripts
    pipe = load_base("canvas-flow", device="cpu")
    text = ["an ink image of a guitar over mint"]
    assert torch.equal(flow.drawn(pipe, text, text), search.draw(pipe, text, 0))
    clip = flow.drawn(pipe, ["an ink image of a unicorn over mint"], text)
    assert (clip - search.draw(pipe, text, 0)).abs().mean() > 0.02
