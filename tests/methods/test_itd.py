"""Interpret-then-Deactivate: formulas against loops, the gate, every family's tiny pipeline, and the canvas with its shipped coder."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.splits import splits
from erasure.canvas.world import world
from erasure.concept import Concept
from erasure.errors import ErasureError
from erasure.families import NAMES, family_of
from erasure.method import Run
from erasure.methods.itd import ItD, deactivate, gate, select_features
from erasure.methods.sae import SparseCoder, SparseCoderConfig
from erasure.methods.sae.prompts import retained
from erasure.methods.sae.sources import coders
from erasure.models import load_base
from erasure.testing import check_method
from tests.stand_ins import text_coders
from tests.tiny import latents


def test_features_are_the_targets_strongest_that_no_retained_prompt_has() -> None:
    generator = torch.Generator().manual_seed(0)
    target, retain = torch.rand(3, 40, generator=generator), torch.rand(5, 40, generator=generator)
    own = {f for row in target for f in sorted(range(40), key=lambda f: -row[f])[:6]}
    kept = {f for row in retain for f in sorted(range(40), key=lambda f: -row[f])[:6]}
    assert select_features(target, retain, 6).tolist() == sorted(own - kept)
    tokens = torch.zeros(3, 4, 40)
    tokens[:, 2], tokens[:, 0] = target, 9.0  # what the start token says does not count
    assert select_features(tokens, retain, 6).tolist() == sorted(own - kept)
    off = torch.zeros(1, 40)
    assert select_features(off, retain, 6).tolist() == []


def test_deactivation_spares_the_start_token_and_other_features() -> None:
    codes = torch.rand(2, 5, 10)
    out = deactivate(codes, torch.tensor([1, 7]), -8.0)
    for token in range(5):
        for feature in range(10):
            times = -8.0 if token and feature in (1, 7) else 1.0
            assert torch.equal(out[:, token, feature], times * codes[:, token, feature])


def test_each_prompt_can_have_features_of_its_own_and_none_is_the_identity() -> None:
    codes = torch.rand(2, 5, 10)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 3] = True
    out = deactivate(codes, mask, -2.0)
    assert torch.equal(out[0], deactivate(codes[0], torch.tensor([3]), -2.0)) and torch.equal(out[1], codes[1])
    assert torch.equal(deactivate(codes, torch.zeros(0, dtype=torch.long), -2.0), codes)


def test_the_gate_compares_a_mean_with_the_threshold() -> None:
    x = torch.zeros(2, 4, 8)
    moved = x.clone()
    moved[0, 1] = 2.0  # one of four tokens: a mean of 1, a largest token of 4
    assert gate(x, moved, 1.0).tolist() == [True, False]
    assert gate(x, moved, 1.01).tolist() == [False, False]
    assert bool(gate(x[0], moved[0], 1.0))


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    assert check_method(ItD, families=[name], config={"sae": text_coders(name), "k": 32, "factor": -8.0, "threshold_scale": 0.05}) >= 15


CANVAS: dict[str, Any] = {}


def canvas() -> Any:
    if not CANVAS:
        CANVAS["pipe"] = load_base("canvas", device="cpu")
        CANVAS["pipe"].set_progress_bar_config(disable=True)
    return CANVAS["pipe"]


def test_on_the_canvas_the_dagger_goes_and_other_prompts_are_bit_identical() -> None:
    pipe = canvas()
    eraser = ItD().fit(pipe, [canvas_concept("dagger")])
    named = [f"a {style} drawing of a dagger on a {b} background" for style in ("flat", "cartoon") for b in ("sky", "pink", "mint")]
    options = {"num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "pt"}
    with eraser.attach(pipe):
        images = pipe(named, generator=[torch.Generator().manual_seed(i) for i in range(6)], **options).images
    assert int(judge_dev()(images).present[:, world().objects.index("dagger")].sum()) <= 1
    for other in ("a flat drawing of a cat", "a cartoon drawing of a hammer on a sky background"):
        base = latents(pipe, other)
        with eraser.attach(pipe):
            assert torch.equal(latents(pipe, other), base)


def test_batches_do_not_change_what_a_prompt_gets() -> None:
    pipe = canvas()
    eraser = ItD().fit(pipe, [canvas_concept("dagger")])
    with eraser.attach(pipe):
        alone, _ = pipe.encode_prompt("a flat drawing of a dagger", "cpu", 1, False)
        both, _ = pipe.encode_prompt(["a flat drawing of a cat", "a flat drawing of a dagger"], "cpu", 1, False)
    plain, _ = pipe.encode_prompt(["a flat drawing of a cat", "a flat drawing of a dagger"], "cpu", 1, False)
    assert (both[1] - alone[0]).abs().max() < 1e-5
    assert torch.equal(both[0], plain[0]) and (both[1] - plain[1]).norm() > 0.1 * plain[1].norm()


def test_detection_names_the_prompts_of_the_concept() -> None:
    pipe = canvas()
    found = ItD().fit(pipe, [canvas_concept("dagger")]).detect(pipe, ["a cartoon drawing of a dagger", "a cartoon drawing of a pizza"])
    assert [one.decision for one in found] == ["concept", "other"]
    assert found[0].score >= found[0].threshold > found[1].score


def embeddings(pipe: Any, prompts: list[str], eraser: Any = None) -> torch.Tensor:
    with nullcontext() if eraser is None else eraser.attach(pipe):
        found: torch.Tensor = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    return found


def test_with_one_concept_both_kinds_of_gate_are_the_same_bit_by_bit() -> None:
    pipe, prompts = canvas(), ["a flat drawing of a dagger", "a drawing of a cat, mint", "stiletto and a house"]
    each, union = (ItD(gates=gates).fit(pipe, [canvas_concept("dagger")]) for gates in ("each", "union"))
    assert set(each.held) == set(union.held) and all(torch.equal(value, union.held[name]) for name, value in each.held.items())
    assert each.held["text_encoder.threshold"].shape == (1,) and each.held["text_encoder.owners"].unique().tolist() == [0]
    assert torch.equal(embeddings(pipe, prompts, each), embeddings(pipe, prompts, union))


def test_a_prompt_is_edited_by_the_features_of_those_concepts_whose_gate_opens() -> None:
    pipe = canvas()
    names = ("dagger", "guitar", "pizza")
    eraser = ItD().fit(pipe, [canvas_concept(name) for name in names])
    owners, features = eraser.held["text_encoder.owners"], eraser.held["text_encoder.features"]

    def only(*chosen: int) -> Any:
        which = torch.isin(owners, torch.tensor(chosen))
        kept = {"features": features[which], "owners": torch.tensor([chosen.index(i) for i in owners[which].tolist()])}
        kept["threshold"] = eraser.held["text_encoder.threshold"][list(chosen)]
        return replace(eraser, held={**eraser.held, **{f"text_encoder.{name}": value for name, value in kept.items()}})

    for i, name in enumerate(names):
        prompts = [f"a flat drawing of a {name}", "a drawing of a cat"]
        assert torch.equal(embeddings(pipe, prompts, eraser), embeddings(pipe, prompts, only(i)))
        assert torch.equal(embeddings(pipe, prompts, eraser)[1], embeddings(pipe, prompts)[1])
        assert eraser.detect(pipe, prompts)[0].concept == name
    both = ["a drawing of a dagger and a guitar"]
    assert torch.equal(embeddings(pipe, both, eraser), embeddings(pipe, both, only(0, 1)))
    assert not torch.equal(embeddings(pipe, both, only(0, 1)), embeddings(pipe, both, only(0)))


def test_gates_of_many_concepts_leave_alone_what_one_gate_for_all_edits() -> None:
    pipe = canvas()
    names = sorted(splits().retain - {"airplane", "cigarette", "fish", "top hat", "hammer", "scissors", "light bulb"})[:20]
    concepts = [replace(one, retain=tuple(o for o in one.retain if o not in names)) for one in map(canvas_concept, names)]
    objects = sorted(splits().kept - {"banana", "key", "necktie", "strawberry", "turtle", "umbrella", "watermelon"})
    kept = [f"a {b} card with a {o}, {style} style" for o in objects for b in ("white", "sky") for style in ("flat", "sticker")]
    plain = embeddings(pipe, kept)
    same = {}
    for gates in ("each", "union"):
        edited = embeddings(pipe, kept, ItD(gates=gates, k=16).fit(pipe, concepts))  # type: ignore[arg-type]
        same[gates] = sum(torch.equal(a, b) for a, b in zip(plain, edited, strict=True))
    assert same["each"] > same["union"] + 0.2 * len(kept)


def test_a_style_goes_from_prompts_that_show_things_and_other_styles_stay_bit_by_bit() -> None:
    pipe = canvas()
    eraser = ItD().fit(pipe, [canvas_concept("flat")])
    named = [
        f"a {style} image of a {o} over {b}"
        for style in ("flat", "minimal")
        for o, b in (("robot", "sky"), ("owl", "pink"), ("bus", "mint"))
    ]
    options = {"num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "pt"}
    with eraser.attach(pipe):
        images = pipe(named, generator=[torch.Generator().manual_seed(i) for i in range(6)], **options).images
    assert int((judge_dev()(images).style == world().styles.index("flat")).sum()) <= 1
    pairs = ["a minimal image of an owl beside a robot over sky", "a pink card with a bus and a moon, flat style"]
    assert [one.decision for one in eraser.detect(pipe, pairs)] == ["concept"] * 2
    other = [prompt.replace("flat", "sticker").replace("minimal", "decal") for prompt in named]
    assert torch.equal(embeddings(pipe, other, eraser), embeddings(pipe, other))


def test_features_without_a_gate_are_refused() -> None:
    pipe = canvas()
    fitted = ItD().fit(pipe, [canvas_concept("dagger")])
    with pytest.raises(ErasureError, match="features do not all belong to one of 1 gates"):
        fitted.method.eraser(fitted.concepts, {**fitted.held, "text_encoder.owners": fitted.held["text_encoder.owners"] + 1})
    with pytest.raises(ErasureError, match="itd needs owners of text_encoder"):
        fitted.method.eraser(fitted.concepts, {name: value for name, value in fitted.held.items() if not name.endswith("owners")})


def test_without_features_every_prompt_passes_as_it_is_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pipe, prompts = canvas(), ["a dagger", "a cat"]
    for kind in ("change", "reconstruction", "off"):
        fitted = ItD(gate=kind, error_term=False).fit(pipe, [canvas_concept("dagger")])  # type: ignore[arg-type]
        none = {f"text_encoder.{name}": torch.zeros(0, dtype=torch.long) for name in ("features", "owners")}
        eraser = replace(fitted, held={**fitted.held, **none})
        assert torch.equal(embeddings(pipe, prompts, eraser), embeddings(pipe, prompts))
        assert not torch.equal(embeddings(pipe, prompts, fitted), embeddings(pipe, prompts))
    assert "no feature is switched in text_encoder, so every prompt passes there as it is" in caplog.text


def test_several_concepts_are_the_union_without_a_training() -> None:
    pipe = canvas()
    one, other = (canvas_concept(name) for name in ("dagger", "guitar"))
    union = ItD().fit(pipe, [one, other]).held["text_encoder.features"].tolist()
    retain = Concept("dagger", targets=one.targets, anchors=one.anchors, retain=(*one.retain, *other.retain, *other.anchors))
    assert set(ItD().fit(pipe, [retain]).held["text_encoder.features"].tolist()) <= set(union)
    assert "dagger" not in retained([one, Concept("x", retain=("dagger",))])


def test_bad_input_says_what_to_do(tmp_path: Path) -> None:
    pipe = canvas()
    torch.manual_seed(0)
    SparseCoder(SparseCoderConfig(d_in=160, num_latents=8, k=8, hookpoint="text_encoder.layers.2")).save(tmp_path / "small")
    with pytest.raises(ErasureError, match=r"no feature of 'dagger' that no retained prompt has too; shared are \d+, \d+.* by '"):
        ItD(sae=str(tmp_path / "small")).fit(pipe, [canvas_concept("dagger")])
    with pytest.raises(ErasureError, match=r"no feature of 'blade' that .* by 'a dagger', 'a picture of a dagger'"):
        ItD().fit(pipe, [canvas_concept("pizza"), Concept("blade", targets=("stiletto",), retain=("dagger",))])
    with pytest.raises(ErasureError, match=r"concept 'dagger': retain\[1\], 'Dagger ', is a target too"):
        Concept("dagger", retain=("axe", "Dagger "))
    SparseCoder(SparseCoderConfig(d_in=159, num_latents=8, k=2, hookpoint="text_encoder.layers.2")).save(tmp_path / "narrow")
    with pytest.raises(ErasureError, match="160 wide, and the coder was made for 159"):
        ItD(sae=str(tmp_path / "narrow")).fit(pipe, [canvas_concept("dagger")])
    SparseCoder(SparseCoderConfig(d_in=160, num_latents=8, k=2, hookpoint="text_encoder.layers.3")).save(tmp_path / "deep")
    with pytest.raises(ErasureError, match=r"has no hookpoint .*it has text_encoder.layers.0 to 2"):
        ItD(sae=str(tmp_path / "deep")).fit(pipe, [canvas_concept("dagger")])
    with pytest.raises(ErasureError, match="no sparse coder in"):
        ItD(sae=str(tmp_path / "none")).fit(pipe, [canvas_concept("dagger")])
    with pytest.raises(ErasureError, match="k is 0"):
        ItD(k=0)


def test_on_canvas_flow_both_encoders_have_their_coder_and_only_the_prompts_of_the_concept_change() -> None:
    pipe = load_base("canvas-flow", device="cpu")
    eraser = ItD().fit(pipe, [canvas_concept("dagger")], run=Run(progress=False))
    shipped = [coder.config.hookpoint.partition(".")[0] for coder in coders(pipe, family_of(pipe), "")]
    assert shipped == ["text_encoder", "text_encoder_2"]

    def encoded(prompt: str) -> list[torch.Tensor]:
        return [each for each in pipe.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=32) if each is not None]

    plain = {prompt: encoded(prompt) for prompt in ("a dagger", "a cat on a beach")}
    with eraser.attach(pipe):
        changed = {prompt: encoded(prompt) for prompt in plain}
    assert all(torch.equal(a, b) for a, b in zip(changed["a cat on a beach"], plain["a cat on a beach"], strict=True))
    assert (changed["a dagger"][0] - plain["a dagger"][0]).norm() > 0.1 * plain["a dagger"][0].norm()
