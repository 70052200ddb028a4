"""Runtime erasers leave as an artefact with a small loader, and the trained model keeps its erasure in every format."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

import erasure
from erasure import artifact
from erasure.canvas.concepts import canvas_concept
from erasure.canvas.judge_dev import judge_dev
from erasure.canvas.world import world
from erasure.errors import ErasureError
from erasure.export import Options, export
from erasure.methods.negative_prompt import NegativePrompt
from erasure.registry import methods
from tests import tiny
from tests.export.common import CONCEPT, PROMPT

# runtime erasers


def test_a_runtime_eraser_is_exported_with_a_loader_that_runs(tmp_path: Path) -> None:
    base = tmp_path / "base 'x'"
    tiny.sd1().save_pretrained(base)
    pipe = erasure.load_base(str(base), device="cpu")
    eraser = NegativePrompt().fit(pipe, [CONCEPT])
    artifact.save(eraser, tmp_path / "artefact", pipe=pipe, base_id=str(base))
    for form in ("delta", "lora", "single"):
        options = Options(rank=2) if form == "lora" else Options()
        with pytest.raises(ErasureError, match=f"changes no weights that a {form} file could hold.*--format full") as raised:
            export(tmp_path / "artefact", pipe, tmp_path / "out", form, options)
        assert raised.value.exit_code == 2 and not (tmp_path / "out").exists()
    export(tmp_path / "artefact", pipe, tmp_path / "out", "full")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "artefact", "erasure_config.json", "load.py"]
    with pytest.raises(OSError, match="model_index"):
        DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    command = [sys.executable, "load.py", PROMPT, "--out", str(tmp_path / "image.png"), "--steps", "3", "--seed", "7", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr

    def image() -> np.ndarray[Any, Any]:
        return np.asarray(pipe(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(7)).images[0], dtype=int)

    unerased, made = image(), np.asarray(Image.open(tmp_path / "image.png"), dtype=int)
    with eraser.attach(pipe):
        assert abs(image() - made).max() <= 1
    assert abs(unerased - made).max() > 5
    other = tmp_path / "other"
    tiny.sd1(seed=1).save_pretrained(other)
    done = subprocess.run([*command, "--base", str(other)], cwd=tmp_path / "out", capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0 and "differ from the base" in done.stderr


# the trained model


@pytest.fixture(scope="module")
def canvas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The embedded model, and UCE's artefact on its dagger."""
    pipe = erasure.load_base("canvas", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("canvas") / "uce"
    artifact.save(methods.get("uce")().fit(pipe, [canvas_concept("dagger")]), folder, pipe=pipe, base_id="canvas")
    return pipe, folder


def images(pipe: Any) -> Tensor:
    """[8, 3, 64, 64], in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    options: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 5.0, "generator": generators, "output_type": "pt"}
    return torch.as_tensor(pipe(["a dagger"] * 8, **options).images)


def daggers(made: Tensor) -> int:
    """In how many of the images the development judge sees one."""
    return int(judge_dev()(made).present[:, list(world().objects).index("dagger")].sum())


@pytest.mark.parametrize(
    ("form", "options", "limit"),
    [("full", Options(), 1e-4), ("lora", Options(rank=16), 0.05), ("lora", Options(error=0.02), 0.02), ("single", Options(), 0.02)],
)
def test_on_the_canvas(form: str, options: Options, limit: float, canvas: tuple[Any, Path], tmp_path: Path) -> None:
    pipe, folder = canvas
    eraser, _ = artifact.load_eraser(folder)
    base = images(pipe)
    with eraser.attach(pipe):
        wanted = images(pipe)
    export(folder, pipe, tmp_path / "out", form, Options(dtype="float16") if form == "single" else options)
    if form == "full":
        again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    elif form == "single":
        config = {"config": str(tmp_path / "out/config"), "local_files_only": True}
        again = StableDiffusionPipeline.from_single_file(str(tmp_path / "out/out.safetensors"), **config)
    else:
        again = erasure.load_base("canvas", device="cpu")
        again.load_lora_weights(str(tmp_path / "out"))
    made = images(again)
    assert float((base - wanted).abs().mean()) > 0.05
    assert float((made - wanted).abs().mean()) < limit
    assert daggers(base) >= 7 and daggers(wanted) <= 1 and daggers(made) <= 1
