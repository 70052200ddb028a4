"""The measure that is shipped: which share of a pipeline's images, as it is trained so far, shows a concept."""

from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.callbacks import Shown, Validate, judged
from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.eval.generate import draw, under
from erasure.eval.rows import Row
from erasure.eval.suite import load_suite
from erasure.method import Run
from erasure.methods.esd import ESD
from erasure.models import load_base
from erasure.testing.subject import same_state, state


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_base("canvas", device="cpu")


class Looker:
    """Sees it in every other image, and remembers all."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.images.append(images)
        return torch.arange(len(images)) % 2 == 0


def test_the_share_is_that_of_images_by_the_suites_own_sampler(pipe: Any) -> None:
    looker, before, scheduler = Looker(), state(pipe), pipe.scheduler
    assert Shown(pipe, ["a dagger", "a cat"], looker, suite="canvas", steps=2, n=5, batch=3)() == 3 / 5
    assert same_state(state(pipe), before) and pipe.scheduler is scheduler
    protocol = load_suite("canvas").under(steps=2).protocol
    rows = [Row(str(i), "named", ["a dagger", "a cat"][i % 2], 100_000 + i) for i in range(3)]
    with under(pipe, protocol):
        assert torch.equal(looker.images[0], draw(pipe, rows, protocol))
    assert [len(images) for images in looker.images] == [3, 2]


def test_judge_dev_sees_objects_categories_and_styles_where_they_are(pipe: Any) -> None:
    looker = Looker()
    Shown(pipe, ["an ink image of a dagger"], looker, suite="canvas", steps=8, n=4)()
    seen = {word: judged(word)(looker.images[0]).tolist() for word in ("dagger", "weapon", "ink", "fruit", "flat")}
    assert seen == {"dagger": [True] * 4, "weapon": [True] * 4, "ink": [True] * 4, "fruit": [False] * 4, "flat": [False] * 4}
    with pytest.raises(ErasureError, match="no canvas concept 'daggr'; did you mean dagger"):
        judged("daggr")


def test_a_fit_validates_by_it_on_the_weights_so_far(pipe: Any) -> None:
    looker = Looker()
    check = Validate(Shown(pipe, ["a dagger"], looker, suite="canvas", steps=2, n=2), every=1, goal=0.5)
    few: dict[str, Any] = {"steps": 3, "images": 1, "sampling_steps": 2, "batch": 1, "lr": 0.05, "retain_scale": 0.0}
    before = state(pipe)
    ESD(preset="canvas", **few).fit(pipe, [Concept("dagger", anchors=("cat",))], run=Run(progress=False, callbacks=(check,)))
    assert check.values == {1: 0.5} and same_state(state(pipe), before)
    Shown(pipe, ["a dagger"], looker, suite="canvas", steps=2, n=2)()
    trained, base = looker.images
    assert (trained - base).abs().max() > 0.01


@pytest.mark.parametrize(("prompts", "n"), [("a dagger", 2), ([], 2), (["a dagger"], 0)])
def test_what_would_measure_nothing_is_an_error(prompts: Any, n: int) -> None:
    with pytest.raises(ErasureError, match="a list of prompts, and at least one image"):
        Shown(None, prompts, Looker(), suite="canvas", n=n)


def test_an_answer_that_is_not_one_for_each_image_is_an_error(pipe: Any) -> None:
    for wrong, said in ((torch.tensor([True]), "bool \\[1\\]"), (torch.tensor([0.3, 0.7]), "float32 \\[2\\]")):
        with pytest.raises(ErasureError, match=f"has to say bool \\[2\\] of 2 images, and said torch.{said}"):
            Shown(pipe, ["a dagger"], lambda images, wrong=wrong: wrong, suite="canvas", steps=1, n=2)()  # type: ignore[misc]
