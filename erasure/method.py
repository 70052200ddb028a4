"""A method is a frozen dataclass with ``fit``; what it fits is an eraser, which attaches to a pipeline and leaves it as it was."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from .concept import Concept
from .errors import Conflict, ErasureError, NotErased, NothingAttached, UnsupportedFamily
from .families import Family, family_of
from .seams import weights
from .seams.instance import overridden

if TYPE_CHECKING:
    from .callbacks import Callback

log = logging.getLogger("erasure")


@dataclass(frozen=True)
class Run:
    """Where and how a fit runs: everything that is not the method's own configuration."""

    seed: int = 0
    """Seed of whatever the fit draws."""
    progress: bool = True
    """Show progress bars."""
    checkpoint: Path | None = None
    """Folder where training keeps its state: a killed fit, called again with it, goes on and ends with the same weights."""
    callbacks: "tuple[Callback, ...]" = ()
    """What else a training does, see callbacks.py: averages, validation, early stop."""


@dataclass(frozen=True, kw_only=True)
class ErasureMethod(ABC):
    """The recipe. Its fields are its whole configuration: CLI flags, YAML keys and the saved JSON come from them."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: ClassVar[str]
    """Its name in the registry."""
    paper: ClassVar[str] = ""
    """Where the formula comes from."""
    families: ClassVar[frozenset[str]]
    """The rows of families.py that the formula allows."""
    trained: ClassVar[bool] = False
    """Whether results depend on a fit seed."""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Values of fields under a name; a method that has some has a field ``preset``, and takes from there what is not given."""

    @abstractmethod
    def fit(self, pipe: Any, concepts: Sequence[Concept], *, run: Run = Run()) -> "Eraser":
        """Read what the formula needs from ``pipe`` and give the eraser of ``concepts``; ``pipe`` is left as it was."""

    @abstractmethod
    def eraser(self, concepts: tuple[Concept, ...], tensors: Mapping[str, Tensor]) -> "Eraser":
        """The eraser that saved ``tensors`` stand for."""

    def config(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from plain data; an unknown key is an error, since an ignored key in a safety tool is a fault."""
        try:
            return TypeAdapter(cls).validate_python(dict(config))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            known = ", ".join(f.name for f in fields(cls))
            raise ErasureError(f"{cls.name}: {problems} (fields: {known})") from error

    def family(self, pipe: Any) -> Family:
        """The pipeline's family, if this method supports it."""
        family = family_of(pipe)
        if family.name not in self.families:
            raise UnsupportedFamily(f"{self.name} has no formula for {family.name}; it supports {', '.join(sorted(self.families))}")
        return family


@dataclass(frozen=True)
class Eraser(ABC):
    """What a fit gives: immutable, attaches to a pipeline of its family, serialises to tensors."""

    kind: ClassVar[str]
    probe: ClassVar[str] = "{}"
    """A prompt with a place for a target phrase, on which the erasure shows: where the bare phrase is what it compares with, more words."""
    method: ErasureMethod
    concepts: tuple[Concept, ...]

    def __post_init__(self) -> None:
        if not self.concepts:
            raise ErasureError(f"{self.method.name} was given no concept to erase")

    @abstractmethod
    def seams(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        """The places to open, in order; each yields how many things it touched."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All state, by name."""

    def details(self) -> dict[str, Any]:
        """What else the artefact's configuration and card say of it: tables of plain data by title, each {row: {column: value}}."""
        return {}

    @property
    def first_step(self) -> int:
        """The first sampling step, from 0, at which it changes anything: shorter runs would not show it."""
        return 0

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[Any]:
        """Erase inside the ``with`` block. Raises if nothing was touched; undone bit-exactly, last in first out."""
        family = self.method.family(pipe)
        attached: list[Eraser] = vars(pipe).get("_erasers", [])
        self.check_conflicts(attached)
        with ExitStack() as opened:
            if not sum(opened.enter_context(seam) for seam in self.seams(pipe, family)):
                raise NothingAttached(f"{self.method.name} found nothing to change in {type(pipe).__name__}")
            pipe._erasers = [*attached, self]
            try:
                yield pipe
            finally:
                self._leave(pipe)

    def _leave(self, pipe: Any) -> None:
        """Strike this eraser off the pipeline's list, which goes with the last; by identity, since tensors have no truth value."""
        attached = vars(pipe).pop("_erasers")
        if rest := [other for other in attached if other is not self]:
            pipe._erasers = rest
        if attached[-1] is not self:
            raise Conflict(f"the {self.method.name} eraser was taken off before one that was attached after it")

    def check_conflicts(self, attached: Sequence["Eraser"]) -> None:
        """Raise where this eraser and an attached one claim the same place."""
        if any(other is self for other in attached):
            raise Conflict(f"this {self.method.name} eraser is attached to the pipeline already")

    def save(self, folder: Any, **details: Any) -> None:
        """Write the artefact folder; see artifact.save."""
        from . import artifact

        artifact.save(self, folder, **details)


@dataclass(frozen=True)
class WeightEraser(Eraser):
    """Changed parameters by dotted name with their component; keeps the originals of those only while attached."""

    kind: ClassVar[str] = "weights"
    changed: Mapping[str, Tensor] = field(repr=False)

    def seams(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        yield weights.swapped(pipe, self.values(pipe))

    def values(self, pipe: Any) -> Mapping[str, Tensor]:
        """New values of the parameters of ``pipe``, by dotted name."""
        return self.changed

    def writes(self) -> Set[str]:
        """Names of the parameters that it changes."""
        return self.changed.keys()

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.changed)

    def check_conflicts(self, attached: Sequence[Eraser]) -> None:
        super().check_conflicts(attached)
        for other in attached:
            shared = self.writes() & other.writes() if isinstance(other, WeightEraser) else set()
            if shared:
                raise Conflict(
                    f"{self.method.name} and {other.method.name} both write {sorted(shared)[0]} (and {len(shared) - 1} more); "
                    "fit one method on all concepts instead"
                )

    def bake(self, pipe: Any) -> None:
        """Write the changed parameters into ``pipe`` for good."""
        with torch.no_grad():
            for name, tensor in self.values(pipe).items():
                weights.parameter(pipe, name).copy_(tensor)


@dataclass(frozen=True)
class RuntimeEraser(Eraser):
    """Acts while the pipeline runs; its weights are the base's, so a plain ``save_pretrained`` would ship the base."""

    kind: ClassVar[str] = "runtime"

    def seams(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        yield _uncached(pipe, family)
        yield _unsaveable(pipe)
        yield from self.edits(pipe, family)

    @abstractmethod
    def edits(self, pipe: Any, family: Family) -> Iterable[AbstractContextManager[int]]:
        """The seams of the method itself."""


@contextmanager
def _unsaveable(pipe: Any) -> Iterator[int]:
    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        raise NotErased(
            "save_pretrained would write the unerased base: a runtime eraser is attached; use erasure export or eraser.save(folder)"
        )

    with overridden(pipe, "save_pretrained", lambda inner: save_pretrained):
        yield 0


@contextmanager
def _uncached(pipe: Any, family: Family) -> Iterator[int]:
    """Feature caches skip blocks and whole calls, and with them what an eraser does there."""

    def enable_cache(*args: Any, **kwargs: Any) -> None:
        raise NotErased("a feature cache would skip the attached eraser; enable it on a pipeline whose erasure is baked into the weights")

    with ExitStack() as stack:
        for name, denoiser in family.parts(pipe):
            if getattr(denoiser, "is_cache_enabled", False):
                raise NotErased(f"{name} has a feature cache on, which would skip the eraser; call {name}.disable_cache() first")
            if hasattr(denoiser, "enable_cache"):
                stack.enter_context(overridden(denoiser, "enable_cache", lambda inner: enable_cache))
        yield 0


@dataclass(frozen=True)
class Stack:
    """Erasers in the order in which they attach; made by `compose`."""

    erasers: tuple[Eraser, ...]

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[Any]:
        """Attach all, first to last, and take them off again last to first. Whatever conflicts raises, and nothing stays attached."""
        with ExitStack() as opened:
            for eraser in self.erasers:
                opened.enter_context(eraser.attach(pipe))
            yield pipe


def compose(*erasers: "Eraser | Stack") -> Stack:
    """Stack erasers in order: what a later prompt seam issues is what the denoiser gets; disjoint weight erasers commute."""
    flat: list[Eraser] = []
    for each in erasers:
        flat.extend(each.erasers if isinstance(each, Stack) else [each])
    if not flat:
        raise ErasureError("compose was given no eraser")
    return Stack(tuple(flat))


def attach_for_good(eraser: Eraser | Stack, pipe: Any) -> None:
    """Attach outside a ``with`` block, until `detach`."""
    context = eraser.attach(pipe)
    context.__enter__()
    vars(pipe).setdefault("_erasure_contexts", []).append(context)


def detach(pipe: Any) -> None:
    """Take off every eraser that `load` or `erase` left attached, last in first out."""
    with ExitStack() as stack:  # takes all of them off, even where one complains
        for context in vars(pipe).pop("_erasure_contexts", []):
            stack.push(context)
