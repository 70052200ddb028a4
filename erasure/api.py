"""The public functions: erase, load, verify, detach."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .artifact import check, detach, verify
from .concept import Concept
from .method import Eraser, Run, attach_for_good, compose
from .models import load_base
from .registry import methods

__all__ = ["detach", "erase", "list_methods", "load", "verify"]


def list_methods() -> dict[str, str]:
    """Names of all methods, plug-ins included, each with one line on it."""
    return methods.summaries()


def erase(pipe: Any, concept: Concept | Sequence[Concept], method: str = "uce", *, run: Run = Run(), **config: Any) -> Eraser:
    """Fit a method by name on one or more concepts, attach the eraser to ``pipe`` for good (see `detach`), and give it back."""
    concepts = [concept] if isinstance(concept, Concept) else list(concept)
    eraser: Eraser = methods.get(method).from_config(config).fit(pipe, concepts, run=run)
    attach_for_good(eraser, pipe)
    return eraser


def load(folder: str | Path | Sequence[str | Path], base: Any, *, component: str | None = None, **options: Any) -> Any:
    """The base with the artefact of ``folder`` attached and checked: an ordinary diffusers pipeline. Anything wrong raises.

    Several folders: each is checked on the bare base, and all are attached in their order. ``base``: a pipeline, or what
    `load_base` takes, with its ``options``. ``component``: what alone must be that of the artefact's base, where the artefact changes
    nothing else: an erased text encoder plugs into every pipeline that has the same one.
    """
    pipe = load_base(str(base), **options) if isinstance(base, str | Path) else base
    folders = [folder] if isinstance(folder, str | Path) else list(folder)
    attach_for_good(compose(*(check(each, pipe, component=component)[0] for each in folders)), pipe)
    return pipe
