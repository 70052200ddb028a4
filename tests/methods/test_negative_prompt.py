"""The negative prompt says what the concept is, whatever the user adds, and never silently does nothing."""

from typing import Any

import pytest
import torch

from erasure.concept import Concept
from erasure.errors import ErasureError, NotErased
from erasure.methods.negative_prompt import NegativePrompt, combine
from tests.tiny import TOKENS, WORDS, latents, sd1

CONCEPTS = [Concept("dagger", targets=("dagger", "big knife")), Concept("cat"), Concept("again", targets=("dagger",))]
PHRASES = "dagger, big knife, cat"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd1()


def test_combine_puts_the_phrases_first_where_truncation_cannot_reach_them() -> None:
    assert combine(["a", "b"], None) == combine(["a", "b"], "") == "a, b"
    assert combine(["a", "b"], "x") == "a, b, x"
    assert combine(["a"], ["x", ""]) == ["a, x", "a"]


@pytest.mark.parametrize(
    ("prompt", "user", "written"),
    [
        ("a boat", None, PHRASES),
        ("a boat", "red", f"{PHRASES}, red"),
        (["a boat", "a dog"], None, [PHRASES] * 2),
        (["a boat", "a dog"], "red", [f"{PHRASES}, red"] * 2),
        (["a boat", "a dog"], ["red", "big"], [f"{PHRASES}, red", f"{PHRASES}, big"]),
    ],
)
def test_attaching_equals_writing_the_phrases_by_hand(pipe: Any, prompt: Any, user: Any, written: Any) -> None:
    by_hand = latents(pipe, prompt, negative_prompt=written)
    plain = latents(pipe, prompt, negative_prompt=[user] * len(prompt) if isinstance(prompt, list) and isinstance(user, str) else user)
    with NegativePrompt().fit(pipe, CONCEPTS).attach(pipe):
        ours = latents(pipe, prompt, negative_prompt=user)
    assert torch.equal(ours, by_hand)
    assert not torch.allclose(ours, plain, atol=1e-2)


def test_a_long_negative_prompt_of_the_user_does_not_push_the_concept_out(pipe: Any) -> None:
    long = "the red boat on the night sky with a dog " * 12
    assert len(pipe.tokenizer(long).input_ids) > TOKENS
    cut = latents(pipe, "a dagger", negative_prompt=long)
    with NegativePrompt().fit(pipe, CONCEPTS).attach(pipe):
        assert (latents(pipe, "a dagger", negative_prompt=long) - cut).abs().max() > 1e-2


def test_phrases_that_the_encoder_will_not_read_are_named_in_a_warning(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    phrases = tuple(f"{word} {noun}" for noun in ("knife", "cat") for word in WORDS)
    # Two tokens and a comma each: 25 phrases fill 74 of the 75 places between the start and end tokens.
    NegativePrompt().fit(pipe, [Concept("few", targets=phrases[:25])])
    assert not caplog.records
    NegativePrompt().fit(pipe, [Concept("many", targets=phrases)])
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().endswith("cut off: " + ", ".join(phrases[25:]))


def test_no_concepts_is_an_error(pipe: Any) -> None:
    with pytest.raises(ErasureError, match="concept"):
        NegativePrompt().fit(pipe, [])


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_guidance_off_raises(pipe: Any, guidance: float) -> None:
    with NegativePrompt().fit(pipe, CONCEPTS).attach(pipe), pytest.raises(NotErased, match="guidance"):
        latents(pipe, "a boat", guidance_scale=guidance)


def test_guidance_switched_off_on_the_way_raises(pipe: Any) -> None:
    def cut(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": values["prompt_embeds"][-1:]}

    options: dict[str, Any] = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with NegativePrompt().fit(pipe, CONCEPTS).attach(pipe), pytest.raises(NotErased, match="negative"):
        latents(pipe, "a boat", **options)


def test_a_plain_call_stays_the_baseline(pipe: Any) -> None:
    base = latents(pipe, "a boat")
    with NegativePrompt().fit(pipe, CONCEPTS).attach(pipe):
        latents(pipe, "a boat")
    assert torch.equal(latents(pipe, "a boat"), base)
