"""``--component``: an erased text encoder on a base of another family, checked, drawn and scored; and what it cannot mean."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from erasure import models
from erasure.cli.main import main

FIT = "--model canvas --device cpu --concept dagger --steps 2 --lr 1e-3 --batch 1 --images 1 --sampling-steps 2 --retain-scale 0"
FLOW = "--model canvas-flow --device cpu"
FEW = f"{FLOW} --suite canvas-demo --limit 4 --steps 1 --batch-size 4"
PART = "--component text_encoder"


def run(desk: Path, command: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        return main(shlex.split(command))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erased text encoder, and two artefacts of the canvas that are none."""
    desk = tmp_path_factory.mktemp("desk")
    assert run(desk, f"erase adv_unlearn {FIT} --warmup 2 --out text -q") == 0
    for method in ("uce", "negative_prompt"):
        assert run(desk, f"erase {method} --model canvas --device cpu --concept dagger --out {method} -q") == 0
    return desk


def test_a_text_encoder_is_verified_on_a_model_of_another_family(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(desk, f"verify text {FLOW} {PART} --json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fingerprint"] == "text_encoder matches; nothing else was compared"
    assert report["changed_tensors"] > 20 and report["canary"]["delta"] > 1e-4
    assert run(desk, f"verify text {FLOW} {PART}") == 0
    assert "erases there" in capsys.readouterr().out
    assert run(desk, f"verify text {FLOW}") == 2
    assert "made for the family sd1, this pipeline is flux" in " ".join(capsys.readouterr().err.split())


def test_its_images_are_drawn_and_scored_there(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(desk, f"generate text {FEW} {PART} --out run --json -q") == 0
    assert json.loads(capsys.readouterr().out)["missing"] == 0
    assert run(desk, f"evaluate text {FEW} {PART} --out run --json -q") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows.keys() == {"base", "text"}
    base, text = ([p.read_bytes() for p in sorted((desk / "run/images" / name).rglob("*.png"))] for name in ("base", "text"))
    assert len(base) == len(text) == json.loads((desk / "run/results/text/results.json").read_text())["n"] and base != text


WRONG = [
    (f"verify text {FLOW} --component txt_encoder", "adv_unlearn changes text_encoder, not 'txt_encoder' alone", "give text_encoder"),
    (f"generate text {FEW} --out new --component unet", "adv_unlearn changes text_encoder, not 'unet' alone", "give text_encoder"),
    (f"evaluate text {FEW} --out new --component ''", "not '' alone", "give text_encoder"),
    (f"evaluate text {FLOW} --suite i2p --out new --component vae --dry-run", "not 'vae' alone", "give text_encoder"),
    (f"verify negative_prompt {FLOW} {PART}", "negative_prompt is no change of weights of one component", "its own base"),
    (f"generate base {FEW} --concept dagger --out new {PART}", "--component is for an artefact", "leave it out"),
    (f"evaluate base {FLOW} --suite i2p --out new {PART} --dry-run", "--component is for an artefact", "leave it out"),
    (f"evaluate text {FEW} --out new {PART} --update-card", "--component is for others", "give one of them"),
    (f"verify text {FLOW} --component", "--component requires an argument", "erasure verify --help"),
]


@pytest.mark.parametrize(("command", "cause", "fix"), WRONG, ids=[command for command, _, _ in WRONG])
def test_what_it_cannot_mean_is_said_before_the_base_is_loaded(
    desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, cause: str, fix: str
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(models, "load_base", loaded)
    refused(desk, capsys, command, cause, fix)


def test_a_component_that_the_other_base_has_not(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        desk, capsys, f"verify uce {FLOW} --component unet", "this pipeline has no component 'unet'", "it has transformer, text_encoder"
    )


def refused(desk: Path, capsys: pytest.CaptureFixture[str], command: str, cause: str, fix: str) -> None:
    capsys.readouterr()
    assert run(desk, command) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert re.search(cause, message) and re.search(fix, message), message
    assert not (desk / "new").exists()
