"""What the seams promise by themselves; the contract covers them as methods use them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erasure.errors import Conflict, NotErased, NothingAttached
from erasure.families import family_of
from erasure.seams import attention, denoiser, prompt, weights
from erasure.seams.issued import Issued, StepCounter, reach
from erasure.testing.subject import Int8Linear, hooks
from erasure.testing.tiny import FAMILIES, latents, sd1, size_of

PROMPT = "a photo of a dagger"
EVERY = pytest.mark.parametrize("name", FAMILIES)


@EVERY
def test_a_denoiser_seam_sees_every_call_with_its_rows_and_steps(name: str) -> None:
    pipe = FAMILIES[name]()
    family, seen = family_of(pipe), []
    issued = Issued(family)

    def before(inputs: dict[str, Any]) -> None:
        assert inputs[family.inputs[0]].ndim >= 3 and "timestep" in inputs
        seen.append((len(inputs[family.context]), issued.rows.positives, issued.rows.negatives, issued.step))

    base = latents(pipe, [PROMPT, "a cat"], steps=3)
    hooked = hooks(pipe)
    with prompt.encoding(pipe, family, issued) as places, denoiser.calls(pipe, family, before, lambda output: output):
        assert places == 2 and torch.equal(latents(pipe, [PROMPT, "a cat"], steps=3), base)
    if family.cfg == "batch":
        assert seen == [(4, slice(2, 4), slice(0, 2), step) for step in range(3)]
    else:
        assert seen == [(2, *sides, step) for step in range(3) for sides in ((slice(0, 2), None), (None, slice(0, 2)))]
    assert hooks(pipe) == hooked


@EVERY
def test_a_rule_that_gives_back_the_text_prediction_changes_nothing_and_one_that_gives_uncond_ignores_the_prompt(name: str) -> None:
    pipe = FAMILIES[name]()
    family, issued = family_of(pipe), Issued(family_of(pipe), guided=True)

    def branches() -> list[denoiser.Branch]:
        assert issued.negative is not None
        return [(issued.negative, issued.negative_pooled)]

    def run(rule: Any, text: str) -> Tensor:
        with prompt.encoding(pipe, family, issued), denoiser.guidance(pipe, family, issued, branches, rule):
            return latents(pipe, text)

    def unchanged(uncond: Tensor, text: Tensor, extras: list[Tensor], step: int) -> Tensor:
        assert torch.allclose(extras[0], uncond, atol=1e-4), "the extra branch is the negative one"
        return text

    base = latents(pipe, PROMPT)
    assert (run(unchanged, PROMPT) - base).norm() < 1e-4 * base.norm()
    deaf = [run(lambda uncond, text, extras, step: uncond, text) for text in (PROMPT, "a big red boat")]
    assert (deaf[0] - deaf[1]).norm() < 1e-4 * base.norm() < (deaf[0] - base).norm()


def test_guidance_seams_are_refused_without_guidance() -> None:
    pipe = sd1()
    family = family_of(pipe)
    issued = Issued(family)
    with prompt.encoding(pipe, family, issued), denoiser.guidance(pipe, family, issued, lambda: [], lambda u, t, e, s: t):
        with pytest.raises(NotErased, match="guidance_scale > 1"):
            latents(pipe, PROMPT, guidance_scale=1.0)


def test_skip_layer_guidance_is_left_alone() -> None:
    pipe = FAMILIES["sd3"]()
    family = family_of(pipe)
    issued = Issued(family, guided=True)
    options: dict[str, Any] = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    base = latents(pipe, PROMPT, **options)
    assert not torch.equal(base, latents(pipe, PROMPT)), "the third call happens"
    with prompt.encoding(pipe, family, issued), denoiser.guidance(pipe, family, issued, lambda: [], lambda u, t, e, s: t):
        assert torch.allclose(latents(pipe, PROMPT, **options), base, atol=1e-4 * float(base.abs().max()))


@EVERY
def test_appended_rows_carry_their_own_prompt_and_leave_the_pipelines_tensors_alone(name: str) -> None:
    pipe = FAMILIES[name]()
    family = family_of(pipe)
    issued, kept = Issued(family), []

    def before(inputs: dict[str, Any]) -> None:
        context, pooled = inputs[family.context], reach(inputs, family.pooled)
        kept.append((context, context.clone(), pooled, None if pooled is None else pooled.clone()))
        denoiser.append(
            inputs, family, torch.tensor([0]), torch.ones_like(context[:1]), None if pooled is None else torch.ones_like(pooled[:1])
        )
        assert context is not None and torch.equal(inputs[family.context][:-1], context) and (inputs[family.context][-1] == 1).all()
        vectors = reach(inputs, family.pooled)
        assert vectors is None or ((vectors[-1] == 1).all() and len(vectors) == len(context) + 1)
        assert len(inputs[family.inputs[0]]) == len(context) + 1

    with prompt.encoding(pipe, family, issued), denoiser.calls(pipe, family, before, lambda output: output[:-1]):
        latents(pipe, PROMPT, steps=2)
    for context, copy, pooled, copy_pooled in kept:
        assert torch.equal(context, copy) and (pooled is None or (copy_pooled is not None and torch.equal(pooled, copy_pooled)))


@EVERY
def test_texts_encoded_alone_are_what_the_pipeline_would_encode(name: str) -> None:
    pipe = FAMILIES[name]()
    family = family_of(pipe)
    options = {key: value for key, value in size_of(pipe, PROMPT).items() if key == "max_sequence_length"}
    alone = prompt.encode_alone(pipe, family, [PROMPT, "a cat"], options)["embeds"]
    assert alone is not None
    issued: list[Tensor] = []

    def after(arguments: prompt.Arguments, embeds: Any) -> Any:
        issued.append(embeds["embeds"])
        return embeds

    with prompt.encoding(pipe, family, Issued(family), after):
        latents(pipe, [PROMPT, "a cat"], steps=1)
    assert len(issued) == 1 and torch.allclose(issued[0], alone, atol=1e-5)


# attention


class Silent:
    """A processor that delegates and then mutes."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        return tuple(0 * part for part in output) if isinstance(output, tuple) else 0 * output


@EVERY
def test_attention_processors_are_wrapped_by_name_and_put_back(name: str) -> None:
    pipe = FAMILIES[name]()
    family = family_of(pipe)
    base = latents(pipe, PROMPT)
    (_, unit), *_ = family.parts(pipe)
    before = dict(unit.attn_processors)  # type: ignore[arg-type]
    chosen = sorted(before)[0]
    with attention.processors(pipe, family, lambda key, inner: Silent(inner) if key == chosen else None) as opened:
        assert opened == 1 and not torch.equal(latents(pipe, PROMPT), base)
    assert torch.equal(latents(pipe, PROMPT), base) and dict(unit.attn_processors) == before  # type: ignore[arg-type]
    with attention.processors(pipe, family, lambda key, inner: None) as opened:
        assert opened == 0


def test_an_ip_adapters_processors_are_not_displaced() -> None:
    class IPAdapterAttnProcessor(Silent):
        pass

    pipe = sd1()
    pipe.unet.set_attn_processor({k: IPAdapterAttnProcessor(v) for k, v in pipe.unet.attn_processors.items()})
    with pytest.raises(Conflict, match="IPAdapterAttnProcessor"), attention.processors(pipe, family_of(pipe), lambda key, inner: None):
        pass


# weights


def test_only_plain_floating_point_weights_are_editable() -> None:
    plain = nn.Linear(2, 2).weight
    assert weights.editable("w", plain) is plain

    class Packed(nn.Parameter):
        pass

    for odd in (Int8Linear.of(nn.Linear(2, 2)).weight, Packed(torch.zeros(2)), object()):
        with pytest.raises(NothingAttached, match=r"w is quantised .*runtime or LoRA"):
            weights.editable("w", odd)
    with pytest.raises(NothingAttached, match="w is offloaded"):
        weights.editable("w", nn.Linear(2, 2, device="meta").weight)


def test_steps_are_counted_by_the_timesteps_that_pass() -> None:
    counter = StepCounter()
    assert [counter.see(t) for t in (torch.tensor(999), 999, torch.tensor([500, 500]), 500.0, 1)] == [0, 0, 1, 1, 2]
