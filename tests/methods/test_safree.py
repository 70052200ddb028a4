"""SAFREE's formulas against references written here from the paper, in float64, and its behaviour in a pipeline."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import Tensor

from erasure.concept import Concept
from erasure.errors import Conflict, ErasureError, NotErased
from erasure.method import Eraser
from erasure.methods import safree
from erasure.methods.safree import SAFREE
from tests.tiny import TOKENS, latents, sd1

CONCEPT = Concept("dagger", targets=("dagger", "a big red knife"))
PROMPTS = ["a photo of a dagger on the boat", "the night sky with a cat"]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_projector(phrases: Tensor) -> np.ndarray[Any, Any]:
    columns = phrases.double().numpy().T
    return np.asarray(columns @ np.linalg.pinv(columns.T @ columns) @ columns.T)


# projector


@pytest.mark.parametrize("count", [1, 4, 17])
def test_projector_equals_the_papers_formula(count: int) -> None:
    phrases = rand(count, 24)
    ours = safree.projector(phrases)
    np.testing.assert_allclose(ours.numpy(), dense_projector(phrases), atol=1e-10)
    torch.testing.assert_close(ours, ours.T)
    torch.testing.assert_close(ours @ ours, ours)
    torch.testing.assert_close(phrases @ ours, phrases)
    assert ours.trace().item() == pytest.approx(count)


def test_projector_of_duplicates_is_that_of_the_distinct_phrases() -> None:
    phrases = rand(5, 24).float()
    twice = torch.cat([phrases, phrases, 3 * phrases[:2]])
    torch.testing.assert_close(safree.projector(twice), safree.projector(phrases), atol=1e-5, rtol=0)
    assert safree.projector(twice).trace().item() == pytest.approx(5, abs=1e-4)


def test_projector_of_near_parallel_phrases_is_exact() -> None:
    a, noise = rand(2, 24)
    a /= a.norm()
    side = noise - (noise @ a) * a
    side /= side.norm()
    b = 0.9999 * a + np.sqrt(1 - 0.9999**2) * side
    expected = torch.outer(a, a) + torch.outer(side, side)
    ours = safree.projector(torch.stack([a, b]).float())
    assert (ours - expected).abs().max() < 1e-4


def test_projector_of_nothing_and_of_everything() -> None:
    assert not safree.projector(rand(0, 8)).any()
    torch.testing.assert_close(safree.projector(rand(20, 8)), torch.eye(8, dtype=torch.float64))


# triggers


def naive_triggers(masked: Tensor, toxic: Tensor, alpha: float) -> list[bool]:
    distances = [float(np.linalg.norm((np.eye(toxic.shape[0]) - toxic.numpy()) @ row)) for row in masked.numpy()]
    found = []
    for i, distance in enumerate(distances):
        rest = distances[:i] + distances[i + 1 :]
        found.append(not (rest and distance < (1 + alpha) * sum(rest) / len(rest)))
    return found


@pytest.mark.parametrize("n", [0, 1, 2, 3, 30])
@pytest.mark.parametrize("alpha", [-0.1, 0.0, 0.01, 0.2])
def test_trigger_mask_equals_the_loop(n: int, alpha: float) -> None:
    masked, toxic = rand(n, 16, seed=n), safree.projector(rand(3, 16, seed=99))
    assert safree.trigger_mask(masked, toxic, alpha).tolist() == naive_triggers(masked, toxic, alpha)


def test_the_token_whose_absence_leaves_the_concept_is_the_trigger() -> None:
    direction = torch.eye(8, dtype=torch.float64)[0]
    masked = torch.stack([5 * direction + 0.1 * rand(8, seed=i) for i in range(4)])
    masked[2] = rand(8, seed=7)
    assert safree.trigger_mask(masked, safree.projector(direction[None]), 0.01).nonzero().flatten().tolist() == [2]


# projection of tokens


def test_project_equals_the_dense_formula_in_both_orders() -> None:
    tokens, inputs, toxic = rand(9, 20), dense_projector(rand(6, 20, seed=1)), dense_projector(rand(4, 20, seed=2))
    off, e = np.eye(20) - toxic, tokens.numpy()
    for order, expected in (("code", off @ inputs @ e.T), ("paper", inputs @ off @ e.T)):
        ours = safree.project(tokens, torch.tensor(inputs), torch.tensor(toxic), order)  # type: ignore[arg-type]
        np.testing.assert_allclose(ours.numpy(), expected.T, atol=1e-10)


def test_code_order_leaves_the_concept_and_paper_order_stays_in_the_input() -> None:
    tokens, inputs, toxic = rand(9, 20), safree.projector(rand(6, 20, seed=1)), safree.projector(rand(4, 20, seed=2))
    code, paper = (safree.project(tokens, inputs, toxic, order) for order in ("code", "paper"))  # type: ignore[arg-type]
    assert (code @ toxic).abs().max() < 1e-12
    assert (paper - paper @ inputs).abs().max() < 1e-12
    assert (code - code @ inputs).abs().max() > 1e-2
    assert (paper @ toxic).abs().max() > 1e-2
    with pytest.raises(ValueError, match="order"):
        safree.project(tokens, inputs, toxic, "other")  # type: ignore[arg-type]


# self-validating filter


@pytest.mark.parametrize(
    ("beta", "nudity", "artist", "paper"),
    [
        (0.0, 0, 0, 5),
        (0.3, 0, 0, 6),
        (0.45, 0, 0, 6),
        (0.5, 2, 0, 6),
        (0.533, 5, 2, 6),
        (0.55, 7, 5, 6),
        (0.6, 10, 10, 6),
        (1.0, 10, 10, 7),
    ],
)
def test_filter_steps_table(beta: float, nudity: int, artist: int, paper: int) -> None:
    assert safree.filter_steps(beta) == nudity
    assert safree.filter_steps(beta, "artist") == artist
    assert safree.filter_steps(beta, "nudity", "paper") == safree.filter_steps(beta, "artist", "paper") == paper


def test_filter_steps_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="kind"):
        safree.filter_steps(0.5, "dog")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rule"):
        safree.filter_steps(0.5, rule="mine")  # type: ignore[arg-type]


# re-attention


def dft(size: int) -> np.ndarray[Any, Any]:
    k = np.arange(size)
    return np.exp(-2j * np.pi * np.outer(k, k) / size)


def dense_reattend(safe: Tensor, original: Tensor, scale: float, radius: int, rule: str) -> np.ndarray[Any, Any]:
    """By explicit Fourier matrices: signed frequencies from -radius to radius - 1, where the safe real part exceeds the original's."""
    height, width = safe.shape[-2:]
    rows, columns = dft(height), dft(width)
    f, g = (rows @ x.double().numpy() @ columns.T for x in (safe, original))
    for u in range(-radius, radius):
        for v in range(-radius, radius):
            here, there = f[..., u % height, v % width], g[..., u % height, v % width]
            if rule == "paper":
                f[..., u % height, v % width] = np.where(here.real > there.real, scale * here, here)
            else:
                f[..., u % height, v % width] = np.where(there.real - here.real > 0, here, scale)
    return np.asarray((np.linalg.inv(rows) @ f @ np.linalg.inv(columns).T).real)


@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize(("height", "width", "radius"), [(8, 8, 1), (6, 10, 2), (5, 7, 1), (2, 2, 1)])
def test_reattend_equals_the_dense_transform(rule: Any, height: int, width: int, radius: int) -> None:
    safe, original = rand(2, 3, height, width).float(), rand(2, 3, height, width, seed=1).float()
    ours = safree.reattend(safe, original, 0.3, radius, rule)
    np.testing.assert_allclose(ours.numpy(), dense_reattend(safe, original, 0.3, radius, rule), atol=1e-5)


def test_reattend_leaves_equal_features_and_other_frequencies_alone() -> None:
    safe, original = rand(2, 3, 8, 8).float(), rand(2, 3, 8, 8, seed=1).float()
    torch.testing.assert_close(safree.reattend(safe, safe, 0.2), safe, atol=1e-5, rtol=0)
    changed = torch.fft.fftshift(torch.fft.fft2(safree.reattend(safe, original, 0.2) - safe), dim=(-2, -1)).abs() > 1e-3
    # Taking the real part afterwards couples each frequency to its negative, so the window grows by one on the far side.
    assert changed[..., 3:6, 3:6].any()
    changed[..., 3:6, 3:6] = False
    assert not changed.any()


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_reattend_where_the_original_exceeds_changes_nothing(rule: Any) -> None:
    safe = rand(1, 2, 8, 8).float()
    delta = torch.zeros_like(safe)
    delta[..., 0, 0] = 50.0  # an impulse raises the real part of every frequency alike
    torch.testing.assert_close(safree.reattend(safe, safe + delta, 0.2, rule=rule), safe, atol=1e-5, rtol=0)
    assert (safree.reattend(safe, safe - delta, 0.2, rule=rule) - safe).abs().max() > 1e-2


# in a pipeline


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd1()


def fit(pipe: Any, **config: Any) -> Eraser:
    return SAFREE(**config).fit(pipe, [CONCEPT])


def pooled_reference(pipe: Any, ids: list[int]) -> Tensor:
    hidden = pipe.text_encoder(torch.tensor([ids])).last_hidden_state[0, ids.index(pipe.tokenizer.eos_token_id)]
    return torch.as_tensor(hidden.double())


def safe_reference(pipe: Any, text: str, concept: Concept, alpha: float = 0.01) -> tuple[Tensor, Tensor, float]:
    """Safe and original embeddings [tokens, D] of one prompt and its beta, token by token from the paper's description."""
    tokenizer, eye = pipe.tokenizer, np.eye(pipe.text_encoder.config.hidden_size)
    ids = tokenizer(text, truncation=True, max_length=TOKENS).input_ids
    padded = tokenizer(text, truncation=True, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    original = pipe.text_encoder(padded).last_hidden_state[0].double()
    toxic = torch.tensor(dense_projector(torch.stack([pooled_reference(pipe, tokenizer(t).input_ids) for t in concept.targets])))
    masked = torch.stack([pooled_reference(pipe, [*ids[:i], 0, *ids[i + 1 :]]) for i in range(1, len(ids) - 1)])
    moved = torch.tensor((eye - toxic.numpy()) @ dense_projector(masked) @ original.numpy().T).T
    safe = original.clone()
    for i, trigger in enumerate(naive_triggers(masked, toxic, alpha)):
        if trigger:
            safe[i + 1] = moved[i + 1]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(moved[: len(ids)], original[: len(ids)], strict=True)]
    return safe, original, 1 - sum(cosines) / len(cosines)


@torch.no_grad()
def test_the_embeddings_equal_the_reference(pipe: Any) -> None:
    for text in PROMPTS:
        safe, original, beta = safe_reference(pipe, text, CONCEPT)
        with fit(pipe).attach(pipe):
            ours, _ = pipe.encode_prompt(text, "cpu", 1, True)
        torch.testing.assert_close(ours[0].double(), safe, atol=1e-4, rtol=0)
        assert not torch.allclose(safe, original, atol=1e-2), "the test needs a prompt with a trigger"
        assert 0 < beta < 2


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
    monkeypatch.setattr(safree, "filter_steps", lambda *args: 2)
    safe, original, _ = safe_reference(pipe, PROMPTS[0], CONCEPT)
    with fit(pipe, reattention=False).attach(pipe):
        calls = forwards(pipe, lambda: latents(pipe, PROMPTS[0], steps=5))
    for step, call in enumerate(calls):
        context = call["encoder_hidden_states"]
        assert context.shape[0] == 2
        torch.testing.assert_close(context[1].double(), safe if step <= 2 else original, atol=1e-4, rtol=0)


def test_solvers_that_call_twice_a_step_count_one(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safree, "filter_steps", lambda *args: 1)
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
def test_reattention_equals_a_three_branch_forward_by_hand(pipe: Any) -> None:
    eraser = fit(pipe, self_validating=False, negative_prompt=False, s1=0.7, s2=0.1)
    sample = rand(1, 4, 8, 8).float()
    uncond = pipe.text_encoder(pipe.tokenizer("", padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids)[0]
    safe, original = (x[None].float() for x in safe_reference(pipe, PROMPTS[0], CONCEPT)[:2])
    with eraser.attach(pipe):
        embeds, negative = pipe.encode_prompt(PROMPTS[0], "cpu", 1, True)
        ours = pipe.unet(torch.cat([sample] * 2), 500, encoder_hidden_states=torch.cat([negative, embeds])).sample
    expected = three_branches(pipe.unet, sample, 500, torch.cat([uncond, safe, original]), {32: 0.7, 16: 0.1})
    plain = pipe.unet(torch.cat([sample] * 2), 500, encoder_hidden_states=torch.cat([uncond, safe])).sample
    torch.testing.assert_close(ours, expected[:2], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[:1], plain[:1], atol=1e-4, rtol=0)
    assert (ours[1] - plain[1]).abs().max() > 1e-2


def three_branches(unet: Any, sample: Tensor, timestep: int, context: Tensor, scales: dict[int, float]) -> Tensor:
    """The UNet's forward, block by block as in SD 1.x, with the skip features of row 1 re-attended to those of row 2."""
    temb = unet.time_embedding(unet.time_proj(torch.tensor([timestep] * 3)))
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
    monkeypatch.setattr(safree, "filter_steps", lambda *args: 1)
    with eraser.attach(pipe):
        short = latents(pipe, PROMPTS[0], seed=1)
    monkeypatch.setattr(safree, "filter_steps", lambda *args: 9)
    with eraser.attach(pipe):
        long = latents(pipe, PROMPTS[1], seed=2)
    answers = iter([1, 9])
    monkeypatch.setattr(safree, "filter_steps", lambda *args: next(answers))
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

    monkeypatch.setattr(safree, "filter_steps", remember)
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
