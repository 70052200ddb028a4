"""Output folders that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ErasureError, NoArtifact
from ..manifest import CARD, CONFIG, is_export, sha256

SPARE = 16 * 2**20
"""Bytes that are wanted free beside an export."""


@dataclass(frozen=True)
class Partial:
    """The folder that is being written."""

    path: Path

    def finish(self, config: Mapping[str, Any], report: Mapping[str, Any], card: str) -> list[str]:
        """Write card and configuration, with the hash of every file; gives their names."""
        (self.path / CARD).write_text(card)
        files = {p.relative_to(self.path).as_posix(): sha256(p) for p in sorted(self.path.rglob("*")) if p.is_file()}
        marked = {**config, "files": files, "export": {key: report[key] for key in sorted(report.keys() - {"artefact", "out"})}}
        (self.path / CONFIG).write_text(json.dumps(marked, indent=2, sort_keys=True) + "\n")
        return [*files, CONFIG]


def check_out(out: Path) -> None:
    """Raise where an export cannot go: on a file, or on a folder that holds anything but a former export."""
    if out.exists() and not out.is_dir():
        raise NoArtifact(f"{out} is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not is_export(out):
        raise NoArtifact(f"{out} is not empty and holds no export; choose another folder, or remove it")


@contextmanager
def staged(out: Path) -> Iterator[Partial]:
    """A partial folder beside ``out`` that takes its place at the end, and is removed where anything fails."""
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield Partial(partial)
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def require_space(partial: Partial, pipe: Any, new: Mapping[str, Tensor], form: str, dtype: torch.dtype) -> None:
    """Raise before anything large is written where it would not fit."""
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    if form == "full":
        wanted = sum(t.numel() * t.element_size() for module in modules for t in module.state_dict().values())
    elif form == "single":
        wanted = sum(t.numel() * dtype.itemsize for module in modules for t in module.state_dict().values())
    else:
        wanted = sum(t.numel() * dtype.itemsize for t in new.values()) * (2 if form == "lora" else 1)
    free = shutil.disk_usage(partial.path).free
    if wanted + SPARE > free:
        raise ErasureError(
            f"no space for the export: it needs {(wanted + SPARE) / 1e6:,.0f} MB, {partial.path.parent} has {free / 1e6:,.0f} MB free; "
            "free some, or choose another folder"
        )
