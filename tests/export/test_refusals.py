"""What cannot be exported is refused with its reason, and leaves nothing."""

import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import erasure
from erasure.errors import ArtifactError, Conflict, ErasureError, NoArtifact, UnsupportedFamily, WrongBase
from erasure.export import FORMATS, Options, export, plan, staging
from erasure.export import delta as delta_format
from erasure.export import lora as lora_format
from erasure.lora import LORA
from tests import tiny
from tests.export.common import CONCEPT, LowRank, nothing_left, save
from tests.stand_ins import RandomLoRA

# what is refused, and that it leaves nothing


@pytest.fixture
def made(tmp_path: Path) -> tuple[Any, Path]:
    pipe = tiny.sd1()
    return pipe, save(LowRank(), pipe, tmp_path / "artefact")[0]


REFUSED: dict[str, tuple[str, Options, type[Exception], str]] = {
    "format": ("onnx", Options(), ErasureError, "no format 'onnx'; choose one of full, delta, lora, single"),
    "dtype": ("delta", Options(dtype="int8"), ErasureError, "no dtype 'int8'"),
    "neither": ("lora", Options(), ErasureError, "either rank .* or error"),
    "both": ("lora", Options(rank=2, error=0.1), ErasureError, "either rank .* or error"),
    "rank 0": ("lora", Options(rank=0), ErasureError, "at least 1, not 0"),
    "error 1": ("lora", Options(error=1.0), ErasureError, "between 0 and 1, not 1"),
    "rank elsewhere": ("full", Options(rank=2), ErasureError, "belong to the format lora, not to full"),
    "too coarse": ("lora", Options(error=0.95), ArtifactError, "differs from the attached eraser by .*Raise rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str, made: tuple[Any, Path], tmp_path: Path) -> None:
    form, options, error, reason = REFUSED[case]
    with pytest.raises(error, match=reason):
        export(made[1], made[0], tmp_path / "out", form, options)
    nothing_left(tmp_path)


@pytest.mark.parametrize("family", ["sd3", "flux", "wan"])
def test_single_says_which_families_have_it(family: str, tmp_path: Path) -> None:
    pipe = tiny.FAMILIES[family]()
    folder, _ = save(LowRank(), pipe, tmp_path / "artefact")
    with pytest.raises(UnsupportedFamily, match=rf"sd1, sd2, sdxl, not for {family}; use --format full, delta or lora"):
        plan(folder, tmp_path / "out", "single", Options())


def test_what_a_lora_cannot_hold_is_named(tmp_path: Path) -> None:
    pipe = tiny.sd1()
    folder, _ = save(LowRank(biases=True), pipe, tmp_path / "artefact")
    with pytest.raises(ErasureError, match=r"cannot hold the change of unet\.\S+to_out\.0\.bias.*Use --format full"):
        export(folder, pipe, tmp_path / "out", "lora", Options(rank=2))
    nothing_left(tmp_path)
    export(folder, pipe, tmp_path / "out", "delta")


def test_another_base_and_a_changed_base_are_refused(made: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(WrongBase, match="differ from the base"):
        export(made[1], tiny.sd1(seed=1), tmp_path / "out", "full")
    pipe = tiny.sd1()
    with RandomLoRA().fit(pipe, [CONCEPT]).attach(pipe), pytest.raises(Conflict, match="has LoRA adapters loaded"):
        export(made[1], pipe, tmp_path / "out", "full")
    nothing_left(tmp_path)


def test_a_folder_of_something_else_is_not_overwritten(made: tuple[Any, Path], tmp_path: Path) -> None:
    pipe, folder = made
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("x")
    for out, reason in (("letters", "is not empty"), ("letters/dear.txt", "is a file"), ("artefact", "holds no export")):
        with pytest.raises(NoArtifact, match=reason):
            export(folder, pipe, tmp_path / out, "delta")
    assert (tmp_path / "letters/dear.txt").read_text() == "x" and erasure.verify(folder, pipe)
    export(folder, pipe, tmp_path / "out", "delta")
    export(folder, pipe, tmp_path / "out", "lora", Options(rank=2))  # a former export is replaced, whole
    assert not (tmp_path / "out/delta.safetensors").exists() and (tmp_path / "out" / LORA).exists()


@pytest.mark.parametrize("form", FORMATS)
def test_too_little_space_is_said_before_anything_is_written(
    form: str, made: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=staging.SPARE))
    with pytest.raises(ErasureError, match=r"no space for the export: it needs 1\d MB"):
        export(made[1], made[0], tmp_path / "out", form, Options(rank=2) if form == "lora" else Options())
    nothing_left(tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_an_interrupted_export_leaves_the_old_one(
    form: str, made: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, folder = made
    export(folder, pipe, tmp_path / "out", "delta")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(staging.Partial, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        export(folder, pipe, tmp_path / "out", form, Options(rank=2) if form == "lora" else Options())
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artefact", "out"]


def _unerased(path: Path) -> None:
    """What a faulty writer could leave: a file in which nothing is erased."""
    save_file({key: torch.zeros_like(t) if "lora" in key or "delta" in path.name else t for key, t in load_file(path).items()}, path)


@pytest.mark.parametrize(("form", "what"), [("delta", "delta.safetensors"), ("lora", "out-webui.safetensors")])
def test_an_output_that_does_not_erase_is_not_kept(
    form: str, what: str, made: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = delta_format if form == "delta" else lora_format
    real = module.save_file

    def faulty(tensors: Any, path: Path, metadata: Any) -> None:
        real(tensors, path, metadata=metadata)
        _unerased(path)

    monkeypatch.setattr(module, "save_file", faulty)
    with pytest.raises(ArtifactError, match=f"{what} was written and read back, and differs from the attached eraser by 100.0%"):
        export(made[1], made[0], tmp_path / "out", form, Options(rank=2) if form == "lora" else Options())
    nothing_left(tmp_path)


def test_a_lora_eraser_has_to_come_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cut may lose is no measure for a file that is exported as it is: a layer left out is a fault."""
    pipe = tiny.sd1()
    folder, _ = save(RandomLoRA(size=0.05), pipe, tmp_path / "artefact")
    real = lora_format.web_names

    def without_a_layer(factors: Any, pipe: Any) -> Any:
        named = real(factors, pipe)
        return {key: tensor for key, tensor in named.items() if "mid_block" not in key}

    monkeypatch.setattr(lora_format, "web_names", without_a_layer)
    with pytest.raises(ArtifactError, match=r"out-webui\.safetensors .* differs .* by \d\.\d% .*layers do not come back.*--format full"):
        export(folder, pipe, tmp_path / "out", "lora")
    nothing_left(tmp_path)


def test_a_full_folder_that_lost_the_edit_is_not_kept(made: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def idle(pipe: Any, tensors: Any) -> Any:
        yield 0

    monkeypatch.setattr("erasure.export.full.weights.swapped", idle)
    with pytest.raises(ErasureError):
        export(made[1], made[0], tmp_path / "out", "full")
    nothing_left(tmp_path)
