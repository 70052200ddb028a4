"""Where and by what results were made: machine, packages, commit of the source, base model, artefact."""

import json
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import erasure

from .store import Cell

SCORING = ("torchmetrics", "torch-fidelity", "open-clip-torch", "stlpips_pytorch", "onnxruntime", "scipy")
"""Packages that scores depend on beside those that images do (``store.versions``)."""


def environment() -> dict[str, Any]:
    """The machine, and versions of what scores."""
    found: dict[str, Any] = {"machine": platform.machine(), "system": platform.system(), "threads": torch.get_num_threads()}
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found["erasure"] = erasure.__version__
    for package in SCORING:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@cache
def commit() -> str | None:
    """The commit of the checkout that erasure runs from, with "+changes" where files differ from it; None outside a checkout."""
    home = Path(erasure.__file__).resolve().parent
    try:
        top = _git(home, "rev-parse", "--show-toplevel")
        if Path(top).resolve() / "erasure" != home:
            return None  # an installation inside somebody's own repository
        changed = _git(home, "status", "--porcelain", "--untracked-files=no")
        return _git(home, "rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    asked = ["git", "-C", str(folder), *arguments]
    return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def of_cell(cell: Cell, fitted: Mapping[str, Any] | None) -> dict[str, Any]:
    """``model`` and ``artefact`` of results.json, from the settings that a cell's images were made with.

    fitted: configuration of the artefact, if there is one.
    """
    made = json.loads((cell.folder / "cell.json").read_text())
    name, _, fingerprint = str(made["model"]).rpartition("#")
    artefact = None
    if made["eraser"] != "base":
        known = fitted or {}
        artefact = {
            "eraser": made["eraser"],
            "method": known.get("method"),
            "settings": known.get("method_config", {}),
            "seed": known.get("seed"),
            "details": known.get("details", {}),
        }
    return {"model": {"id": name or fingerprint, "fingerprint": fingerprint}, "artefact": artefact}
