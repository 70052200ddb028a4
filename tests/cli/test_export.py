"""``erasure export`` end to end on the canvas: reports, plans, and what is refused with exit code 2."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erasure.cli.main import main

MODEL = ["--model", "canvas", "--device", "cpu"]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artefacts")
    for method in ("uce", "negative_prompt"):
        assert main(["erase", method, *MODEL, "--concept", "dagger", "--out", str(root / method), "--json"]) == 0
    return root


def run(artefact: Path, out: Path, *options: str) -> int:
    return main(["export", str(artefact), *MODEL, "--out", str(out), *options])


def test_a_lora_prints_ranks_and_error(artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(artefacts / "uce", tmp_path / "out", "--format", "lora", "--error", "0.05", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    low, high = report["rank"]
    assert 1 < low <= high < 40 and 0 < report["error"] <= report["worst_layer"] <= 0.05
    assert (
        set(report["deviation"])
        == {"pytorch_lora_weights.safetensors", "out-webui.safetensors"}
        == set(report["files"])
        - {
            "README.md",
            "erasure_config.json",
        }
    )
    assert run(artefacts / "uce", tmp_path / "out", "--format", "lora", "--rank", "4") == 0
    printed = capsys.readouterr().out
    assert "rank: 4, 4" in printed and "error: 0.25" in printed and "ok:" in printed


def test_single_is_half_precision_unless_asked(artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, dtype in (([], torch.float16), (["--dtype", "bfloat16"], torch.bfloat16)):
        assert run(artefacts / "uce", tmp_path / "out", "--format", "single", *options) == 0
        assert {t.dtype for t in load_file(tmp_path / "out/out.safetensors").values()} == {dtype}


def test_full_in_half_precision(artefacts: Path, tmp_path: Path) -> None:
    assert run(artefacts / "uce", tmp_path / "out", "--format", "full", "--dtype", "float16") == 0
    assert {t.dtype for t in load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors").values()} == {torch.float16}


def test_a_plan_writes_nothing(artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(artefacts / "uce", tmp_path / "out", "--format", "single", "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["method"] == "uce" and plan["concepts"] == ["dagger"] and plan["format"] == "single" and plan["dtype"] == "float16"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("artefact", "options", "reason"),
    [
        ("negative_prompt", ["--format", "lora", "--rank", "4"], "changes no weights that a lora file could hold"),
        ("negative_prompt", ["--format", "single"], "--format full"),
        ("uce", ["--format", "lora"], "either rank"),
        ("uce", ["--format", "lora", "--rank", "0"], "rank"),
        ("uce", ["--format", "lora", "--error", "2"], "error"),
        ("uce", ["--format", "delta", "--rank", "2"], "belong to the format lora"),
        ("uce", ["--format", "onnx"], "onnx"),
        ("nothing", ["--format", "full"], "is no artefact"),
    ],
)
def test_refusals_exit_with_2(
    artefact: str, options: list[str], reason: str, artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(artefacts / artefact, tmp_path / "out", *options) == 2
    assert reason in " ".join(capsys.readouterr().err.split()) and not list(tmp_path.iterdir())


def test_the_folder_of_the_artefact_is_not_overwritten(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(artefacts / "uce", artefacts / "uce", "--format", "delta") == 2
    assert "holds no export" in " ".join(capsys.readouterr().err.split())
    assert main(["verify", str(artefacts / "uce"), *MODEL]) == 0
