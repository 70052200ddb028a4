"""The benchmark of merging rules without a model: what is asked, what is pooled, what is made again, and the page."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import artifact, merging
from erasure.adapter import AdapterEraser
from erasure.canvas.splits import splits
from erasure.canvas.world import world
from erasure.errors import ErasureError
from erasure.methods.safety_dpo import SafetyDPO

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield import_module("merging")


@pytest.fixture(scope="module")
def asked(bench: Any) -> Any:
    return import_module("merging_prompts")


def test_the_concepts_are_those_for_development_and_merges_are_nested(asked: Any) -> None:
    assert set(asked.CONCEPTS) == set(splits().dev) and asked.SIZES[-1] == len(asked.CONCEPTS)
    assert [asked.share(size) * size for size in asked.SIZES] == [asked.IMAGES] * len(asked.SIZES)
    for name in asked.CONCEPTS:
        most = asked.named(name, asked.most(name))
        assert asked.named(name, asked.share(8)).texts == most.texts[: asked.share(8)]


def asks(text: str, word: str) -> bool:
    return f" {word} " in f" {text.replace(',', '')} "


def test_no_prompt_asks_for_what_another_expert_erases(asked: Any) -> None:
    """Words of the other concepts, their synonyms and a category's members, and the erased style."""
    words = {name: {w for o in splits().members(name) or (name,) for w in (o, *world().synonyms(o))} for name in asked.CONCEPTS}
    for name in asked.CONCEPTS:
        others = set().union(*(w for other, w in words.items() if other != name)) - words[name]
        for text in asked.named(name, 24).texts:
            assert any(asks(text, word) for word in words[name]) and not any(asks(text, word) for word in others), text
    everything = set().union(*words.values())
    assert not any(asks(text, word) for text in asked.kept(48).texts for word in everything)
    assert set(asked.kept(48).wanted) <= splits().kept and len(set(asked.kept(48).wanted)) == 30


def test_no_expert_retains_or_becomes_what_another_erases(asked: Any) -> None:
    for name in asked.CONCEPTS:
        one = asked.concept_of(name)
        assert not {*one.retain, *one.anchors} & asked.erased() and len(one.retain) > 30 and len(one.anchors) == 1


def test_seeds_of_concepts_and_of_what_is_kept_do_not_meet(asked: Any) -> None:
    of_all = [asked.named(name, asked.most(name)) for name in asked.CONCEPTS] + [asked.kept(asked.IMAGES)]
    seeds = [seed for each in of_all for seed in range(each.seed, each.seed + len(each.texts))]
    assert len(seeds) == len(set(seeds))


def expert(seed: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    return {
        f"{stem}.lora_A.weight": torch.randn(4, 7, generator=draw, dtype=torch.float64),
        f"{stem}.lora_B.weight": torch.randn(9, 4, generator=draw, dtype=torch.float64),
    }


def change(factors: Any) -> Any:
    (a,), (b,) = ([tensor for name, tensor in factors.items() if f"lora_{side}" in name] for side in "AB")
    return b @ a


def test_the_rules_are_those_of_the_library(bench: Any) -> None:
    two = [expert(0), expert(1)]
    summed = change(two[0]) + change(two[1])
    found = {rule: make(two, None, ()) for rule, make in bench.RULES.items() if rule != "co-merge"}
    torch.testing.assert_close(change(found["sum"][0]), summed, atol=1e-12, rtol=0)
    torch.testing.assert_close(change(found["average"][0]), summed / 2, atol=1e-12, rtol=0)
    values = torch.linalg.svdvals(summed)
    rank = bench.METHOD.rank
    assert found["average, cut"][1] == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-6)
    deltas = torch.stack([change(each) for each in two])
    for density in (0.1, 0.3, 0.5):
        torch.testing.assert_close(change(found[f"ties, density {density}"][0]), merging.ties(deltas, density), atol=1e-5, rtol=0)
    with_a_small_layer = [each | {name.replace("to_k", "to_v"): 1e-3 * tensor for name, tensor in each.items()} for each in two]
    vector, _ = bench.RULES["ties, vector, density 0.2"](with_a_small_layer, None, ())
    assert (
        sum(int(tensor.any()) for name, tensor in vector.items() if "to_v" in name) == 0 and list(found)[-1] == "ties, vector, density 0.2"
    )


def put(bench: Any, folder: Path) -> Any:
    """Cells of the base, of two experts, and of one merge: half of what was named is gone after it, and one kept image of 48."""
    made = bench.Bench(folder)
    yes, no = [[True] * 24, [False] * 24], [[False] * 24, [True] * 24]
    kept = [[True] * 48, [False] * 48]
    made.keep("base", {"named": {name: yes for name in bench.CONCEPTS}, "kept": kept})
    for name in bench.CONCEPTS[:2]:
        made.keep(f"expert {name}", {"named": {name: no}, "kept": yes, "bytes": 1e6, "seconds": 60.0})
    own = {"dagger": yes, "guitar": no}
    made.keep("2 average", {"named": own, "kept": [[False, *[True] * 47], [False] * 48], "lost": 0.25, "bytes": 2e6, "seconds": 0.5})
    return made


def test_lines_are_pooled_over_concepts_and_cells(bench: Any, tmp_path: Path) -> None:
    records = put(bench, tmp_path).records()
    assert [(r["experts"], r["rule"]) for r in records] == [(2, "base"), (2, "the expert alone"), (2, "average"), (4, "base"), (8, "base")]
    _, alone, merged, _, eight = records
    assert alone["named"]["value"] == 0 and alone["named"]["n"] == 48 and alone["kept"]["n"] == 48
    assert merged["named"]["value"] == 0.5 and merged["kept"]["value"] == pytest.approx(47 / 48)
    assert merged["unrecognised"]["value"] == 0.5 and merged["unrecognised"]["n"] == 48
    assert merged["by concept"] == {"dagger": 1.0, "guitar": 0.0}
    assert eight["named"]["n"] == 48 and set(eight["by concept"]) == set(bench.CONCEPTS)
    assert bench.line(merged).startswith("| 2 | average | 50 % (36-64, n=48) | 50 % (36-64, n=48) | 98 % (89-100, n=48) |")
    assert bench.line(merged).endswith("| 25 % | 2.00 | 0.5 |")


def test_the_page_keeps_its_words_and_gets_the_tables(bench: Any, tmp_path: Path) -> None:
    marks = import_module("page")
    (tmp_path / "merging.md").write_text(f"before\n{marks.begin('merging.py')}\nold\n{marks.END}\nafter\n")
    bench.publish(put(bench, tmp_path / "out").records(), tmp_path)
    page = (tmp_path / "merging.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page and "| 2 | average |" in page
    assert json.loads((tmp_path / "merging.json").read_text())[2]["lost"] == 0.25


def test_what_is_there_is_not_made_again_and_time_stops_a_run(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = put(bench, tmp_path)
    done: list[str] = []
    monkeypatch.setattr(bench.Bench, "fit", lambda self, name: done.append(f"fit {name}"))
    monkeypatch.setattr(bench.Bench, "expert", lambda self, name: done.append(f"expert {name}"))
    monkeypatch.setattr(bench.Bench, "merge", lambda self, size, rule: done.append(f"{size} {rule}"))
    made.run(-1.0)
    assert not done
    made.run(None)
    assert len(done) == 8 + 6 + 3 * len(bench.RULES) - 1
    assert "2 average" not in done and "expert dagger" not in done and done.index("fit flat") < done.index("4 average")


def test_an_expert_of_other_settings_is_refused(bench: Any, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = AdapterEraser(SafetyDPO(preset="canvas", steps=7), (asked.concept_of("drum"),), expert(0))
    monkeypatch.setattr(artifact, "load_eraser", lambda folder: (other, {"method": "safety_dpo"}))
    with pytest.raises(ErasureError, match="fitted with other settings"):
        bench.Bench(tmp_path).load("drum")
