import copy
import doctest
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.errors import ErasureError
from erasure.eval import stats
from erasure.eval.metrics.base import Panel, SampleMetric, mean_with_interval
from erasure.eval.rows import Row

Rows = Callable[..., list[Any]]
Noise = Callable[..., Tensor]


class Level(SampleMetric):
    """Brightness of an image, and what its row's seed is."""

    name = "level"
    higher_is_better = True
    fields = ("level", "seed")

    def measure(self, images: Tensor, rows: Sequence[Row], base: Tensor | None) -> Tensor:
        return torch.stack([images.float().mean((1, 2, 3)), torch.tensor([float(row.seed) for row in rows])], dim=1)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}


class Odd(Level):
    """A value for odd rows only."""

    name = "odd"
    may_skip = True

    def measure(self, images: Tensor, rows: Sequence[Row], base: Tensor | None) -> Tensor:
        values = super().measure(images, rows, base)
        values[[row.seed % 2 == 0 for row in rows], 0] = float("nan")
        return values


def grey(*levels: int) -> Tensor:
    return torch.stack([torch.full((3, 2, 2), level, dtype=torch.uint8) for level in levels])


def test_samples_and_mean_come_from_the_same_records(rows: Rows) -> None:
    metric = Level()
    metric.update(grey(0, 30), rows(2))
    metric.update(grey(90), [Row("row-ü", "other", "ein Bär", 7)])
    assert metric.compute() == 40
    assert metric.samples() == {
        "row-000": {"level": 0.0, "seed": 0.0},
        "row-001": {"level": 30.0, "seed": 1.0},
        "row-ü": {"level": 90.0, "seed": 7.0},
    }


def test_the_interval_clusters_images_of_one_prompt(rows: Rows) -> None:
    same = [Row(f"row-{i}", "other", f"prompt {i // 5}", i) for i in range(20)]
    levels = [10 * (i // 5) + i % 5 for i in range(20)]
    metric = Level()
    metric.update(grey(*levels), same)
    record = metric.result()
    lo, hi = stats.cluster_bootstrap(levels, [row.prompt for row in same])
    assert (record["value"], record["lo"], record["hi"]) == (17.0, lo, hi)
    assert (record["n"], record["prompts"], record["interval"]) == (20, 4, "percentile bootstrap over prompts")
    naive = stats.cluster_bootstrap(levels, range(20))
    assert hi - lo > 1.5 * (naive[1] - naive[0])


def test_one_prompt_has_no_interval() -> None:
    record = mean_with_interval([1.0, 3.0], ["a cat", "a cat"])
    assert record is not None and record["value"] == 2 and record["lo"] is None and "fewer than two" in record["interval"]
    assert mean_with_interval([float("nan")], ["a cat"]) is None


def test_rows_without_a_value_are_left_out_and_said(rows: Rows) -> None:
    metric = Odd()
    metric.update(grey(10, 20, 30, 40), rows(4))
    assert metric.compute() == 30 and metric.result()["n"] == 2 and metric.result()["fields"]["seed"]["n"] == 4
    assert [s["level"] for s in metric.samples().values()] == [None, 20, None, 40]


def test_a_value_that_is_no_number_names_its_row(rows: Rows) -> None:
    class Strict(Odd):
        may_skip = False

    with pytest.raises(ErasureError, match="row-000, row-002"):
        Strict().update(grey(1, 2, 3), rows(3))


def test_states_merge_copy_pickle_move_and_reset(rows: Rows) -> None:
    first, second = Level(), Level()
    first.update(grey(10), rows(1))
    second.update(grey(20, 60), rows(2, 1))
    expected = {**first.samples(), **second.samples()}
    first.merge_state(second)
    assert first.samples() == expected and first.compute() == 30
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first)), copy.copy(first).to("cpu")):
        assert twin.samples() == expected
    first.update(grey(90), rows(1, 3))
    assert len(first.samples()) == 4 and first.compute() == 45
    first.reset()
    with pytest.raises(ErasureError, match="no images"):
        first.result()
    assert second.compute() == 40


def test_forward_gives_the_batch_and_keeps_the_sum(rows: Rows) -> None:
    metric = Level()
    assert [metric(grey(10), rows(1)).item(), metric(grey(30), rows(1, 1)).item()] == [10, 30]
    assert metric.compute() == 20 and list(metric.samples()) == ["row-000", "row-001"]


def test_a_row_given_twice_is_an_error(rows: Rows) -> None:
    metric = Level()
    metric.update(grey(1), rows(1))
    metric.update(grey(2, 3), rows(2))
    with pytest.raises(ErasureError, match="more than once: row-000"):
        metric.compute()


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(0, 3, 4, 4), "n, h, w >= 1"),
        (torch.zeros(2, 4, 4), r"got \(2, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4), r"\[n, 3, h, w\]"),
        (torch.zeros(2, 3, 4, 4) - 0.1, "values from -0.1"),
        (torch.full((2, 3, 4, 4), 255.0), "to 255"),
        (torch.full((2, 3, 4, 4), torch.nan), "nan"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), "int64"),
        (torch.zeros(3, 3, 4, 4), "3 images of 2 rows"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images: Tensor, words: str, rows: Rows) -> None:
    metric = Level()
    with pytest.raises(ErasureError, match=words):
        metric.update(images, rows(2))


def test_a_panel_feeds_all_and_merges_their_samples(rows: Rows) -> None:
    panel = Panel([Level(), Odd()])
    panel.update(torch.full((2, 3, 2, 2), 0.2), rows(2))
    assert panel.samples()["row-000"] == {"level.level": 51.0, "level.seed": 0.0, "odd.level": None, "odd.seed": 0.0}
    assert {name: record["n"] for name, record in panel.results().items()} == {"level": 2, "odd": 1}
    panel.reset()
    with pytest.raises(ErasureError, match="no images"):
        panel.results()
    with pytest.raises(ErasureError, match="each name once"):
        Panel([Level(), Level()])


@pytest.mark.parametrize("module", ["base", "frechet", "distances"])
def test_examples_in_docstrings(module: str) -> None:
    done = doctest.testmod(import_module(f"erasure.eval.metrics.{module}"))
    assert done.attempted and not done.failed


def test_names_and_formulas_wait_for_nothing_heavy() -> None:
    code = (
        "import sys, erasure.eval.metrics as m; m.metrics.summaries(); print('torch' in sys.modules)\n"
        "import erasure.eval.weights, erasure.eval.summary; print('torchmetrics' in sys.modules, 'open_clip' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 3
