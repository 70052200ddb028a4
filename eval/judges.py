"""Judges by the names that protocols use, each with the hash of the weight file that decides its calls."""

import hashlib
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

from erasure.errors import ErasureError
from erasure.registry import unknown

if TYPE_CHECKING:  # a list of suites hashes the judges' files, and does not wait for torch
    from torch import Tensor

    from erasure.canvas.judging import Verdict

Judging = Callable[["Tensor"], "Verdict"]

JUDGES = {
    "canvas/judge_test": ("erasure.canvas.judge_test:judge_test", "erasure.canvas", "weights/judge_test.safetensors"),
    "canvas/judge_dev": ("erasure.canvas.judge_dev:judge_dev", "erasure.canvas", "weights/judge_dev.safetensors"),
}
"""Name -> (module:factory, package, weight file). Tables are judged by judge_test, searches by judge_dev."""


def judge(name: str) -> Judging:
    """The judge of that name, loaded."""
    module, _, factory = _entry(name)[0].partition(":")
    return getattr(import_module(module), factory)()


@cache
def judge_sha256(name: str) -> str:
    """SHA-256 of the judge's weight file; raises ErasureError when the file is not in the installation."""
    _, package, path = _entry(name)
    with as_file(files(package).joinpath(path)) as file:
        if not file.is_file():
            raise ErasureError(f"the judge {name!r} has no weights at {file}: install the released package, or train the judges first")
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def _entry(name: str) -> tuple[str, str, str]:
    if name not in JUDGES:
        raise unknown("judge", name, JUDGES)
    return JUDGES[name]
