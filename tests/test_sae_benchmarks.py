"""The benchmarks of sparse coders without a model: which concepts they touch, what is pooled, and what stays when images are gone."""

import json
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from erasure.canvas.splits import splits
from erasure.eval.stats import wilson

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[Any, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield import_module("sae_many"), import_module("sae_ablation")


@pytest.fixture(scope="module")
def many(scripts: tuple[Any, Any]) -> Any:
    return scripts[0]


@pytest.fixture(scope="module")
def ablation(scripts: tuple[Any, Any]) -> Any:
    return scripts[1]


@pytest.fixture(scope="module", params=[0, 1], ids=["many", "ablation"])
def either(scripts: tuple[Any, Any], request: pytest.FixtureRequest) -> Any:
    return scripts[request.param]


def test_records_whose_images_are_gone_stay_as_they_are_and_the_page_is_made_of_them(either: Any, tmp_path: Path) -> None:
    before = json.loads(either.RECORDS.read_text())
    assert before and either.gather(tmp_path / "gone", before) == before
    page = (ROOT / "docs/methods/sae.md").read_text()
    assert all(either.line(record) in page for record in before)


def test_an_ablation_looks_at_dev_concepts_alone_and_no_two_cells_share_a_file(ablation: Any) -> None:
    cells = list(ablation.cells())
    assert {cell.concept for cell in cells} <= set(splits().dev)
    assert len({cell.file for cell in cells}) == len(cells)


def test_an_ablation_pools_what_the_judge_said_and_says_where_a_method_refused(ablation: Any, tmp_path: Path) -> None:
    concepts, n = ablation.CONCEPTS, ablation.IMAGES
    for i, concept in enumerate(concepts):
        cell = next(cell for cell in ablation.cells() if cell.concept == concept and cell.label == "k=4")
        side = {"present": [True] * i + [False] * (n - i), "unrecognised": [True] * 2 + [False] * (n - 2), "changed": i}
        record = {"measured": {}, "named": side, "kept": side} if i else {"measured": {}, "refused": "all are shared"}
        (tmp_path / "cells").mkdir(exist_ok=True)
        (tmp_path / "cells" / cell.file).write_text(json.dumps(record))
    (found,) = ablation.gather(tmp_path)
    assert found["named"][concepts[0]] is None and [found["named"][c]["value"] for c in concepts[1:]] == [1 / n, 2 / n]
    assert found["kept"]["value"] == 3 / (2 * n) and (found["kept"]["lo"], found["kept"]["hi"]) == wilson(3, 2 * n)
    assert found["unrecognised"]["value"] == 4 / (2 * n) and found["identical"]["value"] == 1 - 3 / (2 * n)
    assert "refused" in ablation.line(found)
    (tmp_path / "cells" / cell.file).unlink()
    assert ablation.gather(tmp_path) == [], "a setting without one of its concepts is not in the table"


def test_sets_are_nested_have_their_sizes_and_never_the_anchor(many: Any) -> None:
    concept = many.TESTED[0]
    sets = [set(many.erased(concept, size)) for size in many.SIZES]
    assert [len(one) for one in sets] == list(many.SIZES)
    assert all(a <= b for a, b in pairwise(sets)) and many.anchor() not in sets[-1]
