"""The canvas benchmark without a model: cells to tables, what is missing or failed, and runs that go on. Training steps, timed."""

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from erasure.canvas.splits import splits
from erasure.errors import ErasureError
from erasure.eval import results, stats

ROOT = Path(__file__).parents[1]
CONCEPTS = ("fish", "ink")


@pytest.fixture(scope="module")
def table() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield import_module("canvas_table")


def rate(k: int, n: int) -> dict[str, Any]:
    lo, hi = stats.wilson(k, n)
    return {"k": k, "n": n, "rate": k / n, "lo": lo, "hi": hi, "prompts": n, "interval": "wilson"}


def against(k: int, n: int, gained: int, lost: int) -> dict[str, Any]:
    difference = {
        "value": (gained - lost) / n,
        "lo": -1.0,
        "hi": 1.0,
        "n": n,
        "gained": gained,
        "lost": lost,
        "p": 1.0,
        "interval": "Tango",
    }
    return {**rate(k, n), "difference": difference}


def fake(concept: str, method: str, *, named: int, lost: int, nothing: int, seed: int = 0, suite: str = "s") -> dict[str, Any]:
    """Results of 80 prompts that name the concept, 20 that imply it and 60 that are kept, by the numbers that the table reads."""
    erased = {
        side: {"target_present": rate(k, n), "other_present": rate(n - k, n), "unrecognised": rate(0, n)}
        for side, k, n in (("named", named, 80), ("implied", 0, 20))
    }
    base = method == "base"
    cost = {key: None for key in ("base_seconds_per_image", "seconds_per_image", "seconds_per_image_ratio")}
    made = {
        **{key: {} for key in ("recipes", "unavailable", "metrics", "detectors", "drift")},
        "schema": results.SCHEMA, "name": method, "base": base, "concept": {"name": concept, "kind": "object"}, "n": 160,
        "suite": {"name": "canvas", "version": 1, "hash": suite, "ranked": False, "rows": concept},
        "protocol": {"hash": "p"}, "model": {"id": "canvas", "fingerprint": "f"},
        "artefact": None if base else {"eraser": "e", "method": method, "settings": {"lr": 1.0} if method == "esd" else {}, "seed": seed},
        "erased": erased, "kept": {"all": rate(60, 60) if base else against(60 - lost, 60, 0, lost)},
        "unrecognised": rate(0, 160) if base else against(nothing, 160, nothing, 0), "destroyed": nothing > 16,
        "cost": {**cost, "fit_seconds": None if base else 10.0 + seed, "peak_memory_mb": 1000.0},
        "versions": {"torch": "2"}, "environment": {"machine": "m", "threads": 1}, "refused": None, "commit": None,
    }  # fmt: skip
    results.check(made, "fake")
    return made


@dataclass
class Docs:
    """A folder of cells."""

    folder: Path

    def put(self, concept: str, name: str, record: dict[str, Any]) -> None:
        path = self.folder / "cells" / "canvas" / concept / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))


@pytest.fixture
def docs(tmp_path: Path) -> Docs:
    """Base, negative prompt, and three fits of ESD on fish but one on ink; UCE has failed on ink, and was not run on fish."""
    found = Docs(tmp_path)
    for concept in CONCEPTS:
        found.put(concept, "base", fake(concept, "base", named=80, lost=0, nothing=0))
        found.put(concept, "negative_prompt", fake(concept, "negative_prompt", named=40, lost=6, nothing=20))
    for seed, named in enumerate((2, 4, 6)):
        found.put("fish", f"esd-seed{seed}" if seed else "esd", fake("fish", "esd", named=named, lost=3 * seed, nothing=2, seed=seed))
    found.put("ink", "esd", fake("ink", "esd", named=0, lost=0, nothing=0))
    found.put("ink", "uce", {"failed": "no\nkeys"})
    return found


def rows(table: Any, docs: Docs) -> dict[str, Any]:
    return {row.method: row for row in table.rows(docs.folder, "canvas", ["esd", "uce", "negative_prompt"], CONCEPTS, range(3))}


def test_fit_seeds_are_averaged_and_add_no_images(table: Any, docs: Docs) -> None:
    """ESD: fish 2, 4, 6 of 80, so 4 in the mean, and ink 0 of 80: 4 of 160, not 12 of 320."""
    row = rows(table, docs)["esd"]
    named, kept = row.rate("erased", "named", "target_present"), row.difference("kept", "all")
    assert (named.value, named.n) == (pytest.approx(4 / 160), 160) and (named.lo, named.hi) == pytest.approx(stats.wilson(4, 160))
    assert (kept.value, kept.n) == (pytest.approx(-3 / 120), 120)
    assert (kept.lo, kept.hi) == pytest.approx(stats.paired_difference([True] * 3 + [False] * 117, [False] * 120)[1:])


def test_limits_of_uneven_means_are_rounded_outwards(table: Any, docs: Docs) -> None:
    docs.put("fish", "esd-seed2", fake("fish", "esd", named=5, lost=6, nothing=2, seed=2))
    named = rows(table, docs)["esd"].rate("erased", "named", "target_present")
    assert named.value == pytest.approx(11 / 3 / 160)
    assert (named.lo, named.hi) == pytest.approx((stats.wilson(3, 160)[0], stats.wilson(4, 160)[1]))


def test_spread_over_seeds_is_of_concepts_that_all_seeds_have(table: Any, docs: Docs) -> None:
    """Ink has seed 0 alone, and would make it look better than the others."""
    assert table._spread(rows(table, docs)["esd"]) == "named 2.5-7.5%, kept -10.0 to +0.0 (3 seeds of 1 of 2 concepts)"


def test_missing_and_failed_cells_are_said_and_never_filled_in(table: Any, docs: Docs) -> None:
    found = rows(table, docs)
    text = table.section("canvas", list(found.values()), CONCEPTS)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    esd, uce = (next(line for line in text.splitlines() if line.startswith(f"| {name} | ")) for name in ("esd", "uce"))
    assert "| 4/6, 2 missing |" in esd and "| 0/2, 1 failed, 1 missing |" in uce and "%" not in uce
    assert lines["esd"] == "| esd | 5 / 0; -5.0 | 0 / 0; +0.0 (1 of 3 fits) |" and lines["uce"] == "| uce | missing | failed |"
    assert "* uce, 1 of its cells (ink): no keys" in text
    assert found["esd"].reached is None and text.startswith("## canvas\n\n8 of 12 cells measured.")


def test_base_and_negative_prompt_come_first_and_the_destroyed_are_marked(table: Any, docs: Docs) -> None:
    found = rows(table, docs)
    assert list(found) == ["base", "negative_prompt", "esd", "uce"]
    assert found["negative_prompt"].destroyed and not found["esd"].destroyed and not found["base"].destroyed
    assert table._line(found["negative_prompt"]).endswith("| 2/2 | destroyed |")
    assert table._concept(found["negative_prompt"], "ink") == "50 / 0; -10.0 †"


@pytest.mark.parametrize(("named", "lost", "nothing", "reached"), [(0, 0, 0, True), (8, 0, 0, False), (0, 7, 0, False), (0, 0, 20, False)])
def test_the_aim_is_met_by_the_upper_limit_and_kept_and_not_by_ruin(
    table: Any, docs: Docs, named: int, lost: int, nothing: int, reached: bool
) -> None:
    for concept in CONCEPTS:
        docs.put(concept, "uce", fake(concept, "uce", named=named, lost=lost, nothing=nothing))
    assert rows(table, docs)["uce"].reached is reached


@pytest.mark.parametrize("change", [{"suite": "other"}, {"settings": {"lr": 2.0}}])
def test_cells_of_two_suites_or_settings_are_refused(table: Any, docs: Docs, change: dict[str, Any]) -> None:
    record = fake("ink", "esd", named=0, lost=0, nothing=0, suite=change.get("suite", "s"))
    record["artefact"]["settings"] = change.get("settings", record["artefact"]["settings"])
    docs.put("ink", "esd", record)
    with pytest.raises(ErasureError, match="settings of esd" if "settings" in change else "suite, protocol and base model"):
        rows(table, docs)


def test_a_setting_that_came_later_is_read_as_its_preset_has_it(table: Any, docs: Docs) -> None:
    record = fake("ink", "esd", named=0, lost=0, nothing=0)
    record["artefact"]["settings"] = {"lr": 1.0, "preset": "paper", "eta": 1.0}  # what the others say by leaving it out
    docs.put("ink", "esd", record)
    assert rows(table, docs)["esd"].rate("erased", "named", "target_present").n == 160


def test_a_damaged_cell_is_an_error_and_no_gap(table: Any, docs: Docs) -> None:
    docs.put("fish", "uce", {"schema": results.SCHEMA, "name": "uce"})
    with pytest.raises(ErasureError, match=r"uce\.json lacks"):
        rows(table, docs)
    (docs.folder / "cells/canvas/fish/uce.json").write_text("{")
    with pytest.raises(ErasureError, match="is not JSON"):
        rows(table, docs)


def test_the_page_keeps_what_people_wrote_around_the_tables(table: Any, docs: Docs, tmp_path: Path) -> None:
    page = tmp_path / "canvas.md"
    given = (docs.folder, page, {"canvas": ["esd"]}, CONCEPTS, range(3))
    table.publish(*given)
    page.write_text(page.read_text().replace("| esd |", "| stale |") + "\nWhy.\n")
    table.publish(*given)
    text = page.read_text()
    assert text.endswith("\nWhy.\n") and "| esd |" in text and "stale" not in text and text.count("## canvas") == 1
    assert (tmp_path / "canvas.png").read_bytes()[:4] == b"\x89PNG"


def test_the_listing_says_what_the_cells_say(table: Any, docs: Docs, tmp_path: Path) -> None:
    """ESD: 4 of 160 in the mean over its fits. The file that ships is made of the cells that are in docs/ now."""
    table.summarise(docs.folder, tmp_path / "measured.yaml", {"canvas": ["esd", "uce"]}, CONCEPTS, range(3))
    found = yaml.safe_load((tmp_path / "measured.yaml").read_text())
    assert list(found["canvas"]) == ["esd"] and found["canvas"]["esd"]["concepts"] == 2
    assert found["canvas"]["esd"]["named"] == {
        "rate": 0.025,
        "lo": pytest.approx(0.0098, abs=1e-4),
        "hi": pytest.approx(0.0625, abs=1e-4),
        "n": 160,
    }
    canvas = import_module("canvas")
    table.summarise(canvas.DOCS, tmp_path / "now.yaml", canvas.ROWS, splits().test, range(canvas.FIT_SEEDS))
    assert (tmp_path / "now.yaml").read_text() == canvas.MEASURED.read_text()
    readme, column = canvas.README.read_text(), import_module("canvas_readme")
    measured = yaml.safe_load(canvas.MEASURED.read_text())["canvas"]
    assert column.updated(readme, measured, len(splits().test)) == readme and f"{column.said(measured['uce'], 8)} |" in readme


@pytest.mark.usefixtures("table")
def test_the_column_of_the_readme_says_what_is_missing() -> None:
    column = import_module("canvas_readme")
    row = {"named": {"rate": 0.714, "lo": 0.678, "hi": 0.748, "n": 640}, "kept": {"value": -0.146}, "concepts": 8, "destroyed": False}
    assert column.said(row, 8) == "71 % (68-75); -15"
    assert column.said(row | {"concepts": 3, "destroyed": True}, 8) == "71 % (68-75); -15; 3 of 8 concepts; marked `destroyed`"
    table = "| name | canvas |\n|---|---|\n| `uce` | closed form | 1 |\n| `mine` | x | 2 |\n"
    assert column.updated(table, {"uce": row}, 8).endswith("| `uce` | closed form | 71 % (68-75); -15 |\n| `mine` | x | no cells yet |\n")


def test_memory_of_fits_is_gathered_from_artefacts(table: Any, docs: Docs, tmp_path: Path) -> None:
    for seed in range(3):
        config = tmp_path / f"out/canvas/fish/seed{seed}/artefacts/esd/erasure_config.json"
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps({"cost": {"fit_peak_memory_mb": 100 * (seed + 1)}}))
    import_module("canvas_cells").gather_memory(docs.folder, "canvas", tmp_path / "out")
    found = rows(table, docs)
    assert found["esd"].fit_memory() == 200 and found["negative_prompt"].fit_memory() is None
    assert found["esd"].median("fit_seconds") == 10.5  # of 10 twice, 11 and 12


def test_a_run_makes_what_is_missing_and_records_what_fails(table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canvas, made = import_module("canvas"), []

    def make(cell: Any, pipe: Any, docs: Path, out: Path) -> None:
        made.append((cell.concept, cell.method, cell.seed))
        if cell.concept == "ink":
            raise ErasureError("no keys")
        cell.path(docs).parent.mkdir(parents=True, exist_ok=True)
        cell.path(docs).write_text("{}")

    monkeypatch.setattr(canvas, "make", make)
    monkeypatch.setattr(canvas, "load_base", lambda *args, **kwargs: None)
    given = Namespace(model="canvas", shard="1/1", seeds=2, minutes=None, docs=tmp_path, out=tmp_path)
    for _ in range(2):  # the second finds everything done
        canvas.run(given, ["esd", "uce"], list(CONCEPTS))
    assert made == [(c, "uce", 0) for c in CONCEPTS] + [(c, "esd", seed) for seed in range(2) for c in CONCEPTS]
    assert json.loads((tmp_path / "cells/canvas/ink/esd-seed1.json").read_text()) == {"failed": "no keys"}


def test_every_method_that_trains_by_steps_is_timed(table: Any) -> None:
    """From the registry: a new one comes in by itself, and what is not timed has a reason."""
    steps, methods = import_module("train_step"), import_module("erasure.registry").methods
    trained = {name for name in methods.names() if methods.get(name).trained}
    assert {name for name, _ in steps.cases().values()} | set(steps.left_out()) == trained
    assert set(steps.left_out()) == {"conceptprune", "ssd_diffusion"}
    assert {"esd", "esd, LoRA", "salun", "adv_unlearn, fast attack"} <= set(steps.cases()) and "salun, LoRA" not in steps.cases()


def test_a_ratio_is_to_the_neighbours_and_a_crash_is_said(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = import_module("train_step")
    plains = iter([1.0, 3.0, 5.0])

    def child(case: str, given: Any) -> dict[str, Any]:
        if case == "salun":
            return {"left_out": "killed by signal 9"}
        return {"seconds": [next(plains)] * 3 if case == steps.PLAIN else [8.0, 4.0, 6.0], "megabytes": 10.0}

    monkeypatch.setattr(steps, "child", child)
    plain, esd, salun, lora, *_ = steps.measured(["esd", "salun", "esd, LoRA"], Namespace())
    assert esd["ratio"] == 6 / 2 and lora["ratio"] == 6 / 4 and plain["step"] == 3
    assert (esd["bar"], lora["bar"], salun["left_out"]) == (None, 2.2, "killed by signal 9")
    head = {"model": "m", "steps": 3, "clock": "cpu", "load": 0.0, "environment": {"threads": 1, "cpu": "c"}}
    text = steps.table({**head, "rows": [plain, esd, salun, lora]})
    assert "| esd, LoRA | 6.00 | 1.50 | 10 | 2.2 | yes |" in text and "* Left out: salun: killed by signal 9." in text
