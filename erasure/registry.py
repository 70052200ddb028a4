"""Names to objects, imported only when asked for, open to other packages through entry points."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import ErasureError, UnknownName


def unknown(what: str, name: str, known: Iterable[str], hint: str = "") -> UnknownName:
    """The error for a name that nobody has, with the nearest known ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    guess = f"; did you mean {' or '.join(near)}?" if near else ""
    return UnknownName(f"no {what} {name!r}{guess or '.'} Known: {', '.join(known) or 'none'}{'; ' + hint if hint else ''}")


@dataclass
class Registry:
    """Lazy names: built-ins as ``"module:object"`` with a one-line summary, plug-ins from an entry-point group."""

    what: str
    group: str
    builtin: dict[str, tuple[str, str]] = field(default_factory=dict)

    @cached_property
    def plugins(self) -> dict[str, EntryPoint]:
        return {p.name: p for p in entry_points(group=self.group) if p.name not in self.builtin}

    def names(self) -> list[str]:
        return [*self.builtin, *sorted(self.plugins)]

    def get(self, name: str) -> Any:
        """The object of that name; unknown names raise with a suggestion, broken plug-ins with their own error."""
        if name in self.builtin:
            module, _, attribute = self.builtin[name][0].partition(":")
            return getattr(import_module(module), attribute)
        if name in self.plugins:
            try:
                return self.plugins[name].load()
            except Exception as error:
                raise ErasureError(f"the plug-in {name!r} ({self.plugins[name].value}) does not load: {error}") from error
        raise unknown(self.what, name, self.names())

    def summaries(self) -> dict[str, str]:
        """Each name with one line on it; a broken plug-in is listed with its error and breaks nothing."""
        lines = {name: summary for name, (_, summary) in self.builtin.items()}
        for name in sorted(self.plugins):
            try:
                lines[name] = (self.get(name).__doc__ or "").strip().split("\n")[0]
            except ErasureError as error:
                lines[name] = f"broken: {error}"
        return lines


methods = Registry(
    "method",
    "erasure.methods",
    {
        "negative_prompt": (
            "erasure.methods.negative_prompt:NegativePrompt",
            "The concept as negative prompt: the baseline of every table",
        ),
        "uce": ("erasure.methods.uce:UCE", "Unified Concept Editing: cross-attention keys and values in closed form"),
        "safree": ("erasure.methods.safree:SAFREE", "SAFREE: prompts projected off the concept's subspace, with re-attention"),
    },
)
