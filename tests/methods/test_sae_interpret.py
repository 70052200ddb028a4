"""What is said of a feature is what the coder's codes say."""

from typing import Any

import pytest
import torch

from erasure.concept import Concept, load
from erasure.families import family_of
from erasure.methods.itd import ItD, strongest
from erasure.methods.sae.features import explain, scaled, strip
from erasure.methods.sae.hookpoints import activations
from erasure.methods.sae.interpret import Reading, all_peaks, concept_scores, faint, peaks, read, sharers, tokens, top_prompts
from erasure.methods.sae.prompts import prompts_of, retained, retained_phrases
from erasure.models import load_base


def reading() -> Reading:
    codes = torch.zeros(4, 5, 2)
    codes[0, :, 0] = torch.tensor([0, 1, 2, 0, 0.5])
    codes[1, :, 0] = torch.tensor([0, -3, 1, 0, 0.0])
    codes[2, :, 0] = torch.tensor([2, 0, 0, 0, 0.0])
    codes[0, 3, 1] = 7
    return Reading(("a", "b", "c", "d"), codes, (("x", "y", "end"), ("x", "y", "z", "v", "end"), ("x", "end"), ("end",)))


def test_peaks_are_the_largest_by_size_and_keep_their_sign() -> None:
    assert peaks(reading().codes).tolist() == [[2, 7], [-3, 0], [2, 0], [0, 0]]


def test_top_prompts_fall_by_size_equal_ones_stay_in_order_and_silent_ones_are_left_out() -> None:
    assert [(match.prompt, match.peak) for match in top_prompts(reading(), 0, 9)] == [("b", -3), ("a", 2), ("c", 2)]
    assert [match.prompt for match in top_prompts(reading(), 0, 2)] == ["b", "a"]
    assert [match.prompt for match in top_prompts(reading(), 1, 9)] == ["a"]


def test_a_heat_map_has_a_code_a_word_and_the_padding_as_one() -> None:
    assert tokens(reading(), 0, 0) == (("x", 0), ("y", 1), ("end", 2), ("padding × 2", 0.5))
    assert tokens(reading(), 1, 0) == (("x", 0), ("y", -3), ("z", 1), ("v", 0), ("end", 0)), "no padding, no cell for it"
    assert tokens(reading(), 0, 1)[-1] == ("padding × 2", 7)


def test_concepts_are_ranked_by_the_mean_of_their_prompts() -> None:
    column = torch.tensor([4.0, 0, 0, -6, 0])
    assert concept_scores(column, {"a": [0, 1], "b": [3], "c": [2, 4], "d": []}) == [("b", -6), ("a", 2)]


def test_sharing_names_who_keeps_a_feature_and_who_has_a_little_of_it() -> None:
    own = torch.tensor([[5.0, 4, 3, 0], [5, 0, 0, 1]])
    kept = {"cat": torch.tensor([[0.0, 9, 8, 0]]), "dog": torch.tensor([[0.1, 9, 0, 8.0], [0.3, 9, 0, 8]]), "sun": torch.zeros(1, 4)}
    assert sharers(own, kept, 2) == {1: ("cat", "dog"), 3: ("dog",)}, "2 is not among the target's two strongest"
    ((name, least),) = faint(0, kept)
    assert name == "dog" and least == pytest.approx(0.2)
    assert faint(2, kept) == [("cat", 8)]


def test_retained_phrases_are_the_prompts_that_the_method_keeps() -> None:
    concepts = [Concept("cat", retain=("dog", "sun"), anchors=("toy",)), Concept("dog", retain=("sun",))]
    found = retained_phrases(concepts)
    assert list(found) == ["", "toy", "sun"], "dog is a target of the other"
    assert sorted({text for texts in found.values() for text in texts}) == sorted(retained(concepts))


@pytest.fixture(scope="module")
def canvas() -> tuple:
    pipe = load_base("canvas", device="cpu")
    eraser = ItD().fit(pipe, [load("dagger", canvas=True)])
    return pipe, eraser, *next(eraser.switches(pipe, family_of(pipe)))


def test_the_heat_map_is_the_coders_own_codes(canvas: tuple) -> None:
    pipe, _, encoder, switch = canvas
    prompts = [f"a picture of a dagger, number {i}" for i in range(65)] + ["a banana"]  # more than a batch
    found = read(pipe, encoder, switch, switch.features, prompts)
    x, real = activations(pipe, encoder, switch.layer, [prompts[64]])
    expected = switch.coder.encode(x)[0, 1:, switch.features]
    assert torch.allclose(found.codes[64], expected, atol=1e-4) and expected.max() > 1
    assert found.words[-1] == ("a", "banana", "end") and len(found.words[64]) == int(real.sum()) - 1
    shown = tokens(found, 64, 0)
    assert [token.code for token in shown[:-1]] == pytest.approx(expected[: len(shown) - 1, 0].tolist(), abs=1e-4)


def test_a_concepts_features_are_explained(canvas: tuple) -> None:
    pipe, eraser, encoder, switch = canvas
    probes = [("a dagger", ("dagger",)), ("a banana", ("banana",)), ("a cat", ("cat",))]
    found = explain(pipe, eraser, probes)
    assert {one.index for one in found.features} == set(switch.features.tolist())
    scores = [abs(one.score) for one in found.features]
    assert scores == sorted(scores, reverse=True)
    first = found.features[0]
    assert first.concepts[0][0] == "dagger" and first.prompts[0].prompt == "a dagger"
    assert first.prompts[0].peak == max((token.code for token in first.prompts[0].tokens), key=abs)
    assert first.example in prompts_of(eraser.concepts[0], eraser.concepts[0].targets)
    own = all_peaks(pipe, encoder, switch, prompts_of(eraser.concepts[0], eraser.concepts[0].targets))
    assert first.score == pytest.approx(float(own[:, first.index].mean()))
    both = {one.index for one in found.spared} | set(switch.features.tolist())
    assert both == set(strongest(own, eraser.method.k).nonzero().flatten().tolist()), "every strong feature is either off or spared"


def test_scaling_by_one_changes_nothing_and_by_zero_takes_the_code_out(canvas: tuple) -> None:
    pipe, _, encoder, switch = canvas
    x = activations(pipe, encoder, switch.layer, ["a dagger"] * 3)[0]
    one = switch.features[:1]
    out = scaled(switch, x, one, torch.tensor([1.0, 0.0, 3.0]))
    code = switch.coder.encode(x[:1])[0, 1:, one]
    assert torch.equal(out[0], x[0]) and torch.equal(out[:, 0], x[:, 0]), "the start token stays"
    assert torch.allclose(out[1, 1:], x[1, 1:] - code * switch.coder.W_dec[one], atol=1e-5)
    assert torch.allclose(out[2, 1:], x[2, 1:] + 2 * code * switch.coder.W_dec[one], atol=1e-5)


def test_a_strip_at_factor_one_is_the_bare_model(canvas: tuple) -> None:
    pipe, eraser, *_ = canvas
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"steps": 2, "guidance_scale": 4.0}
    features = {"text_encoder.layers.2": eraser.held["text_encoder.features"].tolist()}
    plain, off = strip(pipe, eraser, "a dagger", features, (1.0, -8.0), seed=3, **options)
    seeds = [torch.Generator("cpu").manual_seed(3) for _ in range(2)]
    bare = pipe(["a dagger"] * 2, num_inference_steps=2, generator=seeds, guidance_scale=4.0).images
    assert plain.tobytes() == bare[0].tobytes() and off.tobytes() != bare[1].tobytes()
    after = pipe(["a dagger"] * 2, num_inference_steps=2, generator=[s.manual_seed(3) for s in seeds], guidance_scale=4.0).images
    assert after[1].tobytes() == bare[1].tobytes(), "nothing is left behind"
