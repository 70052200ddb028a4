"""Every way in which an artefact can be damaged raises ArtifactError and leaves the pipeline unattached and bit-identical."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

import erasure
from erasure import artifact, canary, fingerprint
from erasure.artifact import CONFIG, STATE
from erasure.concept import Concept
from erasure.errors import ArtifactError, Conflict
from erasure.method import RuntimeEraser, WeightEraser
from erasure.methods.negative_prompt import NegativePrompt
from erasure.methods.safree import SAFREE
from erasure.methods.uce import UCE
from tests.tiny import latents, sd1

CONCEPT = Concept("dagger", anchors=("cat",))
METHODS = {"uce": UCE(), "safree": SAFREE()}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd1()


@pytest.fixture(scope="module")
def saved(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("artefacts")
    return {name: artifact.save(m.fit(pipe, [CONCEPT]), root / name, pipe=pipe, base_id="tiny") for name, m in METHODS.items()}


@pytest.fixture
def folder(request: pytest.FixtureRequest, saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a sound artefact, to be damaged: UCE's unless the test names another method."""
    copy = tmp_path / "artefact"
    copy.mkdir()
    for file in saved[getattr(request, "param", "uce")].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def rehash(folder: Path) -> None:
    """What a forger would do: the hashes match again."""
    edit(folder, lambda c: c.update(files={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in c["files"]}))


def refused(folder: Path, pipe: Any, match: str) -> None:
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    before = {f"{part}.{key}": value.clone() for part, module in parts.items() for key, value in module.state_dict().items()}
    latents(pipe, "a cat")  # a pipeline's first call sets attributes of its own
    attributes = set(vars(pipe))
    try:
        for load in (lambda: erasure.load(folder, base=pipe), lambda: erasure.verify(folder, pipe)):
            with pytest.raises(ArtifactError, match=match):
                load()
    finally:
        left = list(vars(pipe).get("_erasers", []))
        erasure.detach(pipe)
    assert not left
    assert set(vars(pipe)) == attributes, "the pipeline is unattached"
    assert not pipe.unet._forward_pre_hooks and not pipe.unet._forward_hooks
    assert all(torch.equal(value, before[f"{part}.{key}"]) for part, module in parts.items() for key, value in module.state_dict().items())


@pytest.mark.parametrize("folder", METHODS, indirect=True)
def test_a_sound_artefact_verifies(folder: Path, pipe: Any) -> None:
    attributes, base = set(vars(pipe)), latents(pipe, "a dagger")
    report = erasure.verify(folder, pipe)
    assert report["canary"]["measured"] == report["canary"]["recorded"] > 0.01
    assert set(vars(pipe)) == attributes and torch.equal(latents(pipe, "a dagger"), base)


@pytest.mark.parametrize("folder", METHODS, indirect=True)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_a_flipped_bit_in_the_state(folder: Path, pipe: Any, place: float) -> None:
    raw = bytearray((folder / STATE).read_bytes())
    raw[int(place * len(raw))] ^= 1
    (folder / STATE).write_bytes(raw)
    refused(folder, pipe, "sha256")


def test_an_edited_model_card(folder: Path, pipe: Any) -> None:
    (folder / "README.md").write_text("no known limits")
    refused(folder, pipe, "README.md has sha256")


@pytest.mark.parametrize("name", [STATE, CONFIG, "README.md"])
def test_a_missing_file(folder: Path, pipe: Any, name: str) -> None:
    (folder / name).unlink()
    refused(folder, pipe, "missing|no artefact")


def test_a_folder_that_is_not_there(tmp_path: Path, pipe: Any) -> None:
    refused(tmp_path / "nowhere", pipe, "no artefact")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", ""])
def test_a_path_that_leaves_the_folder(folder: Path, pipe: Any, name: str) -> None:
    (folder.parent / "secret").write_text("x")
    edit(folder, lambda c: c["files"].update({name: hashlib.sha256(b"x").hexdigest()}))
    refused(folder, pipe, "leaves the folder|is missing")


def test_a_link_out_of_the_folder(folder: Path, pipe: Any) -> None:
    outside = folder.parent / "outside"
    (folder / STATE).rename(outside)
    (folder / STATE).symlink_to(outside)
    refused(folder, pipe, "leaves the folder")


@pytest.mark.parametrize(
    ("schema", "match"), [(2, "newer.*upgrade"), (0, "unknown"), ("1", "unknown"), (None, "unknown"), (True, "unknown"), (1.0, "unknown")]
)
def test_another_schema(folder: Path, pipe: Any, schema: Any, match: str) -> None:
    edit(folder, lambda c: c.update(schema=schema))
    refused(folder, pipe, match)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\udcff"])
def test_a_configuration_that_is_none(folder: Path, pipe: Any, text: str) -> None:
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, pipe, "JSON|schema")


@pytest.mark.parametrize("key", ["kind", "method", "method_config", "concepts", "base", "canary", "files"])
def test_a_configuration_with_a_hole_or_a_wrong_value(folder: Path, pipe: Any, key: str) -> None:
    edit(folder, lambda c: c.update({key: 7}))
    refused(folder, pipe, key)
    edit(folder, lambda c: c.pop(key))
    refused(folder, pipe, key)


@pytest.mark.parametrize("key", ["method_config", "base", "canary"])
def test_an_emptied_section(folder: Path, pipe: Any, key: str) -> None:
    if key == "method_config":
        edit(folder, lambda c: c.update(method_config={"no_such_field": 1}))
    else:
        edit(folder, lambda c: c.update({key: {}}))
    refused(folder, pipe, "no_such_field|base|canary")


@pytest.mark.parametrize(
    "change", [{"method": "no_such"}, {"concepts": [{"name": "x", "colour": "red"}]}, {"concepts": []}, {"kind": "runtime"}]
)
def test_a_method_or_concept_that_nobody_knows(folder: Path, pipe: Any, change: dict[str, Any]) -> None:
    edit(folder, lambda c: c.update(change))
    refused(folder, pipe, "no_such|colour|concept|kind")


@pytest.mark.parametrize("folder", METHODS, indirect=True)
def test_another_base_of_the_same_shape(folder: Path) -> None:
    refused(folder, sd1(seed=1), "sampled weights")


def test_another_base_of_another_shape(folder: Path) -> None:
    other = sd1()
    other.unet.conv_in = torch.nn.Conv2d(4, 16, 1)
    refused(folder, other, "layers or shapes")


def test_another_text_encoder(folder: Path) -> None:
    other = sd1()
    other.text_encoder = sd1(seed=1).text_encoder
    refused(folder, other, "text_encoder")


@pytest.mark.parametrize("folder", METHODS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_base_in_another_dtype_is_accepted(folder: Path, dtype: torch.dtype) -> None:
    half = sd1().to(dtype)
    base = latents(half, "a dagger")
    assert (latents(erasure.load(folder, base=half), "a dagger") - base).norm() > 0.05 * base.norm()


def test_a_weight_eraser_that_equals_the_base(folder: Path, pipe: Any) -> None:
    names = load_file(folder / STATE)
    save_file({name: pipe.unet.get_parameter(name.removeprefix("unet.")).detach().clone() for name in names}, folder / STATE)
    rehash(folder)
    refused(folder, pipe, "would not change")


def test_a_weight_eraser_without_its_state(folder: Path, pipe: Any) -> None:
    (folder / STATE).unlink()
    edit(folder, lambda c: c["files"].pop(STATE))
    refused(folder, pipe, "would not change|does not hold")


@pytest.mark.parametrize("name", ["unet.no.such.weight", "nothing.weight", "scheduler.weight", "unet", "tokenizer.x"])
def test_a_tensor_that_the_base_has_not(folder: Path, pipe: Any, name: str) -> None:
    save_file(load_file(folder / STATE) | {name: torch.zeros(2)}, folder / STATE)
    rehash(folder)
    refused(folder, pipe, "no parameter|no component")


def test_a_tensor_of_another_shape(folder: Path, pipe: Any) -> None:
    tensors = load_file(folder / STATE)
    save_file({name: tensor[:-1].clone() for name, tensor in tensors.items()}, folder / STATE)
    rehash(folder)
    refused(folder, pipe, "the base has")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_state_that_gives_no_numbers(folder: Path, pipe: Any, value: float) -> None:
    save_file({name: torch.full_like(tensor, value) for name, tensor in load_file(folder / STATE).items()}, folder / STATE)
    rehash(folder)
    refused(folder, pipe, "canary|not finite")


@pytest.mark.parametrize("folder", METHODS, indirect=True)
def test_a_state_that_erases_less_than_was_recorded(folder: Path, pipe: Any) -> None:
    edit(folder, lambda c: c["canary"].update(delta=3 * c["canary"]["delta"]))
    refused(folder, pipe, "canary")


def test_a_canary_that_does_not_move(folder: Path, pipe: Any) -> None:
    tensors = load_file(folder / STATE)
    first = next(iter(tensors))
    same = {name: pipe.unet.get_parameter(name.removeprefix("unet.")).detach().clone() for name in tensors}
    same[first][0, 0] += 1e-6
    save_file(same, folder / STATE)
    rehash(folder)
    refused(folder, pipe, "canary")


@pytest.mark.parametrize("folder", ["safree"], indirect=True)
def test_a_state_that_lacks_what_the_method_needs(folder: Path, pipe: Any) -> None:
    save_file({"other": torch.zeros(1, 32)}, folder / STATE)
    rehash(folder)
    refused(folder, pipe, "phrases")


@pytest.mark.parametrize("folder", ["safree"], indirect=True)
def test_an_unlisted_state(folder: Path, pipe: Any) -> None:
    edit(folder, lambda c: c["files"].pop(STATE))
    refused(folder, pipe, "not listed")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def test_nothing_is_ever_unpickled(folder: Path, pipe: Any) -> None:
    (folder / STATE).write_bytes(pickle.dumps(Bomb()))
    rehash(folder)
    refused(folder, pipe, "does not hold")
    torch.save({"x": Bomb()}, folder / STATE)
    rehash(folder)
    refused(folder, pipe, "does not hold")


# saving


def test_a_foreign_folder_is_not_overwritten(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="not empty"):
        artifact.save(UCE().fit(pipe, [CONCEPT]), tmp_path, pipe=pipe, base_id="tiny")
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]
    with pytest.raises(ArtifactError, match="is a file"):
        artifact.save(UCE().fit(pipe, [CONCEPT]), tmp_path / "letters.txt", pipe=pipe, base_id="tiny")
    assert (tmp_path / "letters.txt").read_text() == "dear"


def test_an_artefact_is_replaced_whole(folder: Path, pipe: Any) -> None:
    artifact.save(SAFREE().fit(pipe, [CONCEPT]), folder, pipe=pipe, base_id="tiny")
    assert erasure.verify(folder, pipe)["method"] == "safree"
    artifact.save(NegativePrompt().fit(pipe, [CONCEPT]), folder, pipe=pipe, base_id="tiny")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("where", ["take", "model_card", "save_file"])
def test_an_interrupted_save_leaves_the_old_artefact_or_none(where: str, pipe: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fingerprint if where == "take" else artifact, where, stop)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(KeyboardInterrupt):
            artifact.save(SAFREE().fit(pipe, [CONCEPT]), target, pipe=pipe, base_id="tiny")
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    monkeypatch.undo()
    assert erasure.verify(folder, pipe)["method"] == "uce"


def test_a_save_killed_between_its_renames_leaves_no_half_artefact(pipe: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renames: list[Path] = []
    real = os.replace

    def second_fails(source: Path, target: Path) -> None:
        renames.append(target)
        if target == folder:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(KeyboardInterrupt):
        artifact.save(SAFREE().fit(pipe, [CONCEPT]), folder, pipe=pipe, base_id="tiny")
    monkeypatch.undo()
    assert not folder.exists() and len(renames) == 2
    artifact.save(SAFREE().fit(pipe, [CONCEPT]), folder, pipe=pipe, base_id="tiny")
    assert erasure.verify(folder, pipe)["method"] == "safree"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_an_eraser_that_does_nothing_is_not_saved(pipe: Any, tmp_path: Path) -> None:
    class Idle(RuntimeEraser):
        def edits(self, pipe: Any, family: Any) -> list[Any]:
            from contextlib import nullcontext

            return [nullcontext(1)]

        def tensors(self) -> dict[str, torch.Tensor]:
            return {}

    with pytest.raises(ArtifactError, match="nothing was erased"):
        artifact.save(Idle(NegativePrompt(), (CONCEPT,)), tmp_path / "out", pipe=pipe, base_id="tiny")
    weights = {"unet.conv_in.weight": pipe.unet.conv_in.weight.detach().clone()}
    with pytest.raises(ArtifactError, match="nothing was erased"):
        artifact.save(WeightEraser(UCE(), (CONCEPT,), weights), tmp_path / "out", pipe=pipe, base_id="tiny")
    assert not list(tmp_path.iterdir())


def test_saving_from_an_attached_pipeline_is_refused(tmp_path: Path) -> None:
    pipe = sd1()
    eraser = erasure.erase(pipe, CONCEPT, "uce")
    with pytest.raises(Conflict, match="take it off"):
        eraser.save(tmp_path / "out", pipe=pipe, base_id="tiny")
    erasure.detach(pipe)
    eraser.save(tmp_path / "out", pipe=pipe, base_id="tiny", seed=3, cost={"fit_seconds": 1.5})
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["seed"] == 3 and config["cost"] == {"fit_seconds": 1.5} and config["environment"]["torch"] == version("torch")


def test_the_model_card_says_what_it_is(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "base_model: tiny" in card and "dagger" in card and "arXiv:2308.14761" in card and "| `ridge` | 0.5 |" in card


def test_the_canary_is_measured_alike_in_half_precision(pipe: Any) -> None:
    half = sd1().to(torch.bfloat16)
    for method in METHODS.values():
        full = canary.measure(pipe, method.fit(pipe, [CONCEPT]))["delta"]
        assert canary.measure(half, method.fit(half, [CONCEPT]))["delta"] == pytest.approx(full, rel=0.05)


def test_of_a_group_of_processes_the_first_writes_and_the_others_wait_and_fail_with_it(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str | None] = []

    def broadcast(values: list[str | None]) -> None:
        said.append(values[0])
        values[0] = told

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "broadcast_object_list", broadcast)
    eraser = UCE().fit(pipe, [CONCEPT])
    told = ""
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        assert artifact.save(eraser, tmp_path / "out", pipe=pipe, base_id="tiny") == tmp_path / "out"
        assert (tmp_path / "out" / CONFIG).exists() is (rank == 0)
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="file is a file"):
        artifact.save(eraser, tmp_path / "file", pipe=pipe, base_id="tiny")
    told = str(said.pop())
    assert said == [None, None] and "file is a file" in told
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    with pytest.raises(ArtifactError, match=r"the first process did not save the artefact: .* is a file"):
        artifact.save(eraser, tmp_path / "file", pipe=pipe, base_id="tiny")
