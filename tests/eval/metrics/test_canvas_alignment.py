import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.canvas.judging import Verdict
from erasure.errors import ErasureError
from erasure.eval.judges import judge_sha256
from erasure.eval.metrics.canvas_alignment import CanvasAlignment
from erasure.eval.rows import Row


def row(i: int, *objects: str, style: str | None = None, background: str | None = None) -> Row:
    return Row(f"row-{i}", "other", f"prompt {i}", i, objects, style, background)


def test_alignment_is_the_share_of_what_was_asked(make_verdict: Callable[..., Verdict]) -> None:
    rows = [
        row(0, "dagger", "banana", style="ink", background="red"),  # dagger and style are there, banana and background are not
        row(1, "dagger"),
        row(2, "dagger", style="ink"),  # unrecognised: the judge's style is not counted
        row(3),  # asks for nothing that is judged
        row(4, style="ink"),
    ]
    verdict = make_verdict(
        [("dagger",), ("dagger",), None, ("dagger",), ("banana",)],
        styles=["ink", "flat", "ink", "flat", "ink"],
        backgrounds=["white"] * 5,
    )
    metric = CanvasAlignment(lambda images: verdict)
    metric.update(torch.zeros(5, 3, 64, 64), rows)
    samples = [tuple(s.values()) for s in metric.samples().values()]
    low, high = math.log(1e-7), math.log(0.9)
    expected = [
        (0.5, 0.5, 1, 0, (low + high) / 2),
        (1, 1, None, None, high),
        (0, 0, 0, None, low),
        (None, None, None, None, None),
        (1, None, 1, None, None),
    ]
    for got, wanted in zip(samples, expected, strict=True):
        assert got == tuple(value if value is None else pytest.approx(value, rel=1e-5) for value in wanted)
    record = metric.result()
    assert record["value"] == pytest.approx(2.5 / 4) == metric.compute().item() and record["n"] == 4
    assert record["fields"]["background"]["n"] == 1 and record["fields"]["background"]["lo"] is None


def test_rows_that_ask_for_nothing_have_no_alignment(make_verdict: Callable[..., Verdict]) -> None:
    metric = CanvasAlignment(lambda images: make_verdict([("dagger",)]))
    metric.update(torch.zeros(1, 3, 64, 64), [row(0)])
    with pytest.raises(ErasureError, match="applies to none of the 1 rows"):
        metric.result()


def test_a_judge_that_skips_images_is_an_error(make_verdict: Callable[..., Verdict]) -> None:
    with pytest.raises(ErasureError, match="answered for 1 of 2"):
        CanvasAlignment(lambda images: make_verdict([("dagger",)])).update(torch.zeros(2, 3, 64, 64), [row(0, "dagger"), row(1, "dagger")])


def test_the_shipped_judge_finds_nothing_in_noise() -> None:
    metric = CanvasAlignment()
    images: Tensor = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    metric.update(images, [row(i, "dagger", style="ink") for i in range(8)])
    record: dict[str, Any] = metric.result()
    assert record["value"] < 0.2 and record["fields"]["log_presence"]["value"] < -1
    assert record["identity"]["sha256"] == judge_sha256("canvas/judge_test")
