"""An artefact that somebody has damaged or forged is refused, with the reason, and no input makes a traceback."""

import copy
import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import erasure
from erasure import artifact, models
from erasure.artifact import CARD, CONFIG, STATE
from erasure.cli.main import main
from erasure.concept import Concept
from erasure.errors import ArtifactError, ErasureError
from erasure.lora import LORA
from erasure.methods.uce import UCE
from erasure.registry import Entry, methods
from tests.tiny import sd1, sdxl

CONCEPTS = (Concept("dagger", anchors=("cat",)), Concept("boat", anchors=("dog",)))
UNET_KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sd1()


@pytest.fixture(scope="module")
def sound(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = artifact.save(UCE().fit(pipe, CONCEPTS), tmp_path_factory.mktemp("sound") / "uce", pipe=pipe, base_id="tiny")
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def folder(sound: dict[str, bytes], tmp_path: Path) -> Path:
    return write(tmp_path / "artefact", sound)


def write(folder: Path, content: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def listed(folder: Path, *names: str) -> None:
    """List files with their true hashes, as a forger would."""
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    edit(folder, lambda c: c["files"].update(hashes))


def state(folder: Path, data: bytes) -> None:
    (folder / STATE).write_bytes(data)
    listed(folder, STATE)


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / STATE)), folder / STATE)
    listed(folder, STATE)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


PICKLE = pickle.dumps(Bomb())
HASH = hashlib.sha256(b"x").hexdigest()


def rename(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


def relist(folder: Path, old: str, new: str) -> None:
    """Rename a file, and its entry."""
    rename(folder, old, new)
    edit(folder, lambda c: c["files"].update({new: c["files"].pop(old)}))


def each(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [step(folder) for step in steps]


def link(folder: Path, name: str, target: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def outside(folder: Path, name: str) -> Path:
    return (folder / name).rename(folder.parent / name)


def add(folder: Path, name: str, data: bytes = b"x") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)


def forge(folder: Path, name: str) -> None:
    edit(folder, lambda c: c["files"].update({name: HASH}))


def text(folder: Path, change: Callable[[str], str]) -> None:
    (folder / CONFIG).write_text(change((folder / CONFIG).read_text()))


def forge_file(folder: Path, name: str, data: bytes = b"x") -> None:
    add(folder, name, data)
    listed(folder, name)


def header(length: int, content: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + content


def overlapping(n: int) -> bytes:
    """Two tensors over the same bytes."""
    meta = {
        "a": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]},
        "b": {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]},
    }
    raw = json.dumps(meta).encode()
    return header(len(raw), raw) + b"\0" * 4 * n


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    # tampered
    "a bit of the state": (
        lambda f: (f / STATE).write_bytes((d := (f / STATE).read_bytes())[:-1] + bytes([d[-1] ^ 1])),
        f"{STATE} has sha256",
    ),
    "the card": (lambda f: (f / CARD).write_text("safe"), f"{CARD} has sha256"),
    "a hash": (lambda f: forge(f, STATE), f"{STATE} has sha256"),
    "a setting": (lambda f: edit(f, lambda c: c["method_config"].update(ridgee=1)), "ridgee"),
    "a setting's type": (lambda f: edit(f, lambda c: c["method_config"].update(ridge="much")), "ridge"),
    "the canary's prompt": (lambda f: edit(f, lambda c: c["canary"].update(prompt="a cat")), "the configuration was edited"),
    "the canary's size": (lambda f: edit(f, lambda c: c["canary"].update(delta=9.0)), "moves by"),
    "a second canary": (lambda f: edit(f, lambda c: c["canary"]["also"][0].update(delta=9.0)), "'boat' moves by"),
    "a second canary's prompt": (lambda f: edit(f, lambda c: c["canary"]["also"][0].update(prompt="x")), "the configuration was edited"),
    "the fingerprint": (lambda f: edit(f, lambda c: c["base"]["components"]["unet"]["entries"].__setitem__(0, 9.0)), "1 of 256 sampled"),
    "a fingerprint of nothing": (lambda f: edit(f, lambda c: c["base"].update(components={})), "components"),
    "a fingerprint of less": (lambda f: edit(f, lambda c: c["base"]["components"].pop("unet")), "unet is in one alone"),
    "a shorter fingerprint": (lambda f: edit(f, lambda c: c["base"]["components"]["unet"]["entries"].pop()), "entries"),
    # numbers that pass every comparison
    "a canary that is no number": (lambda f: text(f, lambda t: t.replace('"delta": ', '"delta": NaN, "d": ')), "NaN is no number"),
    "an infinite canary": (lambda f: edit(f, lambda c: c["canary"].update(delta=float("inf"))), "Infinity is no number"),
    "an overflowing canary": (lambda f: text(f, lambda t: t.replace('"delta": ', '"delta": 1e999, "d": ')), "delta"),
    "an overflowing fingerprint": (
        lambda f: text(f, lambda t: t.replace('"entries": [', '"entries": [1e999, ').replace("\n", "")),
        "entries",
    ),
    "a negative canary": (lambda f: edit(f, lambda c: c["canary"].update(delta=-0.1)), "delta"),
    # truncated
    "a cut state": (lambda f: (f / STATE).write_bytes((f / STATE).read_bytes()[:-9]), f"{STATE} has sha256"),
    "a cut state, hash forged": (lambda f: state(f, (f / STATE).read_bytes()[:-9]), "does not hold"),
    "an empty state": (lambda f: state(f, b""), "does not hold"),
    "a cut configuration": (lambda f: text(f, lambda t: t[: len(t) // 2]), "not JSON"),
    "an empty configuration": (lambda f: text(f, lambda t: ""), "not JSON"),
    # renamed
    "a renamed state": (lambda f: rename(f, STATE, "state.safetensors"), "state.safetensors is not listed"),
    "a renamed and relisted state": (lambda f: relist(f, STATE, "x.safetensors"), "x.safetensors is no file of an artefact"),
    "the state in capitals": (lambda f: relist(f, STATE, STATE.upper()), f"{STATE.upper()} is no file of an artefact"),
    "another kind's state": (lambda f: relist(f, STATE, LORA), f"{LORA} is no file of an artefact of kind weights"),
    "another kind": (lambda f: edit(f, lambda c: c.update(kind="runtime")), "kind weights, not runtime"),
    "a kind that is none": (lambda f: edit(f, lambda c: c.update(kind="magic")), "kind"),
    "an adapter that is weights": (
        each(lambda f: relist(f, STATE, LORA), lambda f: edit(f, lambda c: c.update(kind="adapter"))),
        "kind weights, not adapter",
    ),
    # pickled
    "a pickle in the state's place": (lambda f: state(f, PICKLE), "does not hold"),
    **{
        f"a listed pickle {suffix}": (lambda f, s=suffix: forge_file(f, f"w{s}", PICKLE), "is a pickle")  # type: ignore[misc]
        for suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".PT")
    },
    "an unlisted pickle": (lambda f: add(f, "pytorch_lora_weights.bin", PICKLE), "pytorch_lora_weights.bin is not listed"),
    "the state as a pickle": (lambda f: relist(f, STATE, "erasure_state.bin"), "is a pickle"),
    # links
    "a linked state": (lambda f: link(f, STATE, outside(f, STATE)), "is a link, which leaves the folder"),
    "a linked card": (lambda f: link(f, CARD, outside(f, CARD)), "is a link"),
    "a linked configuration": (lambda f: link(f, CONFIG, outside(f, CONFIG)), "is a link"),
    "a link inside the folder": (lambda f: link(f, CARD, Path(STATE)), "is a link"),
    "a linked folder": (lambda f: link(f, "unet", f.parent), "unet is not listed"),
    "a dangling link": (lambda f: link(f, "notes.txt", f / "nowhere"), "notes.txt is not listed"),
    # paths
    **{
        f"the path {name!r}": (lambda f, n=name: forge(f, n), "leaves the folder")  # type: ignore[misc]
        for name in ("../x", "/etc/hostname", "a/b", "a\\b", "..\\x", "C:x", "x\0.md", "a\nb.md", "", ".", "..", "./README.md")
    },
    # half-written
    "no configuration": (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}"),
    "no state": (lambda f: (f / STATE).unlink(), f"{STATE} is missing"),
    "neither": (each(lambda f: (f / CONFIG).unlink(), lambda f: (f / STATE).unlink()), f"has no {CONFIG}"),
    "only what a cut save leaves": (lambda f: f.rename(f.with_name(".artefact.partial")), "a save was cut off.*partial"),
    "a folder for a file": (each(lambda f: (f / CARD).unlink(), lambda f: (f / CARD).mkdir()), f"{CARD} is missing"),
    "a folder for the configuration": (each(lambda f: (f / CONFIG).unlink(), lambda f: (f / CONFIG).mkdir()), f"has no {CONFIG}"),
    # schema
    "a newer schema": (lambda f: edit(f, lambda c: c.update(schema=2)), "schema 2 is newer.*upgrade"),
    "an older schema": (lambda f: edit(f, lambda c: c.update(schema=0)), "schema 0 is unknown"),
    "no schema": (lambda f: edit(f, lambda c: c.pop("schema")), "schema None is unknown"),
    "a schema of words": (lambda f: edit(f, lambda c: c.update(schema="1")), "schema '1' is unknown"),
    "a schema that is true": (lambda f: edit(f, lambda c: c.update(schema=True)), "schema True is unknown"),
    # JSON
    "a key twice": (lambda f: text(f, lambda t: t.replace('"schema": 1', '"schema": 1, "schema": 1')), "'schema' is there twice"),
    "an inner key twice": (lambda f: text(f, lambda t: t.replace(f'"{STATE}":', f'"{STATE}": "{HASH}", "{STATE}":')), "is there twice"),
    "a list": (lambda f: text(f, lambda t: f"[{t}]"), "schema None is unknown"),
    "nested without end": (lambda f: text(f, lambda t: "[" * 200_000), "nested too deep"),
    "bytes that are no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), "not JSON"),
    "half a surrogate": (lambda f: edit(f, lambda c: c["concepts"][0].update(name="\ud800")), "not JSON"),
    "a huge configuration": (lambda f: os.truncate(f / CONFIG, 2**30), "1024 MiB"),
    # hashes
    "a short hash": (lambda f: edit(f, lambda c: c["files"].update({CARD: HASH[:32]})), "64 lower-case"),
    "a long hash": (lambda f: edit(f, lambda c: c["files"].update({CARD: HASH + "0"})), "64 lower-case"),
    "a hash in capitals": (lambda f: edit(f, lambda c: c["files"].update({CARD: c["files"][CARD].upper()})), "64 lower-case"),
    "no hash": (lambda f: edit(f, lambda c: c["files"].update({CARD: None})), "files.README.md"),
    # tensors
    "NaN": (lambda f: tensors(f, lambda t: t | {UNET_KEY: t[UNET_KEY] * float("nan")}), f"{UNET_KEY} holds values that are not finite"),
    "infinity": (lambda f: tensors(f, lambda t: t | {UNET_KEY: t[UNET_KEY] / 0}), "not finite"),
    "a tensor of nowhere": (lambda f: tensors(f, lambda t: t | {"unet.x": torch.ones(1)}), "no parameter 'x'"),
    "a tensor of another shape": (lambda f: tensors(f, lambda t: t | {UNET_KEY: t[UNET_KEY][:1].clone()}), "the base has"),
    "tensors of the VAE's": (lambda f: tensors(f, lambda t: {"vae.nothing": torch.ones(1)}), "no parameter"),
    "integers": (
        lambda f: tensors(f, lambda t: {k: torch.zeros_like(v, dtype=torch.int32) for k, v in t.items()}),
        "moves by|does not run",
    ),
    "a huge header": (lambda f: state(f, header(2**40)), "does not hold"),
    "a header longer than its file": (lambda f: state(f, header(1000, b"{}")), "does not hold"),
    "a header of nothing but length": (lambda f: state(f, header(2**63)), "does not hold"),
    "a header that is no JSON": (lambda f: state(f, header(8, b"garbage!")), "does not hold"),
    "overlapping tensors": (lambda f: state(f, overlapping(4)), "does not hold"),
    # files that plain diffusers would load from the folder, or run
    **{
        f"an unlisted {name}": (lambda f, n=name: add(f, n), f"{name.split('/')[0]} is not listed")  # type: ignore[misc]
        for name in (
            LORA,
            "model_index.json",
            "config.json",
            "adapter_config.json",
            "model.safetensors",
            "diffusion_pytorch_model.safetensors",
            "pipeline.py",
            "unet/diffusion_pytorch_model.safetensors",
        )
    },
    "a listed script": (lambda f: forge_file(f, "pipeline.py"), "pipeline.py is no file of an artefact"),
    "a listed model_index": (
        lambda f: forge_file(f, "model_index.json"),
        "is no file of an artefact",
    ),
    # names
    "a method that nobody has": (lambda f: edit(f, lambda c: c.update(method="ucee")), "did you mean uce"),
    "a method by its module": (lambda f: edit(f, lambda c: c.update(method="os:system")), "no method 'os:system'"),
    "a concept of nothing": (lambda f: edit(f, lambda c: c["concepts"][0].update(targets=[""])), "a target is empty"),
    "an export": (lambda f: edit(f, lambda c: c.update(export={"format": "full"})), "is an export"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_its_reason(case: str, folder: Path, pipe: Any) -> None:
    damage, reason = CASES[case]
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    damage(folder)
    for load in (lambda: erasure.load(folder, base=pipe), lambda: erasure.verify(folder, pipe)):
        with pytest.raises(ArtifactError, match=reason):
            load()
    assert not hasattr(pipe, "_erasers")
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


def test_another_base_is_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"of 256 sampled weights of [a-z_]+ differ"):
        erasure.load(folder, base=sd1(seed=1))
    with pytest.raises(ArtifactError, match="made for the family sd1, this pipeline is sdxl"):
        erasure.load(folder, base=sdxl())


def test_what_is_harmless_may_lie_in_the_folder(folder: Path, pipe: Any) -> None:
    for name in ("LICENSE", "notes.md", "sample.png", ".gitattributes", ".cache/huggingface"):
        add(folder, name)
    (folder.parent / ".artefact.partial").mkdir()  # left by another save that was killed
    assert set(erasure.verify(folder, pipe)["canary"]) == {"recorded", "measured", "also"}


def test_an_artefact_of_the_first_version_still_loads(folder: Path, pipe: Any) -> None:
    edit(folder, lambda c: c["canary"].pop("also"))
    assert set(erasure.verify(folder, pipe)["canary"]) == {"recorded", "measured"}


# fuzz

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(["[/x]", "\0", "[bold]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(config: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with one to three values replaced, removed, renamed or doubled."""
    config = copy.deepcopy(config)
    for _ in range(draw(st.integers(1, 3))):
        few = [place for place in places(config) if place and not (len(place) > 4 and place[-1] not in (0, 255))]
        *path, key = draw(st.sampled_from(few))
        owner = config
        for step in path:
            owner = owner[step]
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename", "double"]))
        if action == "remove":
            del owner[key]
        elif action == "rename" and isinstance(owner, dict):
            owner[draw(st.text(max_size=8))] = owner.pop(key)
        elif action == "double" and isinstance(owner, list):
            owner.append(owner[key])
        else:
            owner[key] = draw(PLAIN)
    return config


@pytest.fixture(scope="module")
def fuzzing(sound: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return write(tmp_path_factory.mktemp("fuzz") / "artefact", sound), json.loads(sound[CONFIG])


FUZZ = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@FUZZ
@given(data=st.data())
def test_a_mutated_configuration_loads_or_gives_a_reason(data: st.DataObject, fuzzing: tuple[Path, dict[str, Any]], pipe: Any) -> None:
    folder, config = fuzzing
    (folder / CONFIG).write_text(json.dumps(data.draw(mutated(config))))
    try:
        erasure.verify(folder, pipe)
    except ErasureError as error:
        assert len(str(error)) > 20


@settings(FUZZ, max_examples=100)
@given(data=st.data())
def test_the_command_line_prints_no_traceback(
    data: st.DataObject, fuzzing: tuple[Path, dict[str, Any]], pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = fuzzing
    (folder / CONFIG).write_text(json.dumps(data.draw(mutated(config))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_base", lambda *args, **kwargs: pipe)
        code = main(["verify", str(folder), "--model", "tiny", "--device", "cpu"])
    printed = capsys.readouterr()
    assert code in (0, 1, 2) and "Traceback" not in printed.err
    assert ("ok:" in printed.out) == (code == 0) and (code == 0 or "error" in printed.err)


@settings(FUZZ, max_examples=100)
@given(raw=st.binary(max_size=200) | st.text().map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_configuration_or_state(raw: bytes, sound: dict[str, bytes], fuzzing: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = fuzzing
    (folder / CONFIG).write_bytes(raw)
    with pytest.raises(ArtifactError):
        artifact.load_eraser(folder)
    (folder / CONFIG).write_bytes(sound[CONFIG])
    state(folder, raw)
    with pytest.raises(ArtifactError, match="does not hold"):
        artifact.load_eraser(folder)
    write(folder, sound)


def test_a_method_that_crashes_on_forged_tensors_gives_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Brittle(UCE):
        def eraser(self, concepts: Any, tensors: Any) -> Any:
            return tensors["mine"][0]

    monkeypatch.setitem(globals(), "Brittle", Brittle)
    monkeypatch.setitem(methods.builtin, "uce", Entry(f"{__name__}:Brittle", "test"))
    with pytest.raises(ArtifactError, match="does not hold what uce needs: 'mine'"):
        artifact.load_eraser(folder)
