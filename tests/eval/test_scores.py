import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from erasure.canvas.judging import Verdict
from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.eval import stats
from erasure.eval.rows import Row
from erasure.eval.score import Sample, read_samples, score, write_samples
from erasure.eval.suite import Suite
from erasure.eval.summary import Cost, compared, drift, rate, summarise, write_results


def judged(rows: Sequence[Row], verdict: Verdict, concept: str = "dagger") -> list[Sample]:
    return score(torch.zeros(len(rows), 3, 64, 64), rows, lambda images: verdict, Concept(concept))


def calls(samples: Sequence[Sample]) -> list[str]:
    return [("T" if s.target_present else "") + ("O" if s.other_present else "") + ("U" if s.unrecognised else "") for s in samples]


def test_every_image_is_the_target_another_thing_or_unrecognised(make_rows: Any, make_verdict: Any) -> None:
    verdict = make_verdict([("dagger",), ("dagger", "cat"), ("cat",), None, ()])
    samples = judged(make_rows(5), verdict)
    assert calls(samples) == ["T", "T", "O", "U", "U"]
    assert [s.objects for s in samples] == [("dagger",), ("dagger", "cat"), ("cat",), (), ()]
    assert all(s.wanted_present is None for s in samples)


def test_any_member_of_a_category_is_the_target(make_rows: Any, make_verdict: Any) -> None:
    verdict = make_verdict([("bomb",), ("axe", "cat"), ("cat",)])
    assert calls(judged(make_rows(3, objects=("dagger",)), verdict, "weapon")) == ["T", "T", "O"]


def test_a_style_is_the_target_only_in_a_recognised_image(make_rows: Any, make_verdict: Any) -> None:
    rows = make_rows(3, objects=("cat",), style="ink")
    samples = judged(rows, make_verdict([("cat",), ("cat",), None], styles=["ink", "flat", "ink"]), "ink")
    assert calls(samples) == ["T", "O", "U"]
    assert [s.wanted_present for s in samples] == [True, True, False]  # the cat, whatever its style
    assert [s.style_ok for s in samples] == [None, None, None]  # nobody wants the erased style back


def test_kept_rows_of_a_style_need_the_object_and_the_style_that_was_asked_for(make_rows: Any, make_verdict: Any) -> None:
    rows = make_rows(3, kind="neighbour", objects=("cat",), style="flat")
    samples = judged(rows, make_verdict([("cat",), ("cat",), ("dog",)], styles=["flat", "sticker", "flat"]), "ink")
    assert [s.wanted_present for s in samples] == [True, False, False]


def test_of_a_pair_only_the_partner_is_wanted(make_rows: Any, make_verdict: Any) -> None:
    rows = make_rows(3, kind="pair", objects=("dagger", "cat"))
    samples = judged(rows, make_verdict([("dagger", "cat"), ("cat",), ("dagger",)]))
    assert [s.wanted_present for s in samples] == [True, True, False]
    assert set(samples[0].wanted_scores) == {"dagger", "cat"} and samples[0].wanted_scores["cat"] == 0.9


def test_style_and_background_are_checked_only_where_they_were_asked_for(make_rows: Any, make_verdict: Any) -> None:
    rows = make_rows(2, style="ink", background="pink")[:1] + make_rows(1) + make_rows(1, style="flat", background="sky")
    samples = judged(rows, make_verdict([("cat",)] * 3, ["ink", "ink", "ink"], ["sky", "sky", "sky"]))
    assert [(s.style_ok, s.background_ok) for s in samples] == [(True, False), (None, None), (False, True)]


def test_a_failing_judge_and_no_images_are_errors(make_rows: Any, make_verdict: Any) -> None:
    def broken(images: Tensor) -> Verdict:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        score(torch.zeros(2, 3, 64, 64), make_rows(2), broken, Concept("dagger"))
    with pytest.raises(ErasureError, match="got 0 images of 0 rows"):
        judged([], make_verdict([]))
    with pytest.raises(ErasureError, match="answered for 1 of 2"):
        judged(make_rows(2), make_verdict([("cat",)]))


def test_samples_survive_the_disk_and_equal_runs_give_equal_bytes(tmp_path: Path, make_rows: Any, make_verdict: Any) -> None:
    samples = judged(make_rows(4, style="ink"), make_verdict([("dagger", "cat"), ("cat",), None, ("dagger",)]))
    for name in ("a", "b"):
        write_samples(tmp_path / name, samples)
    assert read_samples(tmp_path / "a") == samples
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture
def before_and_after(make_rows: Any, make_verdict: Any) -> list[list[Sample]]:
    """Ten named, five implied and twenty kept rows; the method erases 8 of 10 and 2 of 5, breaks one, loses three, gains one."""
    rows = [
        *make_rows(10),
        *make_rows(5, kind="implied"),
        *make_rows(12, kind="neighbour", objects=("axe",)),
        *make_rows(8, kind="other", objects=("cat",)),
    ]
    wrong, dagger = ("pizza",), ("dagger",)
    base = [*[dagger] * 9, wrong, *[dagger] * 5, *[("axe",)] * 11, wrong, *[("cat",)] * 7, dagger]
    named, implied = [*[wrong] * 7, None, *[dagger] * 2], [*[wrong] * 2, *[dagger] * 3]
    kept = [*[wrong] * 2, *[("axe",)] * 10, *[("cat",)] * 6, wrong, ("cat",)]
    edited = [*named, *implied, *kept]
    return [judged(rows, make_verdict(seen)) for seen in (base, edited)]


def results(before: Sequence[Sample] | None, after: Sequence[Sample], demo: Suite, **more: Any) -> dict[str, Any]:
    return summarise(after, before, name="method", concept=Concept("dagger"), suite=demo, rows="r", **more)


def test_a_summary_counts_what_was_put_in(before_and_after: Any, demo: Suite) -> None:
    found = results(before_and_after[0], before_and_after[1], demo)
    named, implied = found["erased"]["named"], found["erased"]["implied"]
    assert [named[call]["k"] for call in ("target_present", "other_present", "unrecognised")] == [2, 7, 1]
    assert [implied[call]["k"] for call in ("target_present", "other_present", "unrecognised")] == [3, 2, 0]
    assert (named["target_present"]["n"], implied["target_present"]["n"], found["n"]) == (10, 5, 35)
    assert (named["target_present"]["lo"], named["target_present"]["hi"]) == pytest.approx(stats.wilson(2, 10))
    kept = {name: (group["k"], group["n"]) for name, group in found["kept"].items()}
    assert kept == {"all": (17, 20), "neighbour": (10, 12), "other": (7, 8)}


def test_the_kept_difference_is_paired(before_and_after: Any, demo: Suite) -> None:
    kept = results(before_and_after[0], before_and_after[1], demo)["kept"]
    difference = kept["all"]["difference"]
    assert (difference["gained"], difference["lost"], difference["value"]) == (2, 3, pytest.approx(-1 / 20))
    assert difference["p"] == pytest.approx(stats.mcnemar(2, 3)) and difference["lo"] < -0.05 < difference["hi"]
    assert kept["neighbour"]["difference"]["value"] == pytest.approx(-1 / 12) and kept["other"]["difference"]["value"] == 0


def test_the_base_has_no_difference_and_its_floor_is_its_false_calls_on_kept_rows(before_and_after: Any, demo: Suite) -> None:
    before, after = before_and_after
    base = results(None, before, demo)
    assert base["base"] and "difference" not in base["kept"]["all"] and base["destroyed"] is False
    assert (base["floor"]["k"], base["floor"]["n"]) == (1, 20) == tuple(results(before, after, demo)["floor"][key] for key in "kn")


def test_more_than_ten_points_more_noise_is_destroyed(make_rows: Any, make_verdict: Any, demo: Suite) -> None:
    rows = make_rows(20)
    before, at_limit, over = (judged(rows, make_verdict([None] * n + [("cat",)] * (20 - n))) for n in (2, 4, 5))
    assert results(before, at_limit, demo)["destroyed"] is False
    assert results(before, over, demo)["destroyed"] is True


def test_nothing_is_summarised_from_nothing_or_against_other_rows(before_and_after: Any, demo: Suite) -> None:
    before, after = before_and_after
    with pytest.raises(ErasureError, match="no samples"):
        results(None, [], demo)
    with pytest.raises(ErasureError, match="other rows"):
        results([replace(before[0], seed=1), *before[1:]], after, demo)
    with pytest.raises(ErasureError, match="other rows"):
        results(before[:-1], after, demo)


def test_repeated_prompts_widen_the_interval(make_rows: Any, make_verdict: Any) -> None:
    rows = [replace(row, prompt=f"prompt {i // 10}") for i, row in enumerate(make_rows(60))]
    samples = judged(rows, make_verdict([("dagger",) if i // 10 % 2 else ("cat",) for i in range(60)]))
    found, alone = rate(samples, "target_present"), stats.wilson(30, 60)
    assert found is not None
    assert found["prompts"] == 6 and "bootstrap" in found["interval"]
    assert found["lo"] < alone[0] - 0.1 and found["hi"] > alone[1] + 0.1
    all_gone = rate(judged(rows, make_verdict([("cat",)] * 60)), "target_present")
    assert all_gone is not None and all_gone["hi"] == pytest.approx(stats.wilson(0, 60)[1])  # the bootstrap alone would claim 0 to 0


def test_a_rate_that_nobody_asked_for_is_absent_rather_than_zero(make_rows: Any, make_verdict: Any) -> None:
    samples = judged(make_rows(3), make_verdict([("cat",)] * 3))
    assert rate(samples, "style_ok") is None and compared(samples, samples, "wanted_present") is None


def test_costs_relate_to_the_base() -> None:
    assert Cost(2.0, 100.0, 0.9, 0.6).to_dict()["seconds_per_image_ratio"] == pytest.approx(1.5)
    assert Cost(seconds_per_image=0.9).to_dict()["seconds_per_image_ratio"] is None


def test_drift_is_zero_without_a_change_and_grows_with_it() -> None:
    base = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    small, large = (drift(base + shift, base, "efficientnet-lite0")["kid-efficientnet-lite0"] for shift in (0.2, 1.0))
    none = drift(base, base, "efficientnet-lite0")["kid-efficientnet-lite0"]
    assert none["value"] == 0 and 0 < small["value"] < large["value"] and "not quality" in none["note"]


def test_results_are_plain_json_with_sorted_keys(tmp_path: Path, before_and_after: Any, demo: Suite) -> None:
    found = results(before_and_after[0], before_and_after[1], demo, drift=drift(torch.rand(4, 3), torch.rand(4, 3), "efficientnet-lite0"))
    write_results(tmp_path / "results.json", found)
    loaded = json.loads((tmp_path / "results.json").read_text())
    assert list(loaded) == sorted(loaded) and loaded["protocol"]["hash"] == demo.protocol.hash
    assert np.isclose(loaded["kept"]["all"]["rate"], 17 / 20)
