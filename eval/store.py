"""The image store: one cell holds an eraser's images of a suite's rows, in chunks that are whole or absent."""

import hashlib
import io
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasure.errors import ErasureError

from .protocol import Protocol, digest
from .rows import Row

log = logging.getLogger("erasure")

Shard = tuple[int, int]


DECIDES = {
    "eraser": "another method, setting, concept or fit",
    "model": "another base model",
    "protocol": "another suite, --steps or --guidance",
    "rows": "another concept, suite or --limit",
    "threads": "set OMP_NUM_THREADS to go on with it",
}
"""What differs when a hash does, in a user's words."""


class StoreMismatch(ErasureError):
    """An existing cell was made under other settings; ``field`` names the first that differs."""

    def __init__(self, folder: Path, field: str, stored: Any, wanted: Any) -> None:
        what = f"{field} = {stored!r}, not {wanted!r}" + (f" ({DECIDES[field]})" if field in DECIDES else "")
        super().__init__(f"{folder} holds images made with {what}: use another folder, or remove this one")
        self.field = field


@dataclass(frozen=True)
class Settings:
    """Everything that decides the pixels of a cell, as ``cell.json`` records it."""

    eraser: str
    """SHA-256 of the eraser's configuration and tensors, or "base"."""
    model: str
    """Fingerprint or id of the base model."""
    protocol: str
    """``Protocol.image_hash``."""
    rows: str
    """Hash of ids, prompts and seeds."""
    batch_size: int
    threads: int
    device: str
    dtype: str
    versions: dict[str, str]

    @classmethod
    def of(cls, rows: Sequence[Row], protocol: Protocol, *, eraser: str, model: str, batch_size: int, device: str = "cpu") -> "Settings":
        """The settings of a run in this process."""
        return cls(
            eraser, model, protocol.image_hash, rows_hash(rows), batch_size, torch.get_num_threads(), device, protocol.dtype, versions()
        )


@dataclass(frozen=True)
class Chunk:
    """Rows that one pipeline call makes."""

    index: int
    rows: tuple[Row, ...]

    @property
    def folder(self) -> str:
        return f"chunk-{self.index:04d}"


@dataclass(frozen=True)
class Cell:
    """A folder of chunks; make one with ``Cell.open``."""

    folder: Path
    rows: tuple[Row, ...]
    """In the order of the suite."""
    chunks: tuple[Chunk, ...]

    @classmethod
    def open(cls, folder: Path | str, rows: Sequence[Row], settings: Settings) -> "Cell":
        """The cell in a folder, new or begun; raises StoreMismatch when it was begun under other settings."""
        folder, wanted = Path(folder), asdict(settings)
        if rows_hash(rows) != settings.rows:
            raise ErasureError(f"{folder}: these are not the rows that the settings were made for")
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "cell.json"
        if record.exists():
            _compare(folder, _stored(record), wanted)
        else:
            _write(record, wanted)
        return cls(folder, tuple(rows), chunked(rows, settings.batch_size))

    def missing(self, shard: Shard = (1, 1)) -> list[Chunk]:
        """Chunks of a shard, part i of n counting from 1, that are still to be made."""
        part, parts = shard
        if not 1 <= part <= parts:
            raise ErasureError(f"shard {part}/{parts}: the part lies between 1 and the number of parts")
        return [c for c in self.chunks if c.index % parts == part - 1 and not (self.folder / c.folder).is_dir()]

    def write(self, chunk: Chunk, images: Tensor, seconds: float) -> None:
        """Keep a chunk's images [n, 3, h, w] in 0..1: all of them, or on any failure none."""
        draft = self.folder / f".{chunk.folder}+{platform.node()}+{os.getpid()}"
        draft.mkdir()
        try:
            hashes = [_save(draft / f"{row.id}.png", image) for row, image in zip(chunk.rows, images, strict=True)]
            _write(draft / "chunk.json", {"rows": [r.id for r in chunk.rows], "seeds": [r.seed for r in chunk.rows], "sha256": hashes})
            # Kept apart from chunk.json, which equal runs write byte for byte alike.
            _write(draft / "timing.json", {"seconds": seconds})
            self._publish(draft, self.folder / chunk.folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _publish(self, draft: Path, target: Path) -> None:
        try:
            os.replace(draft, target)
        except OSError:
            if not target.is_dir():
                raise
            log.warning("%s was made by another process meanwhile; its images stay", target)

    def clean(self) -> None:
        """Remove the drafts that killed processes of this machine left behind; those of live processes stay."""
        for draft in self.folder.glob(".chunk-*"):
            _, node, pid = draft.name.split("+")
            if node == platform.node() and not _alive(int(pid)):
                shutil.rmtree(draft, ignore_errors=True)

    def images(self, rows: Sequence[Row] | None = None) -> Tensor:
        """Images [n, 3, h, w] in 0..1 of the given rows, or of all, at once; rows of several sizes raise ErasureError."""
        loaded = [image for _, image in self.each(rows)]
        if len(sizes := {tuple(image.shape[1:]) for image in loaded}) > 1:
            found = ", ".join(f"{h}x{w}" for h, w in sorted(sizes))
            raise ErasureError(f"{self.folder} has images of several sizes ({found}), which no one tensor holds: go through each()")
        return torch.stack(loaded)

    def each(self, rows: Sequence[Row] | None = None) -> Iterator[tuple[Row, Tensor]]:
        """The given rows, or all, with their images [3, h, w] in 0..1, one at a time, so that any number fits into memory.

        A missing or damaged image is an error, never a gap.
        """
        for row, path, sha256 in self.files(rows):
            yield row, read_image(path, sha256).float() / 255

    def files(self, rows: Sequence[Row] | None = None) -> list[tuple[Row, Path, str]]:
        """The given rows, or all, with the file of each and its recorded SHA-256; a chunk that is missing raises ErasureError."""
        wanted = self.rows if rows is None else rows
        if not wanted:
            raise ErasureError(f"{self.folder}: no rows were asked for, and a score of no images means nothing")
        at = {row.id: chunk for chunk in self.chunks for row in chunk.rows}
        hashes = {name: sha for chunk in {at[r.id].index: at[r.id] for r in wanted}.values() for name, sha in self._hashes(chunk).items()}
        return [(r, self.folder / at[r.id].folder / f"{r.id}.png", hashes[r.id]) for r in wanted]

    def seconds_per_image(self) -> float | None:
        """Mean over the chunks made so far; None before the first."""
        made = [chunk for chunk in self.chunks if (self.folder / chunk.folder).is_dir()]
        if not made:
            return None
        seconds = [json.loads((self.folder / c.folder / "timing.json").read_text())["seconds"] for c in made]
        return sum(seconds) / sum(len(c.rows) for c in made)

    def _hashes(self, chunk: Chunk) -> dict[str, str]:
        record = self.folder / chunk.folder / "chunk.json"
        if not record.exists():
            raise ErasureError(f"{self.folder} is not complete, {chunk.folder} is missing: run `erasure generate` again, it resumes")
        data = json.loads(record.read_text())
        return dict(zip(data["rows"], data["sha256"], strict=True))


def chunked(rows: Sequence[Row], size: int) -> tuple[Chunk, ...]:
    """Rows in chunks of at most ``size``; those of one chunk share guidance and size, as one call of the pipeline needs it."""
    alike: dict[tuple[float | None, int | None, int | None], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.guidance, row.height, row.width), []).append(row)
    parts = [group[i : i + size] for group in alike.values() for i in range(0, len(group), size)]
    return tuple(Chunk(index, tuple(part)) for index, part in enumerate(parts))


def rows_hash(rows: Sequence[Row]) -> str:
    """Identity of a list of rows."""
    return digest([row.record() for row in rows])


def parse_shard(text: str) -> Shard:
    """``"3/16"`` as (3, 16)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ErasureError(f"shard {text!r}: write i/n with i from 1 to n, such as 3/16")
    return int(match[1]), int(match[2])


def versions() -> dict[str, str]:
    """Versions of what computes pixels and scores."""
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy", "pillow")}
    return {"python": platform.python_version(), **packages}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _stored(record: Path) -> dict[str, Any]:
    try:
        stored = json.loads(record.read_text())
    except ValueError as error:
        raise ErasureError(f"{record} is not JSON ({error}): remove {record.parent} and generate again") from error
    return stored if isinstance(stored, dict) else {}


def _compare(folder: Path, stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> None:
    for key in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            _compare(folder, old, new, f"{key}.")
        elif old != new:
            raise StoreMismatch(folder, prefix + key, old, new)


def _write(path: Path, data: Any) -> None:
    draft = path.with_name(f".{path.name}-{platform.node()}-{os.getpid()}")
    draft.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
    os.replace(draft, path)


def _save(path: Path, image: Tensor) -> str:
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, compress_level=6)
    return _sha256(path)


def read_image(path: Path, sha256: str) -> Tensor:
    """A stored image as uint8 [3, h, w]; one that is missing, has other bytes than recorded, or cannot be read raises ErasureError."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("its bytes are not those that were written")
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError) as error:
        raise ErasureError(f"{path} is missing or damaged ({error}): remove its folder and generate again") from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
