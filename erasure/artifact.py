"""The folder that an eraser ships as: write it, check it, load it. Whatever is wrong raises; nothing falls back to the base."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import __version__, canary, fingerprint
from .card import model_card
from .concept import Concept
from .errors import ArtifactError, Conflict, ErasureError
from .method import Eraser, ErasureMethod, WeightEraser, attach_for_good, detach
from .registry import methods

SCHEMA = 1
CONFIG, STATE, CARD = "erasure_config.json", "erasure_state.safetensors", "README.md"
FIELDS = {"kind": str, "method": str, "method_config": dict, "concepts": list, "base": dict, "canary": dict, "files": dict}
"""What the configuration must hold to be loaded."""
ENTRIES = (("base", "family", str), ("base", "components", dict), ("canary", "prompt", str), ("canary", "delta", float))
"""What its sections must hold."""
CANARY_AT_LOAD = 2_000_000_000
"""Denoisers with fewer parameters run the canary whenever an artefact is loaded onto them."""


def save(eraser: Eraser, folder: str | Path, *, pipe: Any, base_id: str, seed: int = 0, cost: Mapping[str, float] | None = None) -> Path:
    """Write ``eraser`` as an artefact, atomically: state, configuration with hashes, fingerprint and canary, and a model card.

    ``pipe`` is the base that it was fitted on, unattached; a canary that does not move there is an error, and nothing is written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; choose a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).exists():
        raise ArtifactError(f"{folder} is not empty and holds no artefact; choose another folder")
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
    return folder


def _write(eraser: Eraser, partial: Path, pipe: Any, base_id: str, seed: int, cost: Mapping[str, float] | None) -> None:
    if tensors := eraser.tensors():
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
    }
    (partial / CARD).write_text(model_card(config))
    config["files"] = {p.name: sha256(p) for p in sorted(partial.iterdir())}
    (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _replace(folder: Path, partial: Path) -> None:
    """Put ``partial`` in the place of ``folder`` by renaming alone, so that a kill leaves the old artefact, the new one, or none."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_eraser(folder: str | Path) -> tuple[Eraser, dict[str, Any]]:
    """The eraser of an artefact folder and its configuration, with schema, paths and hashes checked."""
    folder = Path(folder)
    config = read_config(folder)
    for name, expected in config["files"].items():
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            raise ArtifactError(f"{folder}: the file name {name!r} leaves the folder")
        if not path.is_file():
            raise ArtifactError(f"{folder}: {name} is missing")
        if (found := sha256(path)) != expected:
            raise ArtifactError(f"{folder}: {name} has sha256 {found[:12]}…, the artefact was saved with {expected[:12]}…")
    if STATE not in config["files"] and (folder / STATE).exists():
        raise ArtifactError(f"{folder}: {STATE} is not listed in {CONFIG}")
    try:
        method: ErasureMethod = methods.get(config["method"]).from_config(config["method_config"])
        concepts = tuple(Concept.from_dict(c) for c in config["concepts"])
        tensors = load_file(folder / STATE) if STATE in config["files"] else {}
        eraser = method.eraser(concepts, tensors)
    except ErasureError as error:
        raise ArtifactError(f"{folder / CONFIG}: {error}") from error
    except (SafetensorError, KeyError) as error:
        raise ArtifactError(f"{folder}: {STATE} does not hold what {config['method']} needs: {error}") from error
    if eraser.kind != config["kind"]:
        raise ArtifactError(f"{folder / CONFIG}: {method.name} makes erasers of kind {eraser.kind}, not {config['kind']}")
    return eraser, config


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ArtifactError(f"{folder} is no artefact: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error
    schema = config.get("schema") if isinstance(config, dict) else None
    if type(schema) is not int or schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        problem = "is newer than this version's; upgrade" if newer else "is unknown to this version"
        raise ArtifactError(f"{path}: schema {schema} {problem} (schema {SCHEMA})")
    missing = FIELDS.keys() - config.keys()
    if missing:
        raise ArtifactError(f"{path} lacks {', '.join(sorted(missing))}")
    wrong = [key for key, kind in FIELDS.items() if not isinstance(config[key], kind)]
    wrong += [
        f"{section}.{key}" for section, key, kind in ENTRIES if section not in wrong and not isinstance(config[section].get(key), kind)
    ]
    if wrong:
        raise ArtifactError(f"{path}: {', '.join(wrong)} hold the wrong kind of value")
    return config


def attach_checked(folder: str | Path, pipe: Any, *, always_canary: bool = False) -> tuple[Eraser, dict[str, Any]]:
    """Check an artefact against ``pipe`` and attach it for good; gives a report."""
    eraser, report = check(folder, pipe, always_canary=always_canary)
    attach_for_good(eraser, pipe)
    return eraser, report


def check(folder: str | Path, pipe: Any, *, always_canary: bool = False) -> tuple[Eraser, dict[str, Any]]:
    """The eraser of an artefact that fits ``pipe`` (fingerprint, changed tensors, canary), and a report; ``pipe`` is left as it was."""
    eraser, config = load_eraser(folder)
    if vars(pipe).get("_erasers"):
        raise ArtifactError(f"{folder} is checked against a bare base, and this pipeline has an eraser attached: detach it first")
    fingerprint.check(pipe, config["base"], str(folder))
    report: dict[str, Any] = {"artefact": str(folder), "method": config["method"], "files": len(config["files"]), "fingerprint": "matches"}
    if isinstance(eraser, WeightEraser):
        report["changed_tensors"] = fingerprint.count_changed(pipe, eraser.changed, str(folder))
    size = sum(p.numel() for name in eraser.method.family(pipe).denoisers for p in getattr(pipe, name).parameters())
    if always_canary or size < CANARY_AT_LOAD:
        report["canary"] = canary.check(pipe, eraser, config["canary"], str(folder))
    return eraser, report


def verify(folder: str | Path, pipe: Any) -> dict[str, Any]:
    """Every check of an artefact on its base, canary included; raises at the first that fails and leaves ``pipe`` as it was."""
    return check(folder, pipe, always_canary=True)[1]


def environment() -> dict[str, str]:
    """Versions that results depend on."""
    packages = ("torch", "diffusers", "transformers", "safetensors", "numpy")
    return (
        {"python": platform.python_version(), "machine": platform.machine()} | {p: version(p) for p in packages} | {"erasure": __version__}
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


__all__ = ["ErasureError", "attach_checked", "check", "detach", "environment", "load_eraser", "save", "verify"]
