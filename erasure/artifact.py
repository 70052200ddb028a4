"""The folder that an eraser ships as: write it, check it, load it. Whatever is wrong raises; nothing falls back to the base."""

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import distributed

from . import __version__, canary, fingerprint, lora
from .adapter import AdapterEraser
from .card import model_card
from .concept import Concept
from .errors import ArtifactError, Conflict, ErasureError, NoArtifact
from .manifest import CARD, CONFIG, SCHEMA, STATE, check_files, is_export, sha256
from .manifest import read as read_config
from .method import Eraser, ErasureMethod, WeightEraser, detach
from .registry import methods

CANARY_AT_LOAD = 2_000_000_000
"""Denoisers with fewer parameters run the canary whenever an artefact is loaded onto them."""


def save(eraser: Eraser, folder: str | Path, *, pipe: Any, base_id: str, seed: int = 0, cost: Mapping[str, float] | None = None) -> Path:
    """Write ``eraser`` as an artefact, atomically: state, configuration with hashes, fingerprint and canary, and a model card.

    ``pipe`` is the base that it was fitted on, unattached; a canary that does not move there is an error, and nothing is written.
    Processes that trained together all call this: the first one writes, and the others wait for it.
    """
    folder = Path(folder)
    _by_first(lambda: _save(eraser, folder, pipe, base_id, seed, cost))
    return folder


def _by_first(write: Callable[[], None]) -> None:
    """Of a group of processes the first one writes, and the others wait, and fail if it does; a process on its own writes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return write()
    problem: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            write()
        except Exception as error:
            problem = error
    said = [problem and f"{type(problem).__name__}: {problem}"]
    distributed.broadcast_object_list(said)
    if problem:
        raise problem
    if said[0]:
        raise ArtifactError(f"the first process did not save the artefact: {said[0]}")


def _save(eraser: Eraser, folder: Path, pipe: Any, base_id: str, seed: int, cost: Mapping[str, float] | None) -> None:
    check_target(folder)
    if vars(pipe).get("_erasers"):
        raise Conflict("an eraser is attached to the pipeline; take it off before saving, since fingerprint and canary describe the base")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(eraser, partial, pipe, base_id, seed, cost)
        _replace(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(folder: Path) -> None:
    """Raise where an artefact cannot go: on a file, or among files that are none of an artefact's."""
    if folder.exists() and not folder.is_dir():
        raise NoArtifact(f"{folder} is a file; choose a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).exists():
        raise NoArtifact(f"{folder} is not empty and holds no artefact; choose another folder")
    if is_export(folder):
        raise NoArtifact(f"{folder} holds an export; choose another folder")


def _write(eraser: Eraser, partial: Path, pipe: Any, base_id: str, seed: int, cost: Mapping[str, float] | None) -> None:
    tensors = eraser.tensors()
    if isinstance(eraser, AdapterEraser):
        lora.write(tensors, partial)
    elif tensors:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial / STATE, metadata={"format": "pt"})
    config: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": eraser.kind,
        "method": eraser.method.name,
        "method_config": eraser.method.config(),
        "concepts": [c.to_dict() for c in eraser.concepts],
        "base": {"id": base_id, **fingerprint.take(pipe)},
        "seed": seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "cost": dict(cost or {}),
        "canary": canary.measure(pipe, eraser),
        **({"details": details} if (details := eraser.details()) else {}),
    }
    (partial / CARD).write_text(model_card(config))
    config["files"] = {p.name: sha256(p) for p in sorted(partial.iterdir())}
    (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def rewrite_card(folder: str | Path, change: Callable[[str], str]) -> Path:
    """Put another text into an artefact's README.md, with its hash, and leave all else; whole or not at all."""
    folder = Path(folder)
    config = read_config(folder)
    check_files(folder, config)
    text = change((folder / CARD).read_text(encoding="utf-8"))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        # Links where the file system has them: the tensors may be large, and stay as they are.
        shutil.copytree(folder, partial, copy_function=_link)
        for name in (CARD, CONFIG):
            (partial / name).unlink()
        (partial / CARD).write_text(text, encoding="utf-8")
        config["files"][CARD] = sha256(partial / CARD)
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        _replace(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / CARD


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _replace(folder: Path, partial: Path) -> None:
    """Put ``partial`` in the place of ``folder`` by renaming alone, so that a kill leaves the old artefact, the new one, or none."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_eraser(folder: str | Path, component: str | None = None) -> tuple[Eraser, dict[str, Any]]:
    """The eraser of an artefact folder and its configuration, with schema, files and hashes checked.

    ``component``: raise unless the eraser changes the weights of that one and of no other.
    """
    folder = Path(folder)
    config = read_config(folder)
    state = check_files(folder, config)
    try:
        method: ErasureMethod = methods.get(config["method"]).from_config(config["method_config"])
        concepts = tuple(Concept.from_dict(c) for c in config["concepts"])
    except ErasureError as error:
        raise ArtifactError(f"{folder / CONFIG}: {error}") from error
    try:
        tensors = load_file(state) if state else {}
        if wrong := [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
            raise ErasureError(f"{wrong[0]} holds values that are not finite")
        eraser = method.eraser(concepts, tensors)
        if state and isinstance(eraser, AdapterEraser):
            lora.check_metadata(state, tensors)
    except Exception as error:  # whatever a method may raise at tensors that are not its own
        raise ArtifactError(f"{state or folder} does not hold what {method.name} needs: {error}") from error
    if eraser.kind != config["kind"]:
        raise ArtifactError(f"{folder / CONFIG}: {method.name} makes erasers of kind {eraser.kind}, not {config['kind']}")
    if component is not None:
        _changes_only(eraser, component, str(folder))
    return eraser, config


def check(folder: str | Path, pipe: Any, *, always_canary: bool = False, component: str | None = None) -> tuple[Eraser, dict[str, Any]]:
    """The eraser of an artefact that fits ``pipe`` (fingerprint, changed tensors, canary), and a report; ``pipe`` is left as it was.

    ``component``: the only one that the artefact changes, and the only one that must be its base's (a text encoder that pipelines of
    several families share). How far the canary moves depends on the rest, so there it must only move.
    """
    eraser, config = load_eraser(folder, component)
    if vars(pipe).get("_erasers"):
        raise ArtifactError(f"{folder} is checked against a bare base, and this pipeline has an eraser attached: detach it first")
    left_out = fingerprint.check(pipe, config["base"], str(folder), component)
    matches = "matches" if component is None else f"{component} matches; nothing else was compared"
    matches += f"; quantised and not compared: {', '.join(left_out)}" if left_out else ""
    report: dict[str, Any] = {"artefact": str(folder), "method": config["method"], "files": len(config["files"]), "fingerprint": matches}
    if isinstance(eraser, WeightEraser):
        report["changed_tensors"] = fingerprint.count_changed(pipe, eraser.values(pipe), str(folder))
    size = sum(p.numel() for _, denoiser in eraser.method.family(pipe).parts(pipe) for p in denoiser.parameters())
    if always_canary or size < CANARY_AT_LOAD:
        if component is None:
            report["canary"] = canary.check(pipe, eraser, config["canary"], str(folder), quantised=bool(left_out))
        else:
            report["canary"] = canary.measure(pipe, eraser)
    return eraser, report


def _changes_only(eraser: Eraser, component: str, source: str) -> None:
    """Raise unless a weight eraser changes that component and no other."""
    if not isinstance(eraser, WeightEraser):
        raise ErasureError(
            f"{source}: {eraser.method.name} is no change of weights of one component, {component!r} or another; load it onto its own base"
        )
    if (found := {name.partition(".")[0] for name in eraser.writes()}) != {component}:
        there = ", ".join(sorted(found))
        fix = f"give {there}" if len(found) == 1 else "load it onto its own base"
        raise ErasureError(f"{source}: {eraser.method.name} changes {there}, not {component!r} alone; {fix}")


def verify(folder: str | Path, pipe: Any, *, component: str | None = None) -> dict[str, Any]:
    """Every check of an artefact on its base, canary included; raises at the first that fails and leaves ``pipe`` as it was.

    ``component``: see `check`.
    """
    return check(folder, pipe, always_canary=True, component=component)[1]


def environment() -> dict[str, str]:
    """Versions that results depend on."""
    packages = ("torch", "diffusers", "transformers", "safetensors", "numpy")
    return (
        {"python": platform.python_version(), "machine": platform.machine()} | {p: version(p) for p in packages} | {"erasure": __version__}
    )


__all__ = [
    "CARD",
    "CONFIG",
    "SCHEMA",
    "STATE",
    "ErasureError",
    "check",
    "check_target",
    "detach",
    "environment",
    "load_eraser",
    "read_config",
    "save",
    "verify",
]
