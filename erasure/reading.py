"""Files that people write: YAML in, and what is wrong with it out, in words that name the place and the nearest right key."""

import difflib
from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .errors import ErasureError

UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
"""Pydantic's names for a key that a model or a dataclass does not have."""


def read_yaml(file: Path | Traversable, name: str) -> Any:
    """The content of a YAML file called ``name``; raises ErasureError with line and column where it is none."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise ErasureError(f"{name} is not YAML: {' '.join(str(error).split())}; correct it there") from error


def problems(error: ValidationError, keys: Iterable[str]) -> str:
    """What a validation found, each with the key; an unknown key comes with the nearest of ``keys``, or all of them."""
    known = list(keys)
    return "; ".join(_problem(e["type"], tuple(map(str, e["loc"])), e["msg"], known) for e in error.errors())


def _problem(sort: str, place: tuple[str, ...], message: str, known: list[str]) -> str:
    where = ".".join(place) or "file"
    if sort not in UNKNOWN_KEY:
        return f"{where}: {message}"
    near = difflib.get_close_matches(place[-1], known, n=1)
    return f"{where}: unknown key; {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(known)}"
