"""The logic of the meta-evaluation: which intervals bear an ordering out, and the numbers that it orders. No image is made."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def orderings() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield import_module("meta_evaluation_orderings")


@pytest.fixture(scope="module")
def measures(orderings: Any) -> Any:
    return import_module("meta_evaluation_measures")


@pytest.mark.parametrize(
    ("lo", "hi", "verdict"),
    [(0.01, 0.2, "held"), (-0.01, 0.2, "not shown"), (0.0, 0.2, "not shown"), (-0.2, -0.01, "unfit"), (0.0, 0.0, "unfit")],
)
def test_an_order_holds_only_if_its_interval_excludes_zero(orderings: Any, lo: float, hi: float, verdict: str) -> None:
    (claim,) = orderings.above("base", "retrained")
    assert claim.verdict(orderings.Value((lo + hi) / 2, lo, hi, 50)) == verdict


@pytest.mark.parametrize(
    ("lo", "hi", "verdict"),
    [(-0.05, 0.09, "held"), (-0.05, 0.11, "not shown"), (-0.3, 0.3, "not shown"), (0.11, 0.3, "unfit"), (-0.3, -0.1, "unfit")],
)
def test_two_controls_are_alike_only_if_the_whole_interval_lies_within_the_margin(
    orderings: Any, lo: float, hi: float, verdict: str
) -> None:
    (claim,) = orderings.close("base", "retrained", 0.1)
    assert claim.verdict(orderings.Value((lo + hi) / 2, lo, hi, 50)) == verdict


def test_no_difference_of_few_images_does_not_make_two_controls_alike(orderings: Any, measures: Any) -> None:
    """Five equal pairs leave room for more than ten points; two hundred do not."""
    (claim,) = orderings.close("base", "retrained")
    for n, verdict in ((5, "not shown"), (200, "held")):
        rates = measures.Rates({"base": [True] * n, "retrained": [True] * n}, [str(i) for i in range(n)])
        assert claim.verdict(rates.difference("base", "retrained")) == verdict


def test_a_reading_is_as_good_as_its_worst_claim(orderings: Any, measures: Any) -> None:
    calls = {"base": [True] * 40, "retrained": [False] * 40, "destroyer": [False] * 40, "refuser": [True, False] * 20}
    rates = measures.Rates(calls, [str(i) for i in range(40)], chance=0.02)
    held, more = orderings.above("base", "retrained", "destroyer"), orderings.above("destroyer", "refuser")
    chance = (orderings.Claim("retrained", orderings.CHANCE, high=0),)
    said = {name: orderings.Reading("named", name, claims).judge(rates) for name, claims in (("a", held), ("b", held + chance))}
    # 0 of 40 reaches to 8.8 %, over a chance of 2 %.
    assert (said["a"]["verdict"], said["b"]["verdict"]) == ("held", "not shown")
    assert said["b"]["claims"][2]["hi"] == pytest.approx(0.0876 - 0.02, abs=1e-3)
    assert orderings.Reading("named", "c", held + chance + more).judge(rates)["verdict"] == "unfit"


def test_means_are_compared_in_pairs(measures: Any) -> None:
    """Two columns that spread widely, and differ by the same on every row: the difference is sharp."""
    spread = np.linspace(0, 10, 50)
    found = measures.Means({"a": spread + 0.5, "b": spread}, [str(i) for i in range(50)])
    difference, own = found.difference("a", "b"), found.value("a")
    assert difference.value == pytest.approx(0.5) and difference.hi - difference.lo < 1e-9
    assert own.hi - own.lo > 1


def test_a_distance_keeps_the_whole_samples_value_inside_its_interval(measures: Any) -> None:
    """A biased distance: half the rows give larger ones, and the interval must not move up with them."""
    rng = np.random.default_rng(0)
    reference, near, far = rng.normal(size=(80, 4)), rng.normal(size=(80, 4)), rng.normal(size=(80, 4)) + 1

    def biased(x: np.ndarray, y: np.ndarray) -> float:
        return float(((x.mean(0) - y.mean(0)) ** 2).sum())

    found = measures.Distances({"near": near, "far": far}, reference, biased)
    value = found.value("near")
    assert value.value == pytest.approx(biased(near, reference)) and value.lo < value.value < value.hi
    assert found.drawn["near"].mean() > 1.5 * value.value  # of halves
    assert found.difference("far", "near").lo > 2
    assert found.value("far").n == 80


def test_every_control_and_every_reading_is_in_the_published_file(orderings: Any) -> None:
    """docs/benchmarks/meta.json is of the readings that the code expects, and its verdicts follow from its own intervals."""
    import json

    result = json.loads((BENCHMARKS.parent / "docs/benchmarks/meta.json").read_text())
    assert [r["reading"] for r in result["readings"]] == [r.title for r in orderings.EXPECTED]
    assert all(set(values) == set(orderings.CONTROLS) for values in result["values"].values())
    for reading, expected in zip(result["readings"], orderings.EXPECTED, strict=True):
        found = [
            claim.verdict(orderings.Value(*(record[key] for key in ("value", "lo", "hi", "n"))))
            for claim, record in zip(expected.claims, reading["claims"], strict=True)
        ]
        assert found == [record["verdict"] for record in reading["claims"]]
        assert reading["verdict"] == next(verdict for verdict in ("unfit", "not shown", "held") if verdict in found)
