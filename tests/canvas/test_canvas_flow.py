"""The embedded flow-matching model: FLUX's own pipeline class, on the canvas's autoencoder and CLIP text encoder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

import erasure
from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.world import fill, world
from erasure.denoising import Denoising
from erasure.errors import NotErased
from erasure.eval import generate
from erasure.eval.suite import load_suite
from erasure.families import family_of
from erasure.methods.negative_prompt import NegativePrompt
from erasure.methods.uce import UCE

WEIGHTS = Path(erasure.__file__).parent / "canvas/weights"


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = erasure.load_base("canvas-flow", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompts: list[str], **changes: Any) -> torch.Tensor:
    """By the harness, as suites do: the model's own scheduler and length of text follow from the pipeline."""
    suite = load_suite("canvas-demo").fitting(pipe).under(**changes)
    row = suite.rows(canvas_concept("dagger"))[0]
    rows = [replace(row, prompt=text, seed=100_000 + i, id=str(i)) for i, text in enumerate(prompts)]
    with generate.under(pipe, suite.protocol):
        return generate.draw(pipe, rows, suite.protocol)


def test_it_is_flux_and_draws_what_prompts_say(pipe: Any) -> None:
    assert type(pipe) is FluxPipeline and pipe.transformer.transformer_blocks and pipe.transformer.single_transformer_blocks
    of, names = world(), ("bomb", "pizza", "rocket", "penguin", "guitar", "apple", "crown", "sunflower")
    texts = [fill(of.templates("dev")[0], of.noun(o), of.styles[i % 4], of.backgrounds[i]) for i, o in enumerate(names)]
    verdict = judge_dev()(draw(pipe, texts))
    assert sum(bool(verdict.present[i, of.objects.index(o)]) for i, o in enumerate(names)) >= 5  # the bar itself: scripts/check_canvas.py
    assert sum(of.styles[int(s)] == of.styles[i % 4] for i, s in enumerate(verdict.style)) >= 6


def test_it_draws_and_is_trained_at_its_own_size(pipe: Any) -> None:
    assert pipe("a dagger", num_inference_steps=1, output_type="pt", max_sequence_length=32).images.shape == (1, 3, 64, 64)
    assert Denoising(pipe, family_of(pipe)).states(["a dagger"], [0], steps=2, stop=0, guidance=1.0)[0].shape == (1, 64, 16)


def test_its_autoencoder_and_clip_are_the_canvas_s_own() -> None:
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        one, other = load_file(WEIGHTS / "canvas" / part), load_file(WEIGHTS / "canvas-flow" / part)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_an_eraser_takes_the_dagger_away_and_gives_it_back(pipe: Any) -> None:
    texts = [fill(t, "a dagger", s, "mint") for t in world().templates("dev")[:2] for s in world().styles[:2]]
    before = draw(pipe, texts, steps=8)
    with UCE().fit(pipe, [canvas_concept("dagger")]).attach(pipe):
        edited = draw(pipe, texts, steps=8)
    assert torch.equal(draw(pipe, texts, steps=8), before)
    assert (edited - before).abs().mean() > 0.02


def test_a_negative_prompt_acts_under_true_guidance_alone(pipe: Any) -> None:
    eraser = NegativePrompt().fit(pipe, [canvas_concept("dagger")])
    base = draw(pipe, ["a dagger"], steps=4)
    with eraser.attach(pipe):
        with pytest.raises(NotErased, match="true_cfg_scale > 1"):
            draw(pipe, ["a dagger"], steps=4, true_cfg=None)
        assert not torch.equal(draw(pipe, ["a dagger"], steps=4), base)
