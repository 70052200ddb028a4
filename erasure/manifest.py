"""What an artefact folder says that it holds (erasure_config.json), and whether it holds that and nothing else that a loader would read."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from .errors import ArtifactError, NoArtifact
from .lora import LORA

SCHEMA = 1
CONFIG, STATE, CARD = "erasure_config.json", "erasure_state.safetensors", "README.md"
STATES = {"weights": STATE, "runtime": STATE, "adapter": LORA}
"""File of the tensors, by kind of eraser."""
PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
INERT = {"", ".md", ".txt", ".png", ".jpg", ".jpeg", ".webp", ".svg", ".pdf"}
"""Suffixes of files that no loader reads: they may lie in the folder beside the artefact's own."""
LARGEST = 64 * 2**20
"""Bytes of a configuration."""


def _sha256(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError("a sha256 has 64 lower-case hexadecimal digits")
    return text


Sha = Annotated[str, AfterValidator(_sha256)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Component(_Part):
    shapes: Sha
    entries: list[FiniteFloat] = Field(min_length=256, max_length=256)


class Base(_Part):
    id: str
    family: str
    components: dict[str, Component] = Field(min_length=1)


class Move(_Part):
    prompt: str = Field(min_length=1)
    delta: Annotated[FiniteFloat, Field(gt=0)]


class Canary(Move):
    also: list[Move] = []
    """The same for further concepts."""


class Configuration(_Part):
    """The keys that loading depends on."""

    kind: Literal["weights", "runtime", "adapter"]
    method: str
    method_config: dict[str, Any]
    concepts: list[dict[str, Any]] = Field(min_length=1)
    base: Base
    canary: Canary
    files: dict[str, Sha]


def read(folder: Path) -> dict[str, Any]:
    """The configuration of an artefact folder, with its schema number and the values that loading depends on checked."""
    path = folder / CONFIG
    if not path.is_file():
        cut = folder.with_name(f".{folder.name}.partial")
        hint = f"a save was cut off ({cut} is left of it): save again" if cut.is_dir() else "give a folder that `erasure erase` wrote"
        raise NoArtifact(f"{folder} is no artefact: it has no {CONFIG}; {hint}")
    _refuse_link(path)
    config = _parse(path)
    schema = config.get("schema") if isinstance(config, dict) else None
    if type(schema) is not int or schema != SCHEMA:
        newer = type(schema) is int and schema > SCHEMA
        problem = "is newer than this version's; upgrade erasure-suite" if newer else "is unknown to this version"
        raise ArtifactError(f"{path}: schema {schema!r:.40} {problem} (schema {SCHEMA})")
    if "export" in config:
        raise NoArtifact(f"{folder} is an export ({config['export']!r:.40}), not an artefact; see its README.md for how to load it")
    try:
        Configuration.model_validate(config)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise ArtifactError(f"{path}: {problems}") from error
    assert isinstance(config, dict)
    return config


def _parse(path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
            raise ValueError(f"the key {twice!r} is there twice")
        return found

    def no_number(text: str) -> None:
        raise ValueError(f"{text} is no number")

    if path.stat().st_size > LARGEST:
        raise ArtifactError(f"{path} has {path.stat().st_size / 2**20:.0f} MiB: no configuration is that large")
    try:
        config = json.loads(path.read_bytes().decode(), object_pairs_hook=once, parse_constant=no_number)
        json.dumps(config, ensure_ascii=False).encode()  # halves of surrogate pairs can be escaped in JSON, but are no text
    except RecursionError as error:
        raise ArtifactError(f"{path} is not JSON that this version reads: it is nested too deep") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error
    return config


def check_files(folder: Path, config: dict[str, Any]) -> Path | None:
    """Raise unless the folder holds the listed files as listed, and nothing else that a loader would read; gives that of the tensors."""
    listed, state = config["files"], STATES[config["kind"]]
    for name in listed:
        if name in ("", ".", "..") or re.search(r"[/\\:\x00-\x1f]", name):
            raise ArtifactError(f"{folder}: the file name {name!r} leaves the folder")
        if Path(name).suffix.lower() in PICKLES:
            raise ArtifactError(f"{folder}: {name} is a pickle, which can run code when it is read; artefacts hold safetensors only")
        if name != state and not _inert(name):
            raise ArtifactError(f"{folder}: {name} is no file of an artefact of kind {config['kind']}, whose tensors are in {state}")
    for entry in sorted(folder.iterdir()):
        if entry.name in listed or entry.name == CONFIG:
            _refuse_link(entry)
        elif entry.name.startswith("."):
            continue  # of git and of download tools; diffusers reads none of it
        elif entry.is_symlink() or entry.is_dir() or not _inert(entry.name):
            raise ArtifactError(f"{folder}: {entry.name} is not listed in {CONFIG}, and a loader could read it; take it out of the folder")
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{folder}: {name} is missing")
        if (found := sha256(path)) != expected:
            raise ArtifactError(f"{folder}: {name} has sha256 {found[:12]}…, the artefact was saved with {expected[:12]}…")
    return folder / state if state in listed else None


def is_export(folder: Path) -> bool:
    """Whether `erasure export` wrote the folder."""
    try:
        return "export" in json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _inert(name: str) -> bool:
    return Path(name).suffix.lower() in INERT


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise ArtifactError(f"{path} is a link, which leaves the folder; copy the files themselves (as `hf download --local-dir` does)")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
