"""SAFREE on every family: each encoder's tokens and pooled vectors against references written out by hand, and what a call may ask for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.concept import Concept
from erasure.errors import ErasureError, NotErased
from erasure.families import family_of
from erasure.method import Eraser
from erasure.methods import safree
from erasure.methods.safree import SAFREE
from tests.methods.safree_reference import LAYOUT, Part, Reference, encode, is_t5, reference
from tests.tiny import FAMILIES, latents

CONCEPT = Concept("dagger", targets=("dagger", "a big red knife"))
TEXT, OTHER = "a photo of a dagger on the boat", "the night sky with a big cat"
LONG = "a dagger on " + "the night sky with a cat on a boat " * 12
BUILT: dict[str, Any] = {}

every = pytest.mark.parametrize("family", FAMILIES)


def pipe_of(family: str) -> Any:
    """A pipeline that tests share and leave as it was."""
    return BUILT.setdefault(family, FAMILIES[family]())


def fit(pipe: Any, **config: Any) -> Eraser:
    return SAFREE(**config).fit(pipe, [CONCEPT])


def safe(pipe: Any, text: Any, config: dict[str, Any] | None = None, **options: Any) -> dict[str, Tensor]:
    with fit(pipe, **config or {}).attach(pipe):
        return encode(pipe, text, **options)


def check(ours: dict[str, Tensor], expected: Reference, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(ours["embeds"][0].double(), expected.context, atol=tolerance, rtol=0)
    if expected.pooled is not None:
        torch.testing.assert_close(ours["pooled"][0].double(), expected.pooled, atol=tolerance, rtol=0)


def parts(family: str, *, tokens: bool = True) -> list[Part]:
    return [part for part in LAYOUT[family] if part.rows or not tokens]


def changed(part: Part, ours: dict[str, Tensor], plain: dict[str, Tensor]) -> list[int]:
    """Rows of the context in which one encoder's channels differ in any bit."""
    assert part.rows is not None
    here = (ours["embeds"] != plain["embeds"])[0, part.rows, part.columns].any(-1)
    return [i + part.rows.start for i in here.nonzero()[:, 0].tolist()]


@every
def test_tokens_and_pooled_vectors_equal_the_reference(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, betas = pipe_of(family), []

    def remember(beta: float, *args: Any) -> int:
        betas.append(beta)
        return 0

    monkeypatch.setattr(safree.filter, "filter_steps", remember)
    for text in (TEXT, OTHER):
        expected, plain = reference(pipe, text, CONCEPT.targets), encode(pipe, text)
        ours = safe(pipe, text, {"self_validating": True})
        check(ours, expected)
        assert betas.pop() == pytest.approx(expected.beta, abs=1e-4) and not betas
        for part in parts(family):
            triggers = expected.triggers[part.encoder]
            assert changed(part, ours, plain) == triggers, "every trigger moves, and nothing else by a single bit"
            assert 0 < len(triggers) < 9 and (expected.context - plain["embeds"][0].double())[triggers].abs().max() > 0.05
        if expected.pooled is not None:
            for part in parts(family, tokens=False):
                moved = (expected.pooled - plain["pooled"][0].double())[part.pooled].abs().max() if part.pooled else 1
                assert moved > 0.05, f"the vector of {part.encoder} moves"


def test_the_padding_beside_clips_channels_stays() -> None:
    pipe = pipe_of("sd3")
    ours = safe(pipe, TEXT, {"scope": "sentence"})["embeds"][0]
    assert not ours[:77, 56:].any() and ours[77:, 56:].all(-1).any()


def test_encoders_find_triggers_in_their_own_tokens() -> None:
    """A word that CLIP reads as one token and T5 letter by letter; each finds its own."""
    pipe = FAMILIES["sd3"]()
    pipe.tokenizer_3 = pipe.tokenizer_3.__class__(tokenizer_object=without_words(pipe.tokenizer_3), **special(pipe.tokenizer_3))
    expected = reference(pipe, "a dagger", CONCEPT.targets)
    check(safe(pipe, "a dagger"), expected)
    assert all(row < 3 for row in expected.triggers["text_encoder"]), "two words"
    assert any(row > 77 + 2 for row in expected.triggers["text_encoder_3"]), "seven letters"


def without_words(tokenizer: Any) -> Any:
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), behavior="isolated")])
    return core


def special(tokenizer: Any) -> dict[str, Any]:
    return {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": tokenizer.model_max_length}


@every
def test_a_sentence_reaches_the_end_and_the_padding(family: str) -> None:
    pipe = pipe_of(family)
    expected, plain, ours = reference(pipe, TEXT, CONCEPT.targets), encode(pipe, TEXT), safe(pipe, TEXT, {"scope": "sentence"})
    for part in parts(family):
        assert part.rows is not None
        end = part.rows.start + 8 + (not is_t5(pipe, part))
        stop = end + 1 if family == "wan" else part.rows.stop  # Wan puts zeros after the end token, and they stay
        assert changed(part, ours, plain) == [*expected.triggers[part.encoder], *range(end, stop)]
    assert family != "wan" or not ours["embeds"][0, 9:].any()


@every
def test_a_prompt_without_triggers_passes_bit_by_bit(family: str) -> None:
    pipe = pipe_of(family)
    config = {"alpha": 100.0, "negative_prompt": False, "self_validating": True}
    plain, ours = encode(pipe, TEXT), safe(pipe, TEXT, config)
    assert plain.keys() == ours.keys() and all(torch.equal(plain[key], ours[key]) for key in plain)
    base = latents(pipe, TEXT)
    with fit(pipe, **config).attach(pipe):
        assert torch.equal(latents(pipe, TEXT), base), "re-attention has nothing to do either"
    assert not torch.equal(safe(pipe, TEXT)["embeds"], plain["embeds"])


@every
def test_batches_and_several_pictures_a_prompt_equal_singles(family: str) -> None:
    pipe = pipe_of(family)
    count = "num_videos_per_prompt" if family == "wan" else "num_images_per_prompt"
    singles, four = [safe(pipe, text) for text in (TEXT, OTHER)], safe(pipe, [TEXT, OTHER], {}, **{count: 2})
    for key in four:
        expected = torch.cat([singles[i][key] for i in (0, 0, 1, 1)])
        torch.testing.assert_close(four[key], expected, atol=1e-5, rtol=1e-5)
    config = {"self_validating": True}
    with fit(pipe, **config).attach(pipe):
        both = latents(pipe, [TEXT, OTHER], seed=[1, 2, 3, 4], **{count: 2})
        alone = [latents(pipe, text, seed=seed) for text, seed in zip((TEXT, TEXT, OTHER, OTHER), (1, 2, 3, 4), strict=True)]
    assert (both - torch.cat(alone)).abs().max() < 1e-4 * both.abs().max().clamp(min=1)


@every
def test_prompts_longer_than_the_encoders_stay_protected(family: str) -> None:
    pipe = pipe_of(family)
    expected, plain, ours = reference(pipe, LONG, CONCEPT.targets), encode(pipe, LONG), safe(pipe, LONG)
    check(ours, expected, tolerance=1e-3)  # 75 vectors in 24 dimensions: their span is known less well
    for part in parts(family):
        assert part.rows is not None
        rows = changed(part, ours, plain)
        assert rows == expected.triggers[part.encoder] and rows and part.rows.stop - 1 not in rows


@pytest.mark.parametrize("family", ["sd3", "flux", "wan"])
def test_the_length_of_the_call_is_that_of_t5(family: str) -> None:
    pipe, part = pipe_of(family), parts(family)[-1]
    plain, ours = (function(pipe, LONG, max_sequence_length=16) for function in (encode, safe))
    assert part.rows is not None and ours["embeds"].shape[1] == part.rows.start + 16
    moved = [row - part.rows.start for row in changed(part, ours, plain)]
    assert moved and moved[-1] < 15, "words move, and the end token stays"


@every
def test_duplicate_phrases_are_one(family: str) -> None:
    pipe = pipe_of(family)
    once, thrice = (SAFREE().fit(pipe, [Concept("x", targets=targets)]) for targets in (("dagger",), ("dagger", "Dagger", "DAGGER")))
    assert {len(vectors) for vectors in thrice.tensors().values()} == {3}
    with once.attach(pipe):
        expected = encode(pipe, TEXT)
    with thrice.attach(pipe):
        ours = encode(pipe, TEXT)
    for key in ours:
        torch.testing.assert_close(ours[key], expected[key], atol=1e-4, rtol=0)


# steps


def seen(pipe: Any, **options: Any) -> list[dict[str, Any]]:
    """Inputs of every denoiser call of a run of four steps, as they arrive at its own forward."""
    calls: list[dict[str, Any]] = []
    family = family_of(pipe)

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(dict(zip(family.inputs, args, strict=False)) | kwargs)

    hooks = [part.register_forward_pre_hook(spy, with_kwargs=True) for _, part in family.parts(pipe)]
    latents(pipe, TEXT, **options)
    for hook in hooks:
        hook.remove()
    return calls


def sides(pipe: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Contexts and pooled vectors of a call, negative rows first where guidance runs in one batch."""
    pooled = call.get("pooled_projections")
    if call.get("added_cond_kwargs"):
        pooled = call["added_cond_kwargs"].get("text_embeds")
    return call["encoder_hidden_states"], pooled


@every
@pytest.mark.parametrize("choice", [None, True, False])
def test_the_filter_is_on_for_the_chosen_steps_and_the_prompt_comes_back(
    family: str, choice: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safree.filter, "filter_steps", lambda *args: 1)
    pipe, plain, ours = pipe_of(family), encode(pipe_of(family), TEXT), safe(pipe_of(family), TEXT)
    with fit(pipe, self_validating=choice).attach(pipe):
        calls = seen(pipe)
    stays = choice is False or (choice is None and family not in ("sd1", "sd2"))
    sequential = family in ("flux", "wan")
    assert len(calls) == (8 if sequential else 4)
    positives = calls[::2] if sequential else calls
    for step, call in enumerate(positives):
        context, pooled = sides(pipe, call)
        expected = ours if stays or step <= 1 else plain
        row = 0 if sequential else 1
        assert torch.equal(context[row], expected["embeds"][0]), f"context of step {step}"
        if "pooled" in plain:
            assert pooled is not None and torch.equal(pooled[row], expected["pooled"][0]), f"pooled vector of step {step}"
    negatives = [sides(pipe, call) for call in (calls[1::2] if sequential else calls)]
    for context, pooled in negatives:
        assert torch.equal(context[0], negatives[0][0][0]) and not torch.equal(context[0], ours["embeds"][0])
        assert pooled is None or torch.equal(pooled[0], negatives[0][1][0])  # type: ignore[index]


@pytest.mark.parametrize("family", ["sd3", "flux", "wan"])
def test_transformers_have_no_skip_features_and_pay_nothing(family: str) -> None:
    pipe = pipe_of(family)
    results, rows = [], []
    for reattention in (True, False):
        with fit(pipe, reattention=reattention).attach(pipe):
            results.append(latents(pipe, TEXT))
            rows.append([len(call["encoder_hidden_states"]) for call in seen(pipe)])
    assert torch.equal(*results) and rows[0] == rows[1] and set(rows[0]) == ({2} if family == "sd3" else {1})


# guidance


@every
def test_without_guidance_the_error_names_the_way_out(family: str) -> None:
    pipe = pipe_of(family)
    options: dict[str, Any] = {"negative_prompt": None, "true_cfg_scale": 1.0} if family == "flux" else {"guidance_scale": 1.0}
    base = latents(pipe, TEXT, **options)
    with fit(pipe).attach(pipe), pytest.raises(NotErased, match=r"negative_prompt=False"):
        latents(pipe, TEXT, **options)
    with fit(pipe, negative_prompt=False).attach(pipe):
        erased = latents(pipe, TEXT, **options)
    assert (erased - base).norm() > 0.02 * base.norm()


# what was saved


@every
def test_one_space_an_encoder_and_one_a_pooled_vector_are_saved(family: str) -> None:
    shapes = {name: tuple(vectors.shape) for name, vectors in fit(pipe_of(family)).tensors().items()}
    expected: dict[str, tuple[int, int]] = {}
    for part in LAYOUT[family]:
        expected |= {part.encoder: (2, part.columns.stop - part.columns.start)} if part.columns else {}
        expected |= {f"{part.encoder}.pooled": (2, part.pooled.stop - part.pooled.start)} if part.pooled else {}
    assert shapes == expected


def test_an_eraser_from_the_time_of_one_encoder_still_loads() -> None:
    pipe = pipe_of("sd1")
    eraser = fit(pipe)
    old = SAFREE().eraser((CONCEPT,), {"phrases": eraser.tensors()["text_encoder"]})
    assert old.tensors().keys() == {"text_encoder"}
    with old.attach(pipe):
        assert torch.equal(encode(pipe, TEXT)["embeds"], safe(FAMILIES["sd1"](), TEXT)["embeds"])


def test_phrases_of_another_base_are_refused() -> None:
    with pytest.raises(ErasureError, match="text_encoder_2"), fit(pipe_of("sd1")).attach(pipe_of("sdxl")):
        pass
    with pytest.raises(ErasureError, match="space of this text_encoder"), fit(pipe_of("wan")).attach(pipe_of("sd1")):
        pass
    for wrong in ({}, {"text_encoder_9": torch.zeros(1, 32)}):
        with pytest.raises(ErasureError, match="needs phrases"):
            SAFREE().eraser((CONCEPT,), wrong)
