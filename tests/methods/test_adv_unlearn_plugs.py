"""One text encoder, erased on the canvas in a few steps, takes the concept and little else from three pipelines that read it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

import erasure
from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.world import world
from erasure.method import Run
from erasure.methods.adv_unlearn import AdvUnlearn
from erasure.models import load_base

QUICK: dict[str, Any] = {"steps": 20, "warmup": 10, "images": 16, "batch": 2, "expand": False}
NAMES, EACH = ("dagger", "cat"), 3
"""What is erased and what is kept, and images of each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefact, fitted on the canvas's text-to-image pipeline."""
    canvas, out = load_base("canvas", device="cpu"), tmp_path_factory.mktemp("plugs") / "dagger"
    eraser = AdvUnlearn.from_config({"preset": "canvas", **QUICK}).fit(canvas, [canvas_concept("dagger")], run=Run(progress=False))
    eraser.save(out, pipe=canvas, base_id="canvas")
    return out


def text_to_image() -> tuple[Any, dict[str, Any]]:
    return load_base("canvas", device="cpu"), {"guidance_scale": 4.0}


def image_to_image() -> tuple[Any, dict[str, Any]]:
    """From a grey image; noise at full strength leaves what to draw to the prompt."""
    grey = torch.full((len(NAMES) * EACH, 3, 64, 64), 0.5)
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(load_base("canvas", device="cpu"))
    return pipe, {"guidance_scale": 4.0, "image": grey, "strength": 1.0}


def canvas_flow() -> tuple[Any, dict[str, Any]]:
    return load_base("canvas-flow", device="cpu"), {"true_cfg_scale": 3.0, "negative_prompt": [""] * len(NAMES) * EACH}


def seen(pipe: Any, options: dict[str, Any]) -> list[int]:
    """In how many images of each prompt the judge for development sees its object."""
    prompts = [f"a {name}" for name in NAMES for _ in range(EACH)]
    generators = [torch.Generator().manual_seed(i % EACH) for i in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=8, generator=generators, output_type="pt", **options).images
    present = judge_dev()(images.clamp(0, 1)).present
    return [int(present[i * EACH : (i + 1) * EACH, world().objects.index(name)].sum()) for i, name in enumerate(NAMES)]


@pytest.mark.parametrize(
    ("make", "component"),
    [(text_to_image, None), (image_to_image, None), (canvas_flow, "text_encoder")],
    ids=["text-to-image", "image-to-image", "canvas-flow"],
)
def test_the_erased_text_encoder_plugs_in(folder: Path, make: Any, component: str | None) -> None:
    pipe, options = make()
    pipe.set_progress_bar_config(disable=True)
    base = seen(pipe, options)
    assert min(base) >= 2, base
    assert erasure.load(folder, base=pipe, component=component) is pipe
    gone, kept = seen(pipe, options)
    assert gone == 0 and kept >= 2, (gone, kept)
