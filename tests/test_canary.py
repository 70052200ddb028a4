"""The canary on pipelines that want an image beside the prompt: there an artefact is checked as on the text-to-image one."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import erasure
from erasure import artifact
from erasure.errors import ArtifactError
from erasure.families import family_of
from erasure.methods.sld import SLD
from erasure.methods.uce import UCE
from erasure.testing.subject import CONCEPT, TARGET, VISIBLE, change
from erasure.testing.tiny import FAMILIES, sd1


def sibling(pipe: Any, variant: str) -> Any:
    """Another pipeline of the family with the same parts."""
    made = getattr(diffusers, family_of(pipe).pipelines[0].replace("Pipeline", f"{variant}Pipeline")).from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("variant", ["Img2Img", "Inpaint"])
@pytest.mark.parametrize("method", [UCE(), SLD(preset="max")], ids=["weights", "runtime"])
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_it_moves_there_as_it_was_recorded(name: str, method: Any, variant: str, tmp_path: Path) -> None:
    pipe = FAMILIES[name]()
    folder = artifact.save(method.fit(pipe, [CONCEPT]), tmp_path / "out", pipe=pipe, base_id="tiny")
    report = erasure.verify(folder, sibling(pipe, variant))
    assert report["canary"]["measured"] == pytest.approx(report["canary"]["recorded"], rel=1e-3)


def test_a_loaded_artefact_changes_what_is_made_of_an_image_and_is_taken_off_again(tmp_path: Path) -> None:
    pipe = sd1()
    folder = artifact.save(UCE().fit(pipe, [CONCEPT]), tmp_path / "out", pipe=pipe, base_id="tiny")
    other = sibling(pipe, "Img2Img")

    def run() -> torch.Tensor:
        options = {"image": torch.zeros(1, 3, 16, 16), "strength": 1.0, "num_inference_steps": 4, "output_type": "latent"}
        made: torch.Tensor = other(TARGET, generator=torch.Generator().manual_seed(0), **options).images
        return made

    base = run()
    erasure.load(folder, base=other)
    assert change(run(), base) > VISIBLE
    erasure.detach(other)
    assert torch.equal(run(), base)


def test_another_base_is_told_by_it_there_too(tmp_path: Path) -> None:
    pipe = sd1()
    folder = artifact.save(UCE().fit(pipe, [CONCEPT]), tmp_path / "out", pipe=pipe, base_id="tiny")
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(0.5)
    with pytest.raises(ArtifactError, match=r"canary 'dagger' moves by|sampled weights of unet differ"):
        erasure.verify(folder, sibling(pipe, "Img2Img"))
