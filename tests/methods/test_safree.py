"""SAFREE in a pipeline of SD 1: steps, re-attention, batches, refusals. What holds on every family is in test_safree_families.py."""

import copy
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import Tensor

from erasure.concept import Concept
from erasure.errors import Conflict, ErasureError, NotErased
from erasure.method import Eraser
from erasure.methods import safree
from erasure.methods.safree import SAFREE
from tests.methods.safree_reference import dense_reattend, encode, rand, reference
from tests.tiny import FAMILIES, TOKENS, latents, sd1

CONCEPT = Concept("dagger", targets=("dagger", "a big red knife"))
PROMPTS = ["a photo of a dagger on the boat", "the night sky with a cat"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd1()


def fit(pipe: Any, **config: Any) -> Eraser:
    return SAFREE(**config).fit(pipe, [CONCEPT])


def forwards(pipe: Any, call: Any) -> list[dict[str, Any]]:
    """Inputs of every denoiser call, as they arrive at the UNet's own forward."""
    seen: list[dict[str, Any]] = []

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(dict(zip(("sample", "timestep"), args, strict=False)) | kwargs)

    with pipe.unet.register_forward_pre_hook(spy, with_kwargs=True):
        call()
    return seen


@torch.no_grad()
def test_the_filter_is_on_for_the_chosen_steps_and_the_original_follows(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safree.filter, "filter_steps", lambda *args: 2)
    safe, original = reference(pipe, PROMPTS[0], CONCEPT.targets).context, encode(pipe, PROMPTS[0])["embeds"][0].double()
    with fit(pipe, reattention=False).attach(pipe):
        calls = forwards(pipe, lambda: latents(pipe, PROMPTS[0], steps=5))
    for step, call in enumerate(calls):
        context = call["encoder_hidden_states"]
        assert context.shape[0] == 2
        torch.testing.assert_close(context[1].double(), safe if step <= 2 else original, atol=1e-4, rtol=0)


def test_solvers_that_call_twice_a_step_count_one(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safree.filter, "filter_steps", lambda *args: 1)
    heun = copy.copy(pipe)
    heun.scheduler = HeunDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with fit(heun, reattention=False).attach(heun):
        calls = forwards(heun, lambda: latents(heun, PROMPTS[0], steps=4))
    timesteps = [float(call["timestep"]) for call in calls]
    assert len(calls) == 7 and len(set(timesteps)) == 4
    original = calls[-1]["encoder_hidden_states"][1]
    filtered = [not torch.equal(call["encoder_hidden_states"][1], original) for call in calls]
    # Heun evaluates t0, t1, t1, t2, t2, ...: two steps of filtering are the calls at t0 and t1.
    assert filtered == [True, True, True, False, False, False, False]


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_reattention_equals_a_three_branch_forward_by_hand(family: str) -> None:
    pipe = FAMILIES[family]()
    eraser = SAFREE(self_validating=False, negative_prompt=False, s1=0.7, s2=0.1).fit(pipe, [CONCEPT])
    sample, safe = rand(1, 4, 8, 8).float(), reference(pipe, PROMPTS[0], CONCEPT.targets)
    texts = {"safe": {"embeds": safe.context[None].float()}, "original": encode(pipe, PROMPTS[0]), "uncond": encode(pipe, "")}
    if safe.pooled is not None:
        texts["safe"]["pooled"] = safe.pooled[None].float()
    with eraser.attach(pipe):
        given = pipe.encode_prompt(PROMPTS[0], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="")
        context, extra = torch.cat([given[1], given[0]]), conditions(*reversed(given[2:]))
        ours = pipe.unet(torch.cat([sample] * 2), 500, encoder_hidden_states=context, **extra).sample

    def of(*names: str) -> tuple[Tensor, dict[str, Any]]:
        pooled = [texts[name]["pooled"] for name in names if "pooled" in texts[name]]
        return torch.cat([texts[name]["embeds"] for name in names]), conditions(*pooled)

    expected = three_branches(pipe.unet, sample, 500, *of("uncond", "safe", "original"), {32: 0.7, 16: 0.1})
    context, extra = of("uncond", "safe")
    plain = pipe.unet(torch.cat([sample] * 2), 500, encoder_hidden_states=context, **extra).sample
    torch.testing.assert_close(ours, expected[:2], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[:1], plain[:1], atol=1e-4, rtol=0)
    assert (ours[1] - plain[1]).abs().max() > 1e-2


def conditions(*pooled: Tensor) -> dict[str, Any]:
    """SDXL's further inputs, for one pooled vector [1, dim] a row; none for other families."""
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * len(pooled))
    return {"added_cond_kwargs": {"text_embeds": torch.cat(pooled), "time_ids": ids}} if pooled else {}


def test_the_third_branch_is_gone_once_the_filter_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safree.filter, "filter_steps", lambda *args: 1)
    for family in ("sd1", "sdxl"):
        pipe = FAMILIES[family]()
        eraser = SAFREE(self_validating=True).fit(pipe, [CONCEPT])
        with eraser.attach(pipe):
            calls = forwards(pipe, lambda pipe=pipe: latents(pipe, PROMPTS[0], steps=4))
        assert [len(call["encoder_hidden_states"]) for call in calls] == [3, 3, 2, 2]


def three_branches(unet: Any, sample: Tensor, timestep: int, context: Tensor, extra: dict[str, Any], scales: dict[int, float]) -> Tensor:
    """The UNet's forward, block by block as in SD 1.x, with the skip features of row 1 re-attended to those of row 2."""
    temb = unet.time_embedding(unet.time_proj(torch.tensor([timestep] * 3)))
    if extra:
        given = extra["added_cond_kwargs"]
        times = unet.add_time_proj(given["time_ids"].flatten()).reshape(3, -1)
        temb = temb + unet.add_embedding(torch.cat([given["text_embeds"], times], dim=1))
    h = unet.conv_in(torch.cat([sample] * 3))
    skips = [h]
    for block in unet.down_blocks:
        for i, resnet in enumerate(block.resnets):
            h = resnet(h, temb)
            if hasattr(block, "attentions"):
                h = block.attentions[i](h, encoder_hidden_states=context).sample
            skips.append(h)
        for down in block.downsamplers or []:
            h = down(h)
            skips.append(h)
    mid = unet.mid_block
    h = mid.resnets[0](h, temb)
    h = mid.resnets[1](mid.attentions[0](h, encoder_hidden_states=context).sample, temb)
    for block in unet.up_blocks:
        for i, resnet in enumerate(block.resnets):
            skip = skips.pop()
            if h.shape[1] in scales:
                skip = skip.clone()
                skip[1:2] = torch.tensor(dense_reattend(skip[1:2], skip[2:3], scales[h.shape[1]], 1, "paper")).float()
            h = resnet(torch.cat([h, skip], 1), temb)
            if hasattr(block, "attentions"):
                h = block.attentions[i](h, encoder_hidden_states=context).sample
        for up in block.upsamplers or []:
            h = up(h)
    return torch.as_tensor(unet.conv_out(unet.conv_act(unet.conv_norm_out(h))))


@pytest.mark.parametrize("config", [{}, {"self_validating": False}, {"reattention": False, "order": "paper", "filter_rule": "paper"}])
def test_a_batch_equals_its_prompts_one_by_one(pipe: Any, config: dict[str, Any]) -> None:
    with fit(pipe, **config).attach(pipe):
        both = latents(pipe, PROMPTS, seed=[1, 2])
        singles = torch.cat([latents(pipe, text, seed=seed) for text, seed in zip(PROMPTS, (1, 2), strict=True)])
    assert (both - singles).abs().max() < 1e-4


def test_rows_of_one_batch_may_stop_filtering_at_different_steps(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eraser = fit(pipe)
    monkeypatch.setattr(safree.filter, "filter_steps", lambda *args: 1)
    with eraser.attach(pipe):
        short = latents(pipe, PROMPTS[0], seed=1)
    monkeypatch.setattr(safree.filter, "filter_steps", lambda *args: 9)
    with eraser.attach(pipe):
        long = latents(pipe, PROMPTS[1], seed=2)
    answers = iter([1, 9])
    monkeypatch.setattr(safree.filter, "filter_steps", lambda *args: next(answers))
    with eraser.attach(pipe):
        both = latents(pipe, PROMPTS, seed=[1, 2])
    assert (both - torch.cat([short, long])).abs().max() < 1e-4


def test_several_images_a_prompt_are_filtered_alike(pipe: Any) -> None:
    with fit(pipe).attach(pipe):
        four = latents(pipe, PROMPTS, seed=[1, 2, 3, 4], num_images_per_prompt=2)
        singles = [latents(pipe, text, seed=seed) for text, seed in zip([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, (1, 2, 3, 4), strict=True)]
    assert (four - torch.cat(singles)).abs().max() < 1e-4


def test_prompts_over_the_token_limit_stay_protected(pipe: Any) -> None:
    text = "a dagger on " + "the night sky with a cat on a boat " * 12
    assert len(pipe.tokenizer(text).input_ids) > TOKENS
    plain, _ = pipe.encode_prompt(text, "cpu", 1, True)
    with fit(pipe).attach(pipe):
        safe, _ = pipe.encode_prompt(text, "cpu", 1, True)
    moved = (safe - plain).abs().amax(-1)[0] > 1e-4
    assert moved.any() and not moved[0] and not moved[-1]


def test_an_end_token_in_the_text_does_not_hide_what_follows_it(pipe: Any) -> None:
    plain, _ = pipe.encode_prompt("cat <|endoftext|> a photo of a dagger", "cpu", 1, True)
    with fit(pipe).attach(pipe):
        safe, _ = pipe.encode_prompt("cat <|endoftext|> a photo of a dagger", "cpu", 1, True)
    masked_words = (safe - plain).abs().amax(-1)[0][3:8] > 1e-4
    assert masked_words.any() and not masked_words.all()


def test_the_empty_prompt_passes_unfiltered(pipe: Any) -> None:
    base = latents(pipe, "")
    with fit(pipe, negative_prompt=False).attach(pipe):
        torch.testing.assert_close(latents(pipe, ""), base, atol=1e-5, rtol=0)
    with fit(pipe).attach(pipe):
        assert (latents(pipe, "") - base).abs().max() > 1e-2


def test_guidance_off_raises_only_where_the_negative_prompt_is_part_of_the_method(pipe: Any) -> None:
    base = latents(pipe, PROMPTS[0], guidance_scale=1.0)
    with fit(pipe).attach(pipe), pytest.raises(NotErased, match="guidance"):
        latents(pipe, PROMPTS[0], guidance_scale=1.0)
    with fit(pipe, negative_prompt=False).attach(pipe):
        assert (latents(pipe, PROMPTS[0], guidance_scale=1.0) - base).abs().max() > 1e-2


def test_style_concepts_take_the_artist_constants(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []

    def remember(beta: float, kind: str, rule: str) -> int:
        kinds.append(kind)
        return 0

    monkeypatch.setattr(safree.filter, "filter_steps", remember)
    for concept in (CONCEPT, Concept("van gogh", kind="style")):
        with SAFREE().fit(pipe, [concept]).attach(pipe):
            pipe.encode_prompt(PROMPTS[0], "cpu", 1, True)
    assert kinds == ["nudity", "artist"]


def test_two_safrees_at_once_are_refused(pipe: Any) -> None:
    other = SAFREE().fit(pipe, [Concept("cat")])
    with fit(pipe).attach(pipe), pytest.raises(Conflict, match="all concepts"), other.attach(pipe):
        pass


def test_no_concepts_is_an_error(pipe: Any) -> None:
    with pytest.raises(ErasureError, match="concept"):
        SAFREE().fit(pipe, [])
